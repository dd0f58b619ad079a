"""What moves between host and device while the device computes: a step's facts, and the optimizer states of idle languages.

Masters and moments of languages that a step does not train may be kept in host memory, so that device memory hardly grows
with the number of languages. The step's own are fetched while its passes run, which do not need them, and are written back
while the next step runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mlinterf_ds.engine.space import Space


def on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """These numbers as a float64 tensor on the device; the host does not wait for the copy."""
    pinned = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


class StepFacts(Mapping[str, float]):
    """Facts by name, which are copied from the device once, when the first of them is read.

    settle: called with the facts before they are returned; it brings the engine's counters up to date and returns further
    facts.
    """

    def __init__(
        self,
        known: Mapping[str, float],
        computed: Mapping[str, Tensor],
        settle: Callable[[dict[str, float]], Mapping[str, float]],
    ):
        """known: the facts that the host has already. computed: scalars on the device, numbers or bools."""
        self._names, self._facts, self._settle = list(computed), dict(known), settle
        values = torch.stack(list(computed.values()))  # bools become numbers
        self._values: Tensor | None = values
        self._event = None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> dict[str, float]:
        """All facts; waits for the device the first time."""
        if self._values is not None:
            if self._event is not None:
                self._event.synchronize()
            values, self._values = self._values, None
            self._facts |= zip(self._names, values.tolist(), strict=True)
            self._facts |= self._settle(self._facts)
        return self._facts

    def __getitem__(self, name: str) -> float:
        return self.read()[name]

    def __contains__(self, name: object) -> bool:
        return name in self._facts or name in self._names  # without waiting for the values

    def __iter__(self) -> Iterator[str]:
        return iter(self.read())

    def __len__(self) -> int:
        return len(self.read())


def host_memory(tensor: Tensor, device: torch.device) -> Tensor:
    """Host memory for a copy of this tensor: page-locked if copies go to or come from an accelerator, and so are fast."""
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError):  # the host has no more memory that can be locked
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return torch.empty(tensor.shape, dtype=tensor.dtype)


class IdleSpaces:
    """Keeps the masters and moments of some parameter groups in host memory between their steps.

    The tensors stay the same objects; their data moves. For `fetch` and `release` the host only launches copies.
    """

    def __init__(self, spaces: Iterable[Space], optimizers: dict[str, torch.optim.AdamW], device: torch.device):
        self.device = device
        self.stream: Any = torch.cuda.Stream() if device.type == "cuda" else None
        self._tensors: dict[str, list[Tensor]] = {}
        self._host: dict[str, list[Tensor]] = {}
        for space in spaces:
            state = optimizers[space.name].state
            tensors = [tensor for master in space.masters for tensor in (master, *state[master].values())]
            self._tensors[space.name] = tensors
            on_host = [host_memory(tensor, device) for tensor in tensors]
            self._host[space.name] = [copy.copy_(t.detach()) for copy, t in zip(on_host, tensors, strict=True)]
            self._point(space.name, self._host[space.name])

    def _point(self, name: str, at: list[Tensor]) -> None:
        for tensor, data in zip(self._tensors[name], at, strict=True):
            tensor.data = data

    def fetch(self, spaces: Iterable[Space]) -> None:
        """Begins to copy these groups to the device; call `wait` before they are read there."""
        with self._aside():
            for name in self._kept(spaces):
                self._point(name, [host.to(self.device, non_blocking=True, copy=True) for host in self._host[name]])

    def wait(self) -> None:
        """Makes the device do all later work after the copies of `fetch`."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    def release(self, spaces: Iterable[Space]) -> None:
        """Begins to write these groups back after the work that the device already has; call `finish` before the host reads
        them."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with self._aside():
            for name in self._kept(spaces):
                for tensor, host in zip(self._tensors[name], self._host[name], strict=True):
                    host.copy_(tensor.detach(), non_blocking=True)
                    if self.stream is not None:
                        tensor.data.record_stream(self.stream)
                self._point(name, self._host[name])

    def finish(self) -> None:
        """Waits until all groups are in host memory."""
        if self.stream is not None:
            self.stream.synchronize()

    def _kept(self, spaces: Iterable[Space]) -> list[str]:
        return [space.name for space in spaces if space.name in self._tensors]

    def _aside(self) -> Any:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)
