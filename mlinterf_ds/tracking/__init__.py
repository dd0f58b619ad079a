"""Tracking in MLflow: a `Tracker` records one run for one job. Only rank 0's tracker does anything.

Training only appends lines to `mlflow-spool.jsonl` in its output folder; a daemon thread imports MLflow and sends the lines.
So a server that is unreachable, slow or failing costs the training nothing but one warning. What could not be sent by the end
stays in the spool: `python -m mlinterf_ds.tracking FOLDER` sends it.

The address is MLflow's own MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db` in the working directory. `with tracker:` or
`close` marks the run FINISHED, FAILED or KILLED. A job ended by SIGKILL cannot mark its run: it stays RUNNING until a job
resumes it with its `run_id` and ends properly, or until the command above marks it KILLED.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import shlex
import signal
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

from mlinterf_ds.tracking.facts import (
    clean_name,
    dataset,
    environment_facts,
    first_line,
    flatten,
    scrub,
    source_tags,
    sqlite_uri,
    tidy_tags,
    tracking_uri,
)
from mlinterf_ds.tracking.spool import SPOOL, Record, Sender, SpoolWriter
from mlinterf_ds.tracking.store import PENDING, SAMPLED, SystemMetrics, set_client_defaults

__all__ = ["PENDING", "Tracker", "dataset", "environment_facts", "scrub"]

Status = Literal["FINISHED", "FAILED", "KILLED"]

log = logging.getLogger(__name__)

NOTE = "mlflow.note.content"  # tag that MLflow's browser shows as the run's description
LOCAL_UI = "http://127.0.0.1:5000"  # where `mlflow ui` listens
MAX_STEP = 2**63 - 1  # the largest step that a SQL store can hold
INTERVAL = 2.0  # seconds between two looks at the spool
LONGEST_PAUSE = 30.0  # seconds between two attempts while the server is away
CLOSING_TIMEOUT = 30.0  # seconds that a finished job waits for the server
KILLED_TIMEOUT = 10.0  # seconds that a dying job waits for the server: schedulers kill soon after they ask


class Tracker:
    """Records one run. `start` makes it on rank 0, `off` on every other rank. Only `start` can be slow; no method raises."""

    def __init__(self, folder: Path | None = None, key: str = "", run_id: str | None = None) -> None:
        self._folder = folder  # None: this tracker does nothing
        self._key, self._resumed_id = key, run_id
        self._closed = folder is None
        self._warned: set[str] = set()
        self._trouble = ""  # why the last sending failed
        self._pid = os.getpid()
        self._handled: list[signal.Signals] = []  # signals that end the job by an exception
        if folder is not None:
            folder = folder.absolute()  # the process may change its directory
            self._spool = SpoolWriter(folder, key)
            self._sender = Sender(folder, tracking_uri(), self._warn)
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
        about: str = "",
        datasets: Sequence[Mapping[str, str]] = (),
    ) -> Tracker:
        """Opens a run, or attaches to the run that a resumed job had (`run_id`: a tracker's own, `pending-...` too).

        `parameters` may be nested; credentials in them and in `tags` are hidden. `parent_id` nests the run under another.
        about: what the run is, in Markdown, until `describe` says more. datasets: what it reads (`dataset`).
        Returns at once: the run itself is created in the background, as soon as the server answers.
        """
        if not enabled:
            return cls.off()
        set_client_defaults()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tracker = cls(folder, _key_of(folder, run_id), run_id)
        except OSError as error:
            log.warning("MLflow tracking is off: %s cannot be written (%s)", folder / SPOOL, first_line(error))
            return cls.off()
        start = {
            "experiment": experiment[:500],
            "name": scrub(name),
            "parameters": flatten(parameters),
            "tags": tidy_tags(source_tags(tags) | tags | ({NOTE: about} if about and not run_id else {})),
            "datasets": [{key: scrub(value) for key, value in dataset.items()} for dataset in datasets],
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
        """MLflow's id of the run; before MLflow has the run, the resumed id or `pending-...`; None if tracking is off."""
        if self._folder is None:
            return None
        return self._sender.runs.get(self._key) or self._resumed_id or PENDING + self._key

    def browse(self) -> str:
        """How to look at the run: the command that opens MLflow's browser on a local store, or the server's address."""
        if self._folder is None:
            return ""
        run, experiment, uri = self._sender.runs.get(self._key), self._sender.store.experiment_id, tracking_uri()
        # MLflow's browser opens the half it showed last, models or generated text; the query asks for models.
        page = f"/#/experiments/{experiment}/runs/{run}?workflowType=machine_learning" if run and experiment else ""
        if not uri.startswith(("http://", "https://")):
            here = f"{sqlite_uri(Path.cwd())}/"
            shown = "sqlite:///" + uri.removeprefix(here) if uri.startswith(here) else scrub(uri)
            return f"mlflow ui --backend-store-uri {shlex.quote(shown)}  # {LOCAL_UI}{page}"
        return scrub(uri).rstrip("/") + page

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records values at a step. NaN stays NaN; infinities become NaN, because MLflow would draw them as 1.8e308."""
        if self._closed:
            return
        try:
            if not 0 <= step <= MAX_STEP:
                raise ValueError(f"step {step} is outside 0 ... 2**63 - 1")
            values = {clean_name(name): float(value) for name, value in metrics.items()}
            values = {name: value if math.isfinite(value) else math.nan for name, value in values.items()}
            if self._resumed_id is not None:  # a resumed run repeats the steps since its checkpoint
                values = {name: v for name, v in values.items() if not self._spool.was_logged(name, step, v)}
            if values:
                self._write({"step": step, "metrics": values})
        except Exception as error:  # a failed recording must not end the training
            self._warn(f"metrics were not recorded: {first_line(error)}")

    def tag(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        if not self._closed:
            self._write({"tags": tidy_tags(tags)})

    def describe(self, text: str) -> None:
        """Sets the Markdown text that MLflow's browser shows with the run; it replaces an earlier text."""
        self.tag({NOTE: text})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Adds a file or a folder to the run, under `folder`; the file must exist until `close`."""
        if self._closed or self._folder is None:
            return
        output, path = self._folder.resolve(), Path(path).resolve()
        # The path is relative where possible: a moved output folder can still be sent.
        recorded = path.relative_to(output) if path.is_relative_to(output) else path
        self._write({"artifact": str(recorded), "folder": folder})

    def close(self, status: Status = "FINISHED", timeout: float = CLOSING_TIMEOUT) -> None:
        """Ends the run and waits at most `timeout` seconds until all is sent. A second call does nothing."""
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
                "%s MLflow records could not be sent to %s%s and remain in %s. Send them with: %s",
                self._sender.unsent,
                scrub(tracking_uri()),
                f" ({self._trouble})" if self._trouble else "",
                self._spool.path,
                f"python -m mlinterf_ds.tracking {shlex.quote(str(self._folder))}",
            )

    # --- how jobs end ------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        # Python ends at once on these signals by default; an exception instead lets `__exit__` mark the run.
        in_main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGHUP):
            if self._folder is not None and in_main and signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _exit_on_signal)
                self._handled.append(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._closed and os.getpid() == self._pid:
            status = _status_of(error)
            if error is not None and status != "FINISHED":
                self.tag({"failure": first_line(error)})
            self.close(status, timeout=KILLED_TIMEOUT if status == "KILLED" else CLOSING_TIMEOUT)
        for number in self._handled:
            signal.signal(number, signal.SIG_DFL)
        self._handled = []

    def _at_exit(self) -> None:
        if not self._closed and os.getpid() == self._pid:
            self.tag({"failure": "the job ended without closing its run"})
            self.close("FAILED", KILLED_TIMEOUT)

    # --- the spool and the thread that sends it ------------------------------------------------------------------

    def _write(self, record: Record) -> None:
        try:
            self._spool.append(record)
        except (OSError, ValueError) as error:
            self._warn(f"metrics are lost: {self._spool.path} cannot be written ({first_line(error)})", "disk")

    def _warn(self, message: str, kind: str | None = None) -> None:
        """Logs a warning, once for each message or kind of trouble, and at most 20 in all."""
        if (kind or message) not in self._warned and len(self._warned) < 20:
            self._warned.add(kind or message)
            log.warning("%s", message)

    def _work(self) -> None:
        """Sends the spool every INTERVAL seconds, and less often while that fails, until the tracker is closed."""
        failures, pause, sampled = 0, 0.0, time.monotonic()
        system: SystemMetrics | None = None
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                self._sender.drain()
                failures, pause, self._trouble = 0, INTERVAL, ""
                if closing:
                    break
                if time.monotonic() >= sampled + SAMPLED:
                    sampled, system = time.monotonic(), system or SystemMetrics()
                    if values := system.sample():
                        self._write({"step": system.samples, "metrics": values})
            except Exception as error:  # MLflow and networks raise many classes; the sending is tried again
                failures, self._trouble = failures + 1, first_line(error)
                pause = 0.5 if closing else min(2.0 ** (failures - 1), LONGEST_PAUSE)
                if failures == 2 and not closing:  # a first failure may be another job's lock on the database
                    server = f"MLflow at {scrub(tracking_uri())} cannot be reached or answers errors"
                    self._warn(
                        f"{server} ({self._trouble}); training continues, and its records are sent later", "away"
                    )
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


def _key_of(folder: Path, run_id: str | None) -> str:
    """The key that the resumed run has in this folder's spool, or a new key."""
    if run_id and run_id.startswith(PENDING):
        return run_id.removeprefix(PENDING)
    runs = Sender(folder, tracking_uri(), lambda message: None).runs
    return next((key for key, known_id in runs.items() if run_id == known_id), uuid.uuid4().hex[:16])
