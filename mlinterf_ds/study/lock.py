"""Locks on the folder of a study or of a job, so that two processes never write there at once."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from mlinterf_ds.runtime.output import writing


@contextlib.contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Hold the folder if no other process does; whether it is held. UserError if it can't be written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def wait_for_lock(folder: Path, rank: int = 0) -> Iterator[None]:
    """Hold a job's folder on this rank, after any other process that does: a killed study leaves its jobs running.

    Each rank waits for the same rank of the other process, and does so before the ranks wait for each other in a process
    group, where waiting has a time limit.
    """
    with (folder / (f".lock{rank}" if rank else ".lock")).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
