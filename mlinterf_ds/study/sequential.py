"""A study that adds seeds until its claims are decided or its time is over (`--until-decided HOURS`).

Every report is a look at the data. So that many looks do not decide by chance what one would not, look k is held to the level
alpha * 6 / (pi k)^2: these levels add up to alpha, so that all looks together are wrong about a claim with probability alpha at
most (Bonferroni's inequality). A claim that a look has decided stays decided.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlinterf_ds.results.findings import Finding


def level(alpha: float, look: int) -> float:
    """The level of a look, counted from 1."""
    return alpha * 6 / (math.pi * look) ** 2


@dataclass
class Looks:
    """What the looks so far have decided."""

    decided: dict[str, dict[str, object]] = field(default_factory=dict)  # claim -> verdict, look and seeds
    open: list[str] = field(default_factory=list)  # claims that more seeds could decide

    def add(self, look: int, seeds: int, findings: Sequence[Finding]) -> None:
        for row in findings:
            if row.verdict in ("holds", "fails"):
                self.decided.setdefault(row.name, {"verdict": row.verdict, "look": look, "seeds": seeds})
        self.open = [row.name for row in findings if row.open and row.name not in self.decided]


def until_decided(
    study: Callable[[list[int], float], Sequence[Finding]],
    seeds: Sequence[int],
    confidence: float,
    hours: float,
    clock: Callable[[], float] = time.monotonic,
) -> Looks:
    """Runs a study again with one more seed each time; stops where nothing is open, or another seed would exceed the hours.

    study: runs what is missing for these seeds, judges at this confidence, and returns the findings.
    """
    begin, looks, used = clock(), Looks(), list(seeds)
    for look in range(1, 1000):
        before = clock()
        looks.add(look, len(used), study(used, 1 - level(1 - confidence, look)))
        one = (clock() - before) / (len(used) if look == 1 else 1)  # the first run may have found finished seeds
        if not looks.open or clock() - begin + one > 3600 * hours:
            break
        used = [*used, max(used) + 1]
    return looks
