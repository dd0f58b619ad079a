"""Signals that ask for a clean end, and the ranks' agreement on it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from mlinterf_ds.errors import UserError

if TYPE_CHECKING:  # a study waits for signals without torch
    import torch
    from torch import Tensor


class Signals:
    """A context in which SIGTERM and SIGINT ask for a checkpoint and a clean end; a second SIGINT interrupts as usual.

    SIGHUP, which a terminal sends when it is closed, counts as SIGTERM, unless `nohup` has it ignored. Whatever would go to the
    closed terminal is dropped then, because writing to it would be an error.

    When a rank is lost, launchers send SIGTERM to the others, and SIGKILL 30 seconds later. A rank that is already failing
    must still print its reason, so it goes on catching SIGTERM after the context (unless it fails with a user's mistake,
    which all ranks find). A rank that waits for the lost one inside a collective runs no Python signal handler: a thread
    prints `remedy`, the command that resumes, `grace` seconds after the signal.
    """

    def __init__(self, remedy: str = "", grace: float = 10.0) -> None:
        self.received: str | None = None
        self.remedy, self.grace = remedy, grace
        self._left = threading.Event()

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in ending_signals()}
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        if self.remedy:
            reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._woken = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.remedy:
            self._left.set()
            signal.set_wakeup_fd(self._woken)
            os.close(self._writing)  # ends the thread
        failing = self.remedy and kind and not issubclass(kind, UserError)
        for number, handler in self._before.items():
            if number == signal.SIGINT or not failing:
                signal.signal(number, handler)

    def _watch(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] != signal.SIGINT and not self._left.wait(self.grace):
                    rank = os.environ.get("RANK", "0")
                    message = f"rank {rank}, told to end, still saves, or waits for a rank that was lost; {self.remedy}"
                    print(f"\n{message}", file=sys.stderr, flush=True)
                    return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if number == signal.SIGHUP and self._terminals:
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
            for stream in self._terminals:
                os.dup2(nowhere.fileno(), stream)
            sys.stdout = nowhere  # `hushed` may have put a copy of the terminal aside


def ending_signals() -> list[signal.Signals]:
    """The signals that ask a process to end; `nohup` has SIGHUP ignored, and so it stays."""
    hang_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    return [signal.SIGTERM, signal.SIGINT, *hang_up]


class StopVote:
    """Asks all ranks after every step whether one of them has to stop.

    One rank, and ranks on CPUs, are answered at once. Ranks on accelerators are answered after the next step: an answer at once
    would have the host wait for its device before it launches that step. All ranks read the same answer, and so stop together.
    """

    def __init__(self, signals: Signals, device: torch.device, late: bool | None = None) -> None:
        """late: answer after the next step; default: on accelerators."""
        self._signals, self._device = signals, device
        self._late = device.type != "cpu" if late is None else late
        self._asked: Tensor | None = None  # the votes of the step before, on the host as soon as the event has happened
        self._event: Any = None

    def reason(self, others: Mapping[str, bool] | None = None) -> str:
        """Why all ranks stop now: the signal that any of them received, or the first of `others` that holds on any; '' to go on.

        others: further reasons in words, the same on all ranks and at all steps, and whether each holds on this one.
        """
        import torch
        import torch.distributed as dist

        others = others or {}
        held = [float(self._signals.received is not None), *map(float, others.values())]
        several = dist.get_world_size() > 1
        # From page-locked memory a copy is launched like a kernel; from other memory the host would wait for the device.
        votes = torch.tensor(held, pin_memory=several and self._device.type == "cuda")
        if several:
            votes = votes.to(self._device, non_blocking=True)
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
            votes = self._answer(votes) if self._late else votes
        received, *others_held = votes.tolist()
        if received:
            return self._signals.received or "a signal to another rank"
        return next((reason for reason, holds in zip(others, others_held, strict=True) if holds), "")

    def _answer(self, votes: Tensor) -> Tensor:
        """The votes of the step before, none at the first; these ones are copied to the host meanwhile."""
        import torch

        asked, event = self._asked, self._event
        self._asked = votes.clone()
        if votes.device.type == "cuda":
            self._asked = torch.empty(votes.shape, dtype=votes.dtype, pin_memory=True)
            self._asked.copy_(votes, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        if event is not None:
            event.synchronize()
        return torch.zeros_like(votes, device="cpu") if asked is None else asked
