"""The paper's claims as hypotheses: what a finding is, how it is made from a study's records, and how it is shown.

An effect is a difference that the claim says is positive, one value a seed, averaged over the languages and tasks that both
sides have, in points of a score unless stated otherwise. A claim holds if Student's interval over the paired seeds lies above
0, fails if it lies below, and is undecided otherwise; with a single seed it is always undecided.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlinterf_ds.results import paper
from mlinterf_ds.results.records import Records, TaskScore
from mlinterf_ds.results.statistics import Effect, Verdict, paired, positive, student_effect

PerSeed = dict[int, float]  # pretraining seed -> difference


@dataclass(frozen=True)
class Finding:
    """A claim and what a study says of it."""

    name: str
    claim: str
    unit: str
    verdict: Verdict
    effect: Effect
    beside: dict[str, float] = field(default_factory=dict)  # mean scores and floors to see the effect beside
    parts: dict[str, float] = field(default_factory=dict)  # the effect by task, language or rival
    note: str = ""

    def row(self) -> dict[str, Any]:
        """As JSON, with None for what is unknown."""
        numbers = asdict(self.effect) | {"size": self.effect.size}
        known = {key: x if not isinstance(x, float) or math.isfinite(x) else None for key, x in numbers.items()}
        return asdict(self) | {"effect": known}


# --- paired differences ------------------------------------------------------------------------------------------------
def differences(left: Sequence[TaskScore], right: Sequence[TaskScore]) -> PerSeed:
    """Left minus right at the seeds that both have."""
    pairs = paired(*({score.seed: score.score for score in side} for side in (left, right)))
    return {seed: a - b for seed, (a, b) in pairs.items()}


def averaged(parts: Iterable[PerSeed]) -> PerSeed:
    """The mean over parts at the seeds that all of them have; parts without any seed are left out."""
    known = [part for part in parts if part]
    seeds = set.intersection(*(set(part) for part in known)) if known else set()
    return {seed: statistics.fmean(part[seed] for part in known) for seed in sorted(seeds)}


def cells(records: Records) -> list[tuple[str, str, str]]:
    """(task, target language, pair set) of the tables."""
    return [(task, language, group) for task in records.tasks for language, group in records.targets.items()]


def compared(records: Records, left: str, right: str, setting: str) -> dict[str, PerSeed]:
    """Task and language -> differences of two rows of the tables."""
    return {
        f"{cell[0]} {cell[1]}": differences(*(records.pick(row, setting, *cell) for row in (left, right)))
        for cell in cells(records)
    }


def finding(
    records: Records, name: str, claim: str, parts: dict[str, PerSeed], *, unit: str = "points", note: str = "",
    beside: dict[str, float] | None = None, judge: Callable[[Effect], Verdict] = positive,
) -> Finding:  # fmt: skip
    """Judges a claim by the mean of its parts; the note says if there are no records for it, or a single seed."""
    effect = student_effect(list(averaged(parts.values()).values()), records.confidence)
    if len(effect.values) < 2:
        lack = "one seed gives no interval" if effect.values else "this study has no records for it"
        note = f"{lack}; {note}" if note else lack
    means = {key: statistics.fmean(part.values()) for key, part in parts.items() if part}
    return Finding(name, claim, unit, judge(effect), effect, beside or {}, means, note)


def mean_scores(records: Records, rows: Sequence[str], setting: str) -> dict[str, float]:
    """Mean scores of rows of the tables, and of the floors: guessing, and zero-shot a model that never saw the language.

    The means are over the tasks and targets that all rows have, so that they compare. Rows without any score are left out.
    """
    rows = [*rows, "unseen"] if setting == paper.ZERO_SHOT else rows
    scores = [{row: records.pick(row, setting, *cell) for row in rows} for cell in cells(records)]
    present = [row for row in rows if any(of_cell[row] for of_cell in scores)]
    common = [of_cell for of_cell in scores if all(of_cell[row] for row in present)]
    if not present or not common:
        return {}
    means = {
        row: statistics.fmean(statistics.fmean(s.score for s in of_cell[row]) for of_cell in common) for row in present
    }
    return means | {"majority": statistics.fmean(of_cell[present[0]][0].majority for of_cell in common)}


# --- as text -----------------------------------------------------------------------------------------------------------
def markdown(findings: Sequence[Finding], confidence: float) -> str:
    """A table of all findings with the scores that they are to be seen beside."""
    lines = [f"| claim | verdict | effect | {confidence:.0%} interval | d | seeds | beside |", "|---" * 7 + "|"]
    for row in findings:
        beside = ", ".join(f"{name} {value:.1f}" for name, value in row.beside.items())
        notes = "; ".join(text for text in (beside, row.note) if text)
        numbers, seeds = " | ".join(interval(row)), len(row.effect.values)
        lines.append(f"| {row.claim} | **{row.verdict}** | {numbers} | {seeds} | {notes} |")
    return "\n".join([*lines, "", caution(len(findings), confidence)]) + "\n"


def caution(count: int, confidence: float) -> str:
    """What a reader of many intervals must know."""
    return (
        f"The intervals are not corrected for there being {count} of them: of effects that are zero, "
        f"{1 - confidence:.0%} are still told apart from it."
    )


def interval(finding: Finding) -> tuple[str, str, str]:
    """The effect, its interval and its size as text; empty where unknown."""
    effect, digits = finding.effect, 1 if finding.unit == "points" else 3
    if not effect.values:
        return "", "", ""
    span = f"{effect.low:+.{digits}f} to {effect.high:+.{digits}f}" if effect.has_interval else ""
    size = f"{effect.size:.1f}" if math.isfinite(effect.size) else ""
    return f"{effect.mean:+.{digits}f} {finding.unit}", span, size
