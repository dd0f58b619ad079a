"""Starting all ranks of a job again after a fault: each process that a launcher starts supervises one rank, which is its child.

Every launcher (deepspeed, torchrun, srun, mpirun) starts the supervisors as it would start ranks. They meet once, in a
store that lives as long as the job. In each attempt the first rank that fails is noted in the store, every supervisor
kills its child, and when all are down the next attempt starts. A user's mistake (exit code 2) is final, even if a rank
that failed because of it was noted before.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from mlinterf_ds.errors import UserError
from mlinterf_ds.runtime.launchers import ADDRESS, meet, rendezvous
from mlinterf_ds.runtime.signals import ending_signals

ATTEMPT = "MLINTERF_DS_ATTEMPT"  # set in the ranks, not in their supervisors
POLL = 0.3  # seconds
FINAL = (0, 2, 130)  # exit codes after which nothing is started again: done, a user's mistake, interrupted


class Supervisor:
    """Supervises one rank: starts it as a child process, and again after a fault of any rank."""

    def __init__(self, restarts: int, timeout: float, remedy: str):
        """restarts: attempts after the first. timeout: minutes to wait for other ranks. remedy: what a user does after them."""
        self.restarts, self.patience, self.remedy = restarts, 60 * timeout, remedy  # patience in seconds
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.address = address = rendezvous()
        self.store = meet(address, self.rank, self.world, datetime.timedelta(seconds=self.patience))
        self.child: Any = None  # a subprocess.Popen once started
        self.alive = self.ending = 0.0  # monotonic times: when the store last answered; when an end began (0: not yet)

    @property
    def killed(self) -> bool:
        """Whether the last child was killed, and so could not end its records itself."""
        return bool(self.child and (self.child.returncode or 0) < 0)

    def run(self, line: Sequence[str]) -> int:
        """Run the command `line` as this rank until an attempt ends well or none is left; the last exit code."""
        for number in ending_signals():
            signal.signal(number, self._forward)
        self.alive = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            for attempt in range(self.restarts + 1):
                rank, status = self._attempt(attempt, line)
                if status in FINAL or self._all_have("asked"):
                    if self.rank == 0 and status not in FINAL:
                        print(
                            f"\nrank {rank} {_how(status)} while it was ending: {self.remedy}",
                            file=sys.stderr,
                            flush=True,
                        )
                    self._leave()
                    return abs(status)
                if self.rank == 0 and attempt < self.restarts:
                    count = f"({attempt + 1} of {self.restarts})"
                    print(f"\nrank {rank} {_how(status)}: starting all ranks again {count}", flush=True)
            self._leave()
            raise UserError(f"rank {rank} {_how(status)}, after {self.restarts} restarts: mend it, then {self.remedy}")
        except RuntimeError as error:  # the store: rank 0's host is gone
            first = str(error).splitlines()[0]
            raise UserError(f"rank {self.rank} lost the host of rank 0 ({first}): {self.remedy}") from None
        finally:
            self._kill()

    def _attempt(self, attempt: int, line: Sequence[str]) -> tuple[int, int]:
        """Run the rank once; the rank that failed first and its exit status, or (0, 0)."""
        store, prefix = self.store, f"attempt-{attempt}"
        self._start(prefix, attempt, line)
        reported = False
        while not self._all_have(f"{prefix}/failed"):
            status = self.child.poll()
            if status is not None and not reported:
                reported, self.ending = True, self.ending or time.monotonic()
                if status:
                    store.compare_set(f"{prefix}/failed", "", f"{self.rank} {status}")  # kept if it is the first
                else:
                    store.set(f"{prefix}/done/{self.rank}", "")
            if reported and self._all_have(*self._of_all(f"{prefix}/done")):
                return 0, 0
            if self.ending and time.monotonic() - self.ending > self.patience:
                raise UserError(f"other ranks have not ended within {self.patience / 60:g} minutes: {self.remedy}")
            self._pause()
        return self._verdict(prefix)

    def _start(self, prefix: str, attempt: int, line: Sequence[str]) -> None:
        """Start the child, which meets the other ranks at an address that no other attempt uses."""
        if self.address == "env://":
            if self.rank == 0:
                self.store.set(f"{prefix}/port", str(free_port()))
            meeting = {"MASTER_PORT": self.store.get(f"{prefix}/port").decode(), ADDRESS: "env://"}
            meeting["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # torchrun's own store listens at another port
        else:  # ranks of one host meet in a file, so that nothing listens to the network
            meeting = {ADDRESS: f"{self.address}-{prefix}"}
        self.child = subprocess.Popen(line, env=os.environ | meeting | {ATTEMPT: str(attempt)})
        if self._all_have("asked"):  # the signal came while the child was being started
            self.child.send_signal(signal.SIGTERM)

    def _verdict(self, prefix: str) -> tuple[int, int]:
        """After a failure: kill the child, wait until all ranks have, and read what ended the attempt."""
        self._kill()
        if (status := self.child.returncode) in FINAL[1:]:  # the child ended before the kill, maybe not noted yet
            self.store.compare_set(f"{prefix}/final", "", f"{self.rank} {status}")
        self.store.set(f"{prefix}/down/{self.rank}", "")
        self._wait(*self._of_all(f"{prefix}/down"))
        self.ending = 0.0
        key = f"{prefix}/final" if self._all_have(f"{prefix}/final") else f"{prefix}/failed"
        rank, status = map(int, self.store.get(key).decode().split())
        return rank, status

    def _leave(self) -> None:
        """End; rank 0, whose process holds the store, goes last."""
        self.store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            self._wait(*self._of_all("left"))

    def _wait(self, *keys: str) -> None:
        deadline = time.monotonic() + min(60.0, self.patience)
        while not self._all_have(*keys):
            if time.monotonic() > deadline:
                raise UserError(f"not all ranks could be ended: is a host cut off? Then {self.remedy}")
            self._pause()

    def _of_all(self, prefix: str) -> list[str]:
        return [f"{prefix}/{rank}" for rank in range(self.world)]

    def _all_have(self, *keys: str) -> bool:
        return bool(self.store.check(list(keys)))

    def _pause(self) -> None:
        """Wait until the store is due to be read again or the child ends, so that its end is noted before its consequences."""
        self.alive = time.monotonic()
        if self.child and self.child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(POLL)
        else:
            time.sleep(POLL)

    def _forward(self, number: int, _: FrameType | None) -> None:
        """Hand a scheduler's or user's signal on to the child, which saves; nothing is started again.

        A terminal sends Ctrl-C to the child as well, which takes a second SIGINT for the wish to end without saving.
        """
        self.ending = self.ending or time.monotonic()
        if self.child and self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM if number == signal.SIGINT else number)
        self.store.set("asked", "")

    def _kill(self) -> None:
        if self.child:
            self.child.kill()
            self.child.wait()

    def _watch(self) -> None:
        """Exit when the store has not answered for too long: calls to a host that was cut off do not return."""
        while time.monotonic() - self.alive < self.patience + 10:
            time.sleep(1)
        self._kill()
        print(f"\nerror: rank {self.rank} hears nothing of rank 0's host: {self.remedy}", file=sys.stderr)
        os._exit(1)


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with exit code {status}"


def free_port() -> int:
    """A TCP port of this host that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
