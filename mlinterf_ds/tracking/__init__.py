"""Tracker: one MLflow run for one job, from global rank 0, or nothing at all.

Training only ever appends a line to `mlflow-spool.jsonl` in its output folder; a daemon thread (which also pays for
importing MLflow) sends the lines. So a server that is away, slow or answering errors costs the training one warning. What
could not be sent by the end stays in the spool: `python -m mlinterf_ds.tracking FOLDER` sends it.

Address: MLflow's own MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db` in the working directory. A run is marked FINISHED,
FAILED or KILLED by `with tracker:` or `close`. SIGKILL leaves nobody to mark it: it stays RUNNING until the job is resumed
with its `run_id` (and ends properly), or until the command above finds the spool without an end and marks it KILLED.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import getpass
import logging
import math
import os
import shlex
import signal
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

from mlinterf_ds.errors import UserError
from mlinterf_ds.tracking.facts import (
    clean_name,
    environment_facts,
    first_line,
    flatten,
    scrub,
    tidy_tags,
    tracking_uri,
)
from mlinterf_ds.tracking.sender import PENDING, Sender, bound_mlflow, send_folder
from mlinterf_ds.tracking.spool import SPOOL, Record, SpoolWriter

__all__ = ["Tracker", "environment_facts", "main", "scrub"]

Status = Literal["FINISHED", "FAILED", "KILLED"]

log = logging.getLogger(__name__)

INTERVAL = 2.0  # seconds between two looks at the spool
LONGEST_PAUSE = 30.0  # seconds between two tries while the server is away
LAST_WORDS = 10.0  # seconds a dying job waits for the server: schedulers kill soon after they ask
MAX_STEP = 2**63 - 1


class Tracker:
    """Made by `start` (rank 0) or `off` (every other rank). No method but `start` can be slow; none raises."""

    def __init__(self, folder: Path | None = None, key: str = "", run_id: str | None = None) -> None:
        self._folder = folder  # None: off
        self._key, self._given = key, run_id
        self._closed = folder is None
        self._warned: set[str] = set()
        self._trouble = ""  # why the last sending failed
        self._resumed = run_id is not None
        self._pid = os.getpid()
        self._previous_handler: Any = None
        if folder is not None:
            place = folder.absolute()  # the process may change its directory
            self._spool = SpoolWriter(place, key)
            self._sender = Sender(place, tracking_uri(), self._warn)
            self._closing, self._done, self._wake = threading.Event(), threading.Event(), threading.Event()
            self._deadline = math.inf
            self._thread = threading.Thread(target=self._work, name="mlflow-sender", daemon=True)

    @classmethod
    def off(cls) -> Tracker:
        """A tracker that does nothing: for every rank but the first, and for `enabled=False`."""
        return cls()

    @classmethod
    def start(
        cls,
        *,
        enabled: bool,
        experiment: str,
        name: str,
        folder: Path,
        parameters: dict[str, Any],
        tags: dict[str, str],
        run_id: str | None = None,
        parent_id: str | None = None,
    ) -> Tracker:
        """Open a run, or with `run_id` (a tracker's own, `pending-...` too) attach to the one that a resumed job had.

        `parameters` may be nested; credentials in them and in `tags` are hidden. `parent_id` nests the run under another.
        Returns at once: the run itself is made in the background, when the server can be reached.
        """
        if not enabled:
            return cls.off()
        bound_mlflow()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tracker = cls(folder, _key_of(folder, run_id), run_id)
        except OSError as error:
            log.warning("MLflow tracking is off: %s cannot be written (%s)", folder / SPOOL, first_line(error))
            return cls.off()
        source = {"mlflow.user": _user(), "mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "LOCAL"}
        if "git_commit" in tags:
            source["mlflow.source.git.commit"] = tags["git_commit"]
        start = {
            "experiment": experiment[:500],
            "name": scrub(name),
            "parameters": flatten(parameters),
            "tags": tidy_tags(source | tags),
            "run_id": run_id,
            "parent_id": parent_id,
            "uri": scrub(tracking_uri()),
            "cwd": str(Path.cwd()),
        }
        tracker._write({"start": start})
        tracker._thread.start()
        atexit.register(tracker._at_exit)
        return tracker

    @property
    def run_id(self) -> str | None:
        """MLflow's id; until the server was reached the given one or `pending-...`, which `start` takes too; None if off."""
        if self._folder is None:
            return None
        return self._sender.runs.get(self._key) or self._given or PENDING + self._key

    def browse(self) -> str:
        """Where to look: the command that opens MLflow's browser on the store, or the server's address."""
        if self._folder is None:
            return ""
        uri = tracking_uri()
        if not uri.startswith(("http://", "https://")):
            here = f"sqlite:///{Path.cwd()}/"
            shown = "sqlite:///" + uri.removeprefix(here) if uri.startswith(here) else scrub(uri)
            return f"mlflow ui --backend-store-uri {shlex.quote(shown)}"
        address, run, experiment = scrub(uri).rstrip("/"), self._sender.runs.get(self._key), self._sender.experiment_id
        # MLflow remembers which half of its browser was open last; ours is this one, its first is generated text's.
        place = f"#/experiments/{experiment}/runs/{run}?workflowType=machine_learning"
        return f"{address}/{place}" if run and experiment else address

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values at a step. NaN is kept; infinities become NaN (MLflow would draw them as 1.8e308)."""
        if self._closed:
            return
        try:
            step = int(step)
            if not 0 <= step <= MAX_STEP:
                raise ValueError(f"step {step} is not a count")
            values = {clean_name(name): float(value) for name, value in metrics.items()}
            values = {name: value if math.isfinite(value) else math.nan for name, value in values.items()}
            if self._resumed:  # it repeats the steps since its checkpoint
                values = {name: v for name, v in values.items() if not self._spool.was_logged(name, step, v)}
            if values:
                self._write({"step": step, "metrics": values})
        except Exception as error:  # recording never ends a run
            self._warn(f"metrics were not recorded: {first_line(error)}")

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        if not self._closed:
            self._write({"tags": tidy_tags(tags)})

    def describe(self, text: str) -> None:
        """The run's description in MLflow's browser, as Markdown; the last one counts."""
        self.tag({"mlflow.note.content": text})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Add a file or a folder; it must stay where it is until `close`."""
        if self._closed or self._folder is None:
            return
        own, path = self._folder.resolve(), Path(path).resolve()
        # Relative where possible: an output folder may be sent from where it was moved to.
        inside = path.relative_to(own) if path.is_relative_to(own) else path
        self._write({"artifact": str(inside), "folder": folder})

    def close(self, status: Status = "FINISHED", timeout: float = 30.0) -> None:
        """End the run; wait at most `timeout` seconds for what is still to be sent. Closing twice does nothing."""
        if self._closed or os.getpid() != self._pid:
            return
        self._write({"end": status})
        self._closed = True
        atexit.unregister(self._at_exit)
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._wake.set()
        self._done.wait(timeout)
        with contextlib.suppress(OSError):
            self._spool.close()
        if not self._done.is_set() or self._sender.unsent:
            log.warning(
                "%s MLflow records could not be sent to %s%s; they wait in %s. Send them with: %s",
                self._sender.unsent,
                scrub(tracking_uri()),
                f" ({self._trouble})" if self._trouble else "",
                self._spool.path,
                f"python -m mlinterf_ds.tracking {shlex.quote(str(self._folder))}",
            )

    # --- how jobs end ------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        # By default SIGTERM ends Python without a word; an exit that unwinds lets the run be marked.
        in_main = threading.current_thread() is threading.main_thread()
        if self._folder is not None and in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._previous_handler = signal.signal(signal.SIGTERM, _exit_on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._closed and os.getpid() == self._pid:
            status = _status_of(error)
            if error is not None and status != "FINISHED":
                self.tag({"failure": first_line(error)})
            self.close(status, timeout=LAST_WORDS if status == "KILLED" else 30.0)
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

    def _at_exit(self) -> None:
        if not self._closed and os.getpid() == self._pid:
            self.tag({"failure": "the job ended without closing its run"})
            self.close("FAILED", LAST_WORDS)

    # --- the spool and its sender --------------------------------------------------------------------------------

    def _write(self, record: Record) -> None:
        try:
            self._spool.append(record)
        except (OSError, ValueError) as error:
            self._warn(f"metrics are lost: {self._spool.path} cannot be written ({first_line(error)})", "disk")

    def _warn(self, message: str, kind: str | None = None) -> None:
        """Each kind of trouble is told once."""
        if (kind or message) not in self._warned and len(self._warned) < 20:
            self._warned.add(kind or message)
            log.warning("%s", message)

    def _work(self) -> None:
        failures, pause = 0, 0.0
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                self._sender.drain()
                failures, pause, self._trouble = 0, INTERVAL, ""
                if closing:
                    break
            except Exception as error:  # stores and networks raise anything; it is tried again
                failures, self._trouble = failures + 1, first_line(error)
                pause = 0.5 if closing else min(2.0 ** (failures - 1), LONGEST_PAUSE)
                if failures == 2 and not closing:  # the first may be another job's lock on the database
                    where = f"MLflow at {scrub(tracking_uri())} cannot be reached or answers errors"
                    self._warn(f"{where} ({self._trouble}); training goes on, and what it logs is sent later", "away")
                if closing and time.monotonic() >= self._deadline:
                    break
        self._sender.release()
        self._done.set()


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _status_of(error: BaseException | None) -> Status:
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return "FINISHED"
    by_signal = isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128
    return "KILLED" if by_signal or isinstance(error, KeyboardInterrupt) else "FAILED"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user without a name
        return str(os.getuid())


def _key_of(folder: Path, run_id: str | None) -> str:
    """The key under which this folder's spool knows the run that is resumed, else a new one."""
    if run_id and run_id.startswith(PENDING):
        return run_id.removeprefix(PENDING)
    known = Sender(folder, tracking_uri(), lambda message: None).runs
    return next((key for key, known_id in known.items() if run_id == known_id), uuid.uuid4().hex[:16])


def main(arguments: list[str] | None = None) -> int:
    """`python -m mlinterf_ds.tracking FOLDER...`: send what jobs could not; 0 if everything was sent."""
    parser = argparse.ArgumentParser(prog="python -m mlinterf_ds.tracking", description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="+", help=f"a job's output folder (or one above): {SPOOL} is sent")
    options = parser.parse_args(arguments)
    bound_mlflow()
    failed = False
    for folder in options.folder:
        spools = sorted(folder.resolve().rglob(SPOOL), key=lambda path: len(path.parts))  # parents first
        if not spools:
            print(f"error: {folder}: no {SPOOL} in or below it: give a job's output folder", file=sys.stderr)
            failed = True
        for spool in spools:
            try:
                print(send_folder(spool.parent, log.warning))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                failed = True
    return int(failed)
