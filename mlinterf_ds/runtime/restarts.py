"""`restarts=N`: each rank's process starts the rank proper as a child, and after a fault all ranks start again together.

Every launcher (deepspeed, torchrun, srun, mpirun) starts these supervisors as it would start ranks. They meet once, through a
store that lives as long as the job; in each attempt the first rank that fails is noted there, everyone's child is killed,
and when all are down the next attempt goes on from the newest checkpoint. A user's mistake (exit code 2) is final, also
where a rank that failed because of it was noted first.
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
from pathlib import Path
from types import FrameType
from typing import Any

from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.runtime import session
from mlinterf_ds.runtime.launchers import ADDRESS, rendezvous

ATTEMPT = "MLINTERF_DS_ATTEMPT"  # set in the ranks proper
POLL = 0.3  # seconds
FINAL = (0, 2, 130)  # exit codes after which nothing is started again: done, a user's mistake, interrupted


def pretrain(arguments: Sequence[str]) -> int:
    """The pretraining launcher: supervises if the run asks for restarts, else (and in the children) trains."""
    options = session.parser(session.PRETRAIN).parse_args(arguments)
    config = session.configuration(options)
    if config.restarts and ATTEMPT not in os.environ:
        return Supervisor(config).run([sys.executable, "-u", sys.argv[0], *arguments])
    from mlinterf_ds.pretrain.main import main  # heavy: a supervisor does without

    return main(arguments)


def resuming(config: RunConfig) -> RunConfig:
    """With restarts, a run goes on from its own newest checkpoint as soon as there is one."""
    own = config.output and any((Path(config.output) / "checkpoints").glob("step-*"))
    return config.model_copy(update={"resume": "auto"}) if config.restarts and (own or not config.resume) else config


class Supervisor:
    """One rank's."""

    def __init__(self, config: RunConfig):
        import torch.distributed as dist

        self.restarts, self.patience = config.restarts, 60 * config.parallel.timeout  # seconds
        self.again = f"go on with --set output={config.output} --set resume=auto"
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.address = address = rendezvous()
        limit = datetime.timedelta(seconds=self.patience)
        self.store: Any = next(iter(dist.rendezvous(address, self.rank, self.world, timeout=limit)))[0]
        self.child: subprocess.Popen[bytes] | None = None
        self.alive = self.ending = 0.0  # when the store last answered; when an end began (0: not yet)

    def run(self, line: Sequence[str]) -> int:
        """Attempts until one ends well or none is left; the exit code of the last."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        self.alive = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            for attempt in range(self.restarts + 1):
                rank, status = self._attempt(attempt, line)
                if status in FINAL or self._all_have("asked"):
                    self._leave()
                    return abs(status)
                if self.rank == 0 and attempt < self.restarts:
                    said = f"rank {rank} {_how(status)}: starting all ranks again ({attempt + 1} of {self.restarts})"
                    print(f"\n{said}", flush=True)
            self._leave()
            raise UserError(f"rank {rank} {_how(status)}, after {self.restarts} restarts: mend it, then {self.again}")
        except RuntimeError as error:  # the store: rank 0's host is gone
            first = str(error).splitlines()[0]
            raise UserError(f"rank {self.rank} lost the host of rank 0 ({first}): {self.again}") from None
        finally:
            self._kill()

    def _attempt(self, attempt: int, line: Sequence[str]) -> tuple[int, int]:
        """(the rank that failed first, its status), or (0, 0)."""
        store, place = self.store, f"attempt-{attempt}"
        if self.address == "env://":
            if self.rank == 0:
                store.set(f"{place}/port", str(_free_port()))
            meeting = {"MASTER_PORT": store.get(f"{place}/port").decode(), ADDRESS: "env://"}
        else:  # one host: a file, so that nothing listens to the network
            meeting = {ADDRESS: f"{self.address}-{place}"}
        self.child = subprocess.Popen(line, env=os.environ | meeting | {ATTEMPT: str(attempt)})
        if self._all_have("asked"):  # while it was started
            self.child.send_signal(signal.SIGTERM)
        told = False
        while not self._all_have(f"{place}/failed"):
            status = self.child.poll()
            if status is not None and not told:
                told, self.ending = True, self.ending or time.monotonic()
                if status:
                    store.compare_set(f"{place}/failed", "", f"{self.rank} {status}")  # the first stands
                else:
                    store.set(f"{place}/done/{self.rank}", "")
            if told and self._all_have(*self._of_all(f"{place}/done")):
                return 0, 0
            if self.ending and time.monotonic() - self.ending > self.patience:
                raise UserError(f"other ranks have not ended within {self.patience / 60:g} minutes: {self.again}")
            self._pause()
        self._kill()
        if (status := self.child.returncode) in FINAL[1:]:  # ended before it could be killed, maybe not noted yet
            store.compare_set(f"{place}/final", "", f"{self.rank} {status}")
        store.set(f"{place}/down/{self.rank}", "")
        self._wait(*self._of_all(f"{place}/down"))
        self.ending = 0.0
        reason = f"{place}/final" if self._all_have(f"{place}/final") else f"{place}/failed"
        rank, status = map(int, store.get(reason).decode().split())
        return rank, status

    def _leave(self) -> None:
        """The store lives in rank 0's process, which goes last."""
        self.store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            self._wait(*self._of_all("left"))

    def _wait(self, *keys: str) -> None:
        deadline = time.monotonic() + min(60.0, self.patience)
        while not self._all_have(*keys):
            if time.monotonic() > deadline:
                raise UserError(f"not all ranks could be ended: is a host cut off? Then {self.again}")
            self._pause()

    def _of_all(self, prefix: str) -> list[str]:
        return [f"{prefix}/{rank}" for rank in range(self.world)]

    def _all_have(self, *keys: str) -> bool:
        return bool(self.store.check(list(keys)))

    def _pause(self) -> None:
        """Until the next look at the store, or till the child ends: what fails because of it must not be noted first."""
        self.alive = time.monotonic()
        if self.child and self.child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(POLL)
        else:
            time.sleep(POLL)

    def _forward(self, number: int, _: FrameType | None) -> None:
        """A scheduler's or user's wish to end: the child saves; nothing is started again."""
        self.ending = self.ending or time.monotonic()
        if self.child and self.child.poll() is None:
            self.child.send_signal(number)
        self.store.set("asked", "")

    def _kill(self) -> None:
        if self.child:
            self.child.kill()
            self.child.wait()

    def _watch(self) -> None:
        """A store on a host that was cut off does not answer, and calls to it do not return."""
        while time.monotonic() - self.alive < self.patience + 10:
            time.sleep(1)
        self._kill()
        print(f"\nerror: rank {self.rank} hears nothing of rank 0's host: {self.again}", file=sys.stderr)
        os._exit(1)


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with exit code {status}"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
