"""Keeps masters and moments of languages that a step does not train in host memory, so that device memory hardly grows with
the number of languages.

The step's own are fetched while its passes run, which do not need them, and are written back while the next step runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mlinterf_ds.engine.space import Space


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
            self._host[space.name] = [self._host_copy(tensor.detach()) for tensor in tensors]
            self._point(space.name, self._host[space.name])

    @staticmethod
    def _host_copy(tensor: Tensor) -> Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return copy.copy_(tensor)

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
