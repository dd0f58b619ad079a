"""The inside of a job's processes: its units, one after the other, in one process group.

A finished unit is not run again, and an interrupted one resumes from its checkpoint. On one rank a failure is noted and the next
unit runs. With more ranks it ends the job, because the ranks may have stopped at different collectives.
"""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlinterf_ds import ranks
from mlinterf_ds.files import read_json, write_json
from mlinterf_ds.study.folders import DONE, finished_units, is_complete, wait_for_lock
from mlinterf_ds.study.jobs import COMMANDS
from mlinterf_ds.tracking.facts import first_line

if TYPE_CHECKING:
    from mlinterf_ds.runtime.parallel import Group

STARTED = "MLINTERF_STUDY_STARTED"  # environment variable: when the launcher was started, in seconds since the epoch


def work(folder: Path) -> int:
    """Run the job of a folder on this rank; 1 if a unit failed or the job was asked to end."""
    from mlinterf_ds.runtime.session import own_group
    from mlinterf_ds.sections import ParallelConfig

    job, rank = read_json(folder / "job.json"), int(os.environ.get("RANK", "0"))
    started, busy = float(os.environ.get(STARTED, time.time())), 0.0
    with wait_for_lock(folder, rank):
        units = finished_units(folder)  # only now: another process may have worked on the job until the lock was free
        with own_group(ParallelConfig(tensor=job["tensor"])) as group:
            for unit in job["units"]:
                name, begin = unit["name"], time.monotonic()
                if ranks.from_first(
                    is_complete(folder / name)
                ):  # the first rank writes what the others would look for too early
                    continue
                facts: dict[str, Any] = {"state": "finished"}
                try:
                    _run(job["kind"], folder / name, unit["arguments"], group)
                    if not ranks.from_first(is_complete(folder / name)):
                        return 1  # the run was asked to end, and the next start of the job resumes it
                except Exception as error:  # whatever it is, the other units can run
                    facts = {"state": "failed", "reason": first_line(error)}
                    if group.world > 1:
                        raise
                busy += time.monotonic() - begin
                units[name] = facts | {"seconds": round(time.monotonic() - begin, 2)}
                if rank == 0:
                    write_json(folder / DONE, {"units": units})
        if rank == 0 and busy:
            total = max(busy, time.time() - started)  # a clock may be set back
            times = {"seconds": round(total, 2), "startup": round(total - busy, 2)}
            write_json(folder / DONE, {"units": units} | times)
    return int(any(facts["state"] == "failed" for facts in units.values()))


def _run(kind: str, folder: Path, arguments: list[str], group: Group) -> None:
    """Run a unit with its command. A fine-tuning's checkpoints are removed: a study needs its scores and predictions alone."""
    main: Callable[[list[str], Group], int] = importlib.import_module(COMMANDS[kind]).main
    if kind == "analyze":
        ranks.agreed(lambda: _remove(folder))  # an interrupted analysis can't be resumed
    main([*arguments, "--set", f"output={folder}", *(["--set", "resume=auto"] if kind != "analyze" else [])], group)
    if kind == "finetune":
        ranks.wait_for_all()  # all ranks have read their checkpoints
        ranks.agreed(lambda: _remove(*folder.glob("seed*/checkpoints")))


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
