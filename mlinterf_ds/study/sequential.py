"""A study that adds seeds until its claims are decided or its time is over (`--until-decided HOURS`).

Every report is a look at the data. So that many looks do not decide by chance what one would not, look k is held to the level
alpha * 6 / (pi k)^2: these levels add up to alpha, so that all looks together are wrong about a claim with probability alpha at
most (Bonferroni's inequality). A claim that a look has decided stays decided.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlinterf_ds.results.findings import Finding


def level(alpha: float, look: int) -> float:
    """The level of a look, counted from 1."""
    return alpha * 6 / (math.pi * look) ** 2


Decided = dict[str, dict[str, Any]]  # claim -> the verdict, and the look and the number of seeds that gave it


def settled(findings: Sequence[Finding], decided: Decided) -> list[Finding]:
    """The findings of a look with the verdicts that earlier looks have given."""
    results = []
    for row in findings:
        if earlier := decided.get(row.name):
            note = f"decided at look {earlier['look']}, with {earlier['seeds']} seeds"
            note = "; ".join(filter(None, [note, row.note]))
            row = replace(row, verdict=earlier["verdict"], reason="", open=False, note=note)
        results.append(row)
    return results


@dataclass
class Looks:
    """What the looks so far have decided."""

    decided: Decided = field(default_factory=dict)
    open: list[str] = field(default_factory=list)  # claims that more seeds could decide

    def add(self, look: int, seeds: int, findings: Sequence[Finding]) -> None:
        for row in findings:
            if row.verdict in ("holds", "fails"):
                self.decided.setdefault(row.name, {"verdict": row.verdict, "look": look, "seeds": seeds})
        self.open = [row.name for row in findings if row.open and row.name not in self.decided]


def until_decided(
    study: Callable[[list[int], float, Decided], Sequence[Finding]],
    seeds: Sequence[int],
    confidence: float,
    hours: float,
    record: Callable[[Looks, list[int], float], None] = lambda looks, seeds, confidence: None,
    clock: Callable[[], float] = time.monotonic,
) -> Looks:
    """Runs a study again with one more seed each time; stops where nothing is open, or another seed would exceed the hours.

    study: runs what is missing for these seeds, judges at this confidence, reports, and returns the findings; the report is to show
    what earlier looks have decided (`settled`). record: keeps what the looks so far have decided, and the last one's seeds and
    confidence.
    """
    begin, looks, used = clock(), Looks(), list(seeds)
    for look in range(1, 1000):
        before = clock()
        at = 1 - level(1 - confidence, look)
        looks.add(look, len(used), study(used, at, looks.decided))
        record(looks, used, at)
        one = (clock() - before) / (len(used) if look == 1 else 1)  # the first run may have found finished seeds
        if not looks.open or clock() - begin + one > 3600 * hours:
            break
        used = [*used, max(used) + 1]
    return looks
