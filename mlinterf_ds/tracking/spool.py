"""The spool of a tracked run: an append-only file of JSON lines in the job's output folder.

Each line is one record `{"run": KEY, "t": milliseconds, ...}` with one of `start`, `metrics` (and `step`), `tags`,
`artifact`, `end`. KEY is ours, so that it is known before MLflow's run id.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPOOL = "mlflow-spool.jsonl"

Record = dict[str, Any]


def read_spool(path: Path, offset: int = 0, lines: int | None = None) -> Iterator[tuple[int, Record | None]]:
    """(offset after the line, its record or None if damaged) of each complete line from `offset` on."""
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
    """Appends one run's records, from any thread."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path, self.key = folder / SPOOL, key
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (lives as long as the run)
        self._lock = threading.Lock()
        # A line cut short by a crash or a full disk must not swallow the next one.
        self._torn = self.path.stat().st_size > 0 and not _ends_in_newline(self.path)
        self._earlier: dict[tuple[str, int], float] | None = None

    def append(self, record: Record) -> None:
        """Write one line; OSError or ValueError if it could not be."""
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

        The spool is read once, at the first step asked for: what lies before it is not repeated.
        """
        if self._earlier is None:
            self._earlier = {}
            for _, record in read_spool(self.path):
                if record and record["run"] == self.key and record.get("step", -1) >= step:
                    self._earlier |= {(known, record["step"]): v for known, v in record["metrics"].items()}
        old = self._earlier.get((name, step))
        return old is not None and (old == value or (math.isnan(old) and math.isnan(value)))

    def close(self) -> None:
        self._file.close()


def _ends_in_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
