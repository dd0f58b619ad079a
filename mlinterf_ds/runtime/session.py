"""How every run of a command starts and ends on a rank: process group, output folder, log, failures."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlinterf_ds.errors import UserError, warn
from mlinterf_ds.ranks import agreed, from_first
from mlinterf_ds.runtime.output import hushed, quiet, remove_stale_locks, writing
from mlinterf_ds.runtime.parallel import Group, Layout
from mlinterf_ds.runtime.program import noted
from mlinterf_ds.sections import ParallelConfig


@dataclass(frozen=True)
class Session:
    """One run of a command on this rank: its layout, folder and log."""

    layout: Layout
    output: Path  # the run's folder
    log: Path  # this rank's log, for messages that are not meant for the screen

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints, writes and records."""
        return self.layout.rank == 0


@contextlib.contextmanager
def own_group(parallel: ParallelConfig) -> Iterator[Group]:
    """A process group that lasts as long as the context."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        remove_stale_locks()
    with hushed():
        group = Group(parallel.tensor, timeout=parallel.timeout)
    try:
        yield group
    except BaseException:
        if not group.waits_to_leave:  # else a rank that fails alone would wait for those that it should end
            group.leave()
        raise
    group.leave()


@contextlib.contextmanager
def in_group(group: Group | None, parallel: ParallelConfig) -> Iterator[Layout]:
    """The layout of a run's ranks in the group that this process has joined, or else in a group of the run's own."""
    with contextlib.nullcontext(group) if group else own_group(parallel) as joined:
        yield joined.layout(parallel.tensor)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """A context in which this process holds the file `lock`. UserError if another does, which writes to the run's folder.

    Processes that this one forks do not hold it, and a file system without locks lets everybody in.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f"output={lock.parent.parent}: another run is writing there: wait for it, or name another folder, --set output=FOLDER"
                ) from None
            warn(f"{lock}: this file system has no locks: see that no two programs write to this folder at once")
        yield


@contextlib.contextmanager
def session(
    name: str,
    output: str | None,
    parallel: ParallelConfig,
    refuse: Callable[[Path], None],
    group: Group | None = None,
) -> Iterator[Session]:
    """A run in the folder `output` (default: runs/<name>-<time>), whose failures are noted in this rank's log.

    refuse: raises UserError where the folder holds something that the run would spoil. group: a process group joined before the
    run and kept after it; without it the run has a group of its own.
    """

    def prepare() -> None:
        refuse(folder)
        with writing(folder):
            held.enter_context(alone(log.with_name("lock")))
            log.with_name("failed").unlink(missing_ok=True)  # an earlier attempt may have left it

    with in_group(group, parallel) as layout, contextlib.ExitStack() as held:
        folder = Path(output or from_first(f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"))
        log, is_new = folder / "log" / f"rank-{layout.rank}.log", not folder.exists()
        agreed(prepare)
        quiet(log)
        try:
            with noted(log):
                yield Session(layout, folder, log)
        except UserError:
            if layout.rank == 0 and is_new and os.listdir(folder) == [log.parent.name]:
                shutil.rmtree(folder)  # the run was refused before it wrote anything
            raise
