"""A step's facts (losses, norms, what was skipped), which the device may still be computing when the step returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor


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
