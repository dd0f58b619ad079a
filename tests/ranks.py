"""A pool of ranks for multi-rank tests: imports are paid once, every job has a timeout.

`pool(2).run(function, *arguments)` calls `function(layout-free arguments)` on both ranks, each of which has joined one
process group, and returns the results in rank order. A failure on any rank is raised with its traceback; a job that
outlives its timeout, or fails on one of several ranks, costs the pool its processes (the next job starts new ones). Ranks are
forked from a server process that has imported what a run needs, and nothing more: no threads, no groups.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

IMPORTED = ["mlinterf_ds.pretrain.main", "mlinterf_ds.finetune.main", "mlinterf_ds.evaluate"]  # by the server
TIMEOUT = 400.0  # seconds; a test may take 600

_group: Any = None  # on a rank of a pool: the process group that it has joined


def joined() -> Any:
    """On a rank of a pool: its process group, which the runs of all tests share."""
    assert _group, "not on a rank of a pool"
    return _group


def laid_out(tensor: int) -> Any:
    """On a rank of a pool: the layout of its ranks with this tensor-parallel size."""
    return joined().layout(tensor)


def _serve(rank: int, world: int, address: str, pipe: Connection) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    os.environ["OMP_NUM_THREADS"] = "1"
    global _group
    from mlinterf_ds.runtime.parallel import Group

    _group = Group(1, address)
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def preloaded() -> Any:
    """The start method of the pool's ranks, for other processes that need the same imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


class Pool:
    """`world` processes in one process group."""

    def __init__(self, world: int):
        self.world = world
        self.processes: list[Any] = []

    def _start(self) -> None:
        context = preloaded()
        address = "file://" + str(Path(tempfile.mkdtemp()) / "rendezvous")
        self.pipes: list[Connection] = []
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, address, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
        if not self.processes:
            self._start()
            timeout += 120
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        import time

        deadline = time.monotonic() + timeout
        while len(results) < self.world:
            left = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = wait(left, max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                raise TimeoutError(f"{function.__name__} on {self.world} ranks: no answer within {timeout:.0f} s")
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    done, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self.stop()
                    done, value = False, "the process died"
                if not done:
                    if self.world > 1:  # the other ranks may wait in a collective
                        self.stop()
                    raise AssertionError(f"rank {rank} of {self.world} in {function.__name__}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world)]


_pools: dict[int, Pool] = {}


def pool(world: int) -> Pool:
    """The shared pool of this size."""
    if world not in _pools:
        _pools[world] = Pool(world)
        atexit.register(_pools[world].stop)
    return _pools[world]
