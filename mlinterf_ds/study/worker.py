"""Inside a job's processes: its units, one after the other, in one process group.

<job>/job.json    what to run, written by the study
<job>/done.json   what became of each unit: {"units": {name: {"state", "reason", "seconds"}}}

A unit that is finished is not run again, one that was interrupted goes on from its checkpoint. On one rank a unit that fails
is noted and the next one runs; with more ranks the job ends, since the ranks may have parted ways.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlinterf_ds import ranks
from mlinterf_ds.files import read_json, write_json
from mlinterf_ds.study.code import RECIPES
from mlinterf_ds.tracking.facts import first_line

DONE = "done.json"
STARTED = "MLINTERF_STUDY_STARTED"  # variable: when the launcher was started, seconds since the epoch


def work(folder: Path) -> int:
    """Run the job of a folder on this rank; 1 if a unit failed."""
    from mlinterf_ds.runtime import parallel

    job, first = read_json(folder / "job.json"), os.environ.get("RANK", "0") == "0"
    started, busy = float(os.environ.get(STARTED, time.time())), 0.0
    with only_here(folder, int(os.environ.get("RANK", "0"))):
        units = read_done(folder)  # after waiting: it may be another process that wrote it
        with parallel.together(job["tensor"]) as layout:
            for unit in job["units"]:
                if finished(folder / unit["name"]):
                    continue
                clock = time.time()
                facts: dict[str, Any] = {"state": "finished"}
                try:
                    _run(job["kind"], folder / unit["name"], unit["arguments"])
                    if not finished(folder / unit["name"]):
                        return 1  # asked to end: the next start goes on
                except Exception as error:  # whatever a unit fails of, the others go on
                    facts = {"state": "failed", "reason": first_line(error)}
                    if layout.world > 1:
                        raise
                busy += time.time() - clock
                units[unit["name"]] = facts | {"seconds": round(time.time() - clock, 2)}
                if first:
                    write_json(folder / DONE, {"units": units})
        if first and busy:
            total = time.time() - started
            write_json(folder / DONE, {"units": units, "seconds": round(total, 2), "startup": round(total - busy, 2)})
    return int(any(facts["state"] == "failed" for facts in units.values()))


def _run(kind: str, folder: Path, arguments: list[str]) -> None:
    main: Callable[[list[str]], int] = importlib.import_module(RECIPES[kind]).main
    if kind == "analyze":
        ranks.agreed(lambda: _remove(folder))  # a half-done one can't be continued
    main([*arguments, "--set", f"output={folder}", *(["--set", "resume=auto"] if kind != "analyze" else [])])
    if kind == "finetune":  # its scores and predictions are what a study needs
        ranks.together()  # none reads them any more
        ranks.agreed(lambda: _remove(*folder.glob("seed*/checkpoints")))


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def finished(folder: Path) -> bool:
    """Whether a unit's summary is there and says so."""
    try:
        return bool(json.loads((folder / "summary.json").read_text()).get("finished", True))
    except (OSError, ValueError):
        return False


def read_done(folder: Path) -> dict[str, Any]:
    """What became of the job's units so far; those that failed are tried again."""
    try:
        units = read_json(folder / DONE)["units"]
    except (OSError, ValueError, KeyError):
        return {}
    return {name: facts for name, facts in units.items() if facts["state"] == "finished"}


@contextlib.contextmanager
def only_here(folder: Path, rank: int = 0) -> Iterator[None]:
    """Wait for another process that still works on the job: a study that was killed leaves its jobs running.

    Each rank waits for its like, before any of them waits for the others in a process group, which has a time limit.
    """
    with (folder / (f".lock{rank}" if rank else ".lock")).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
