"""`bench.py languages`: the time of a step with 100 languages over that of a step with two, on two ranks."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from typing import Any

from tools.bench.engines import CODES, build, meta_step, plain_step, start
from tools.bench.timing import Work, interleaved, ratio


def measure(options: argparse.Namespace) -> dict[str, Any]:
    context, folder = multiprocessing.get_context("spawn"), tempfile.mkdtemp()
    receive, send = context.Pipe(duplex=False)
    ranks = [context.Process(target=_rank, args=(rank, options, folder, send)) for rank in range(2)]
    for process in ranks:
        process.start()
    while not receive.poll(1.0):
        if any(process.exitcode for process in ranks):
            sys.exit("error: a rank failed; the reason is printed above")
    result: dict[str, Any] = receive.recv()
    for process in ranks:
        process.join()
    return result


def _rank(rank: int, options: argparse.Namespace, folder: str, send: Any) -> None:
    """Measures on one of the two ranks; rank 0 sends the result."""
    start(rank, 2, folder, options.threads)
    result: dict[str, Any] = {}
    for ds in ("zero1", "zero2"):
        work: Work = {}
        for count in (2, 100):
            some = ["meta.languages_per_step=4"] if count > 2 else []
            settings = ["variant=meta_adpt", "meta.check_every=0", *some]
            engine, config, train, validation = build(options, CODES[:count], "tiny", settings, ds)
            batches = train(0)
            work[f"plain {count}"] = plain_step(engine, batches)
            work[f"meta {count}"] = meta_step(engine, config.meta, batches, validation(0))
        seconds = interleaved(work, options.rounds)
        for kind in ("plain", "meta"):
            result[f"{ds} {kind}: 100 languages in steps of 2"] = ratio(seconds[f"{kind} 100"], seconds[f"{kind} 2"])
    if rank == 0:
        send.send(result)
