"""Times pieces of work side by side and compares them by ratios, so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

Work = dict[str, Callable[[], Any]]  # name -> the function that is timed


def interleaved(work: Work, rounds: int) -> dict[str, list[float]]:
    """Seconds of each piece of work in each round; all of them run once per round, after one round to warm up."""
    from deepspeed.accelerator import get_accelerator

    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            get_accelerator().synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
        print(f"round {number}/{rounds}", end="\r", file=sys.stderr)
    return seconds


def ratio(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Median and range of the ratio over the rounds; both times of a ratio come from the same round."""
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def busy_seconds(run: Callable[[], Any]) -> float | None:
    """Seconds of one run in which the accelerator computes or copies, whatever the host does; None on a CPU.

    Seconds of the run beyond these are the host's: launches that come too late, and waiting for results.
    """
    from deepspeed.accelerator import get_accelerator
    from torch import profiler

    if get_accelerator().device_name() != "cuda":
        return None
    run()
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as recorded:
        run()
        get_accelerator().synchronize()
    events = recorded.profiler.kineto_results.events()
    spans = sorted((event.start_ns(), event.end_ns()) for event in events if event.device_type().name == "CUDA")
    return covered(spans) / 1e9


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """The length that (begin, end) spans, sorted by their beginnings, cover together."""
    length, reached = 0, -(1 << 62)
    for begin, end in spans:
        length += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return length


def busy_shares(work: Work, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """How much of each piece of work's median time the accelerator is busy; nothing on a CPU."""
    busy = {name: busy_seconds(run) for name, run in work.items()}
    shares = {name: own / statistics.median(seconds[name]) for name, own in busy.items() if own is not None}
    return {"share of the time in which the device is busy": shares} if shares else {}
