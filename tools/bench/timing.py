"""Times pieces of work side by side and compares them by ratios, so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
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
