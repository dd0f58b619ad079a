"""Ends a run on SIGTERM, SIGHUP or SIGINT: any rank may receive the signal, and all ranks agree to stop."""

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


def stop_reason(signals: Signals, device: torch.device, others: Mapping[str, bool] | None = None) -> str:
    """Why all ranks stop now: the signal that any of them received, or the first of `others` that holds on any; '' to go on.

    others: further reasons in words, the same on all ranks, and whether each holds on this one.
    """
    import torch
    import torch.distributed as dist

    others = others or {}
    held = torch.tensor([float(signals.received is not None), *map(float, others.values())])
    if dist.get_world_size() > 1:  # one rank asks nobody, and so need not wait for its device
        held = held.to(device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
    received, *others_held = held.tolist()
    if received:
        return signals.received or "a signal to another rank"
    return next((reason for reason, holds in zip(others, others_held, strict=True) if holds), "")
