"""Worker processes that map a function over a stream of tasks: results in order, bounded memory, no process left over."""

import ctypes
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mlinterf_ds.errors import UserError, warn

Task = TypeVar("Task")
Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1


class WorkerKilled(UserError):
    """A worker process was killed. The blocks it had finished are on disk."""


class Workers:
    """`count` worker processes; if `count` is 1, this process does the work.

    The processes are forked, so that they start at once and need no importable main module. That is safe because the
    functions they run use numpy and SentencePiece only.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            try:
                self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _die_with_parent)
            except OSError as error:  # no semaphore can be made
                warn(
                    f"/dev/shm, which {count} processes need, cannot be used ({error.strerror}): one process does the work"
                )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Yields results in the order of the tasks, and takes only a few tasks ahead of the results asked for. Raises the
        function's own errors, and WorkerKilled if a process was killed."""
        if self._pool is None:
            yield from map(function, tasks)
            return
        running: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                running.append(self._pool.submit(function, task))
                if len(running) > 2 * self._count:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool:
            raise WorkerKilled(
                "a worker process was killed, most likely because memory ran out; run the same command again with "
                "fewer workers: finished blocks are kept"
            ) from None


def _die_with_parent() -> None:
    """Makes this worker ignore interrupts and end with its parent (on Linux; elsewhere it stays, idle, if the parent is
    killed)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
