"""The spool of a tracked run: a file of JSON lines in the job's output folder, written by the job and sent to MLflow.

Each line is one record `{"run": KEY, "t": milliseconds, ...}` with one of `start`, `metrics` (and `step`), `tags`,
`artifact`, `end`. The tracker makes up KEY, because the run exists in the spool before MLflow gives it an id.

`mlflow-spool.sent` beside the spool says how far the sending got. A crash between MLflow's answer and this note sends a
batch twice: the same points with the same timestamps, which MLflow's database stores keep once. KEY is also a tag of
MLflow's run, so that a run whose creation was not answered is recognised and not created twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from mlinterf_ds.files import write_bytes
from mlinterf_ds.tracking.facts import first_line, scrub
from mlinterf_ds.tracking.store import NotYet, Store, error_code

SPOOL = "mlflow-spool.jsonl"
SENT = "mlflow-spool.sent"
LINES_PER_READ = 2000

Record = dict[str, Any]


def read_spool(path: Path, offset: int = 0, lines: int | None = None) -> Iterator[tuple[int, Record | None]]:
    """Yields, for each complete line from byte `offset` on, the offset after it and its record (None if damaged)."""
    with open(path, "rb") as file:
        file.seek(offset)
        for line in itertools.islice(file, lines):
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            yield offset, record if isinstance(record, dict) and "run" in record and "t" in record else None


class SpoolWriter:
    """Appends the records of one run, from any thread."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path, self.key = folder / SPOOL, key
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the run)
        self._lock = threading.Lock()
        # A line cut short by a crash or a full disk must not swallow the next one.
        self._torn = self.path.stat().st_size > 0 and not _ends_in_newline(self.path)
        self._earlier: dict[tuple[str, int], float] | None = None

    def append(self, record: Record) -> None:
        """Writes one line. Raises OSError or ValueError if it could not be written whole."""
        stamped = {"run": self.key, "t": int(time.time() * 1000)} | record
        data = json.dumps(stamped, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock:
            data = b"\n" + data if self._torn else data
            self._torn = True
            if (self._file.write(data) or 0) < len(data):
                raise OSError("the disk is full")
            self._torn = False

    def was_logged(self, name: str, step: int, value: float) -> bool:
        """Whether an earlier process of this run logged this very point: a resumed run repeats some steps.

        The first call reads the spool and keeps the points from its `step` on; a run repeats none of the steps before.
        """
        if self._earlier is None:
            self._earlier = {}
            for _, record in read_spool(self.path):
                if record and record["run"] == self.key and record.get("step", -1) >= step:
                    self._earlier |= {(metric, record["step"]): v for metric, v in record["metrics"].items()}
        earlier = self._earlier.get((name, step))
        return earlier is not None and (earlier == value or (math.isnan(earlier) and math.isnan(value)))

    def close(self) -> None:
        """Closes the file; a later `append` raises ValueError."""
        self._file.close()


def _ends_in_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


class Sender:
    """Sends the spool of one folder to MLflow: in order, in batches, each record once. One thread at a time uses it."""

    def __init__(self, folder: Path, uri: str, warn: Callable[[str], None]) -> None:
        self.folder, self.path, self.warn = folder, folder / SPOOL, warn
        self.store = Store(uri, folder, warn)
        self.offset = 0  # bytes of the spool that MLflow has
        self.runs: dict[str, str] = {}  # MLflow's id of each run, by the spool's key
        self.postponed: list[Record] = []  # artifacts that failed: they must not hold up the metrics behind them
        self._restarted = False  # whether the spool was sent anew from its first line
        self._lock: IO[bytes] | None = None
        self._load()

    @property
    def unsent(self) -> int:
        """How many records MLflow does not have yet."""
        lines = read_spool(self.path, self.offset) if self.path.exists() else ()
        return len(self.postponed) + sum(1 for _, record in lines if record)

    def drain(self) -> None:
        """Sends all that the spool holds now. Raises what went wrong, after noting what was sent until then."""
        self._acquire()
        while lines := list(read_spool(self.path, self.offset, LINES_PER_READ)):
            for _, group in itertools.groupby(lines, _batch_of):
                batch = list(group)
                try:
                    self._send([record for _, record in batch if record])
                except Exception as error:  # MLflow's stores raise many classes; their code tells a missing run
                    if error_code(error) != "RESOURCE_DOES_NOT_EXIST" or self._restarted:
                        raise
                    # The server came back with an empty database: the spool is sent again from its first line.
                    self._restarted, self.offset, self.runs = True, 0, {}
                    break
                self.offset = batch[-1][0]
                self._save()
        postponed, self.postponed = self.postponed, []
        for record in postponed:
            self._send_artifact(record)
        self._save()
        if self.postponed:
            raise NotYet(self.postponed[0]["why"])

    def release(self) -> None:
        """Lets another process send this spool."""
        if self._lock:
            self._lock.close()
            self._lock = None

    # --- what was sent -------------------------------------------------------------------------------------------

    def _load(self) -> None:
        # Nothing counts as sent if the note is missing or damaged, or is of another server or another spool.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads((self.folder / SENT).read_text("utf-8"))
            if state["uri"] == scrub(self.store.uri) and state["offset"] <= self.path.stat().st_size:
                self.offset, self.runs, self.postponed = state["offset"], state["runs"], state["later"]

    def _save(self) -> None:
        state = {"uri": scrub(self.store.uri), "offset": self.offset, "runs": self.runs, "later": self.postponed}
        with contextlib.suppress(OSError):  # on a full disk a batch may be sent twice, and MLflow keeps it once
            write_bytes(self.folder / SENT, json.dumps(state).encode())

    def _acquire(self) -> None:
        if self._lock:
            return
        lock = open(self.path, "r+b")  # noqa: SIM115 (held until release; NFS locks only what may be written)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise NotYet(f"another process is sending {self.path}") from None
        except OSError:
            pass  # a file system without locks
        self._lock = lock
        self._load()  # another process may have sent something meanwhile

    # --- one record, or neighbouring metrics of one run ------------------------------------------------------------

    def _send(self, records: list[Record]) -> None:
        if not records:
            return
        first, key = records[0], records[0]["run"]
        run_id = self.runs.get(key)
        if "start" in first:
            self.runs[key] = self.store.open_run(key, run_id, first["t"], first["start"])
        elif run_id is None or run_id in self.store.deleted:
            return  # its `start` was lost with a damaged line, or somebody deleted the run
        elif "metrics" in first:
            self.store.log(run_id, records)
        elif "tags" in first:
            self.store.log(run_id, tags=first["tags"])
        elif "artifact" in first:
            self._send_artifact(first)
        elif "end" in first:
            self.store.client.set_terminated(run_id, first["end"], first["t"])

    def _send_artifact(self, record: Record) -> None:
        path, run_id = self.folder / record["artifact"], self.runs.get(record["run"])
        if not path.exists() or run_id is None:
            return self.warn(f"{path} no longer exists: it could not be added to the MLflow run")
        try:
            self.store.log_artifact(run_id, path, record.get("folder"))
        except Exception as error:  # artifact storages raise many classes; the upload is tried again later
            self.postponed.append(record | {"why": first_line(error)})
        return None


def _batch_of(line: tuple[int, Record | None]) -> tuple[str, str] | int:
    """A key that neighbouring lines share if one request can send them: metrics of one run; other lines go alone."""
    offset, record = line
    return (record["run"], "metrics") if record and "metrics" in record else offset
