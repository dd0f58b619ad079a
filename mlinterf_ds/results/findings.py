"""The paper's claims as hypotheses, tested on a study's records: pure functions, one verdict each.

An effect is a difference that the claim says is positive, one value a seed (averaged over the languages and tasks that both
sides have), in points of a score unless stated otherwise. A claim holds if the interval over the paired seeds lies above
0, fails if it lies below, and is undecided otherwise, so also with a single seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlinterf_ds.results import paper
from mlinterf_ds.results.records import Records, Score
from mlinterf_ds.results.statistics import Effect, Verdict, effect, positive
from mlinterf_ds.results.tables import pick, targets

PerSeed = dict[int, float]


@dataclass(frozen=True)
class Finding:
    """A claim and what this study says of it."""

    name: str
    claim: str
    unit: str
    verdict: Verdict
    effect: Effect
    beside: dict[str, float] = field(default_factory=dict)  # scores and floors that the effect is to be seen beside
    parts: dict[str, float] = field(default_factory=dict)  # the effect by task, language or rival
    note: str = ""

    def row(self) -> dict[str, Any]:
        """As JSON, with None for what is unknown."""
        found = asdict(self)
        found["effect"] = {
            k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in found["effect"].items()
        }
        return found


# --- paired differences ------------------------------------------------------------------------------------------------
def differences(ours: Sequence[Score], theirs: Sequence[Score]) -> PerSeed:
    """Ours minus theirs at the seeds that both have."""
    other = {s.seed: s.score for s in theirs}
    return {s.seed: s.score - other[s.seed] for s in ours if s.seed in other}


def averaged(parts: Iterable[PerSeed]) -> PerSeed:
    """The mean over parts at the seeds that all of them have; parts without any seed are left out."""
    known = [part for part in parts if part]
    seeds = set.intersection(*(set(part) for part in known)) if known else set()
    return {seed: statistics.fmean(part[seed] for part in known) for seed in sorted(seeds)}


def tasks_of(records: Records) -> list[str]:
    return sorted({score.task for score in records.scores})


def grid(records: Records) -> list[tuple[str, str, str]]:
    """(task, target language, pair set) of the tables."""
    return [(task, language, group) for task in tasks_of(records) for language, group in targets(records).items()]


def finding(
    records: Records, name: str, claim: str, parts: dict[str, PerSeed], *, unit: str = "points", note: str = "",
    beside: dict[str, float] | None = None, judge: Callable[[Effect], Verdict] = positive,
) -> Finding:  # fmt: skip
    found = effect(list(averaged(parts.values()).values()), records.confidence)
    if not found.values:
        note = f"this study has no records for it{'; ' + note if note else ''}"
    elif len(found.values) == 1:
        note = f"one seed gives no interval{'; ' + note if note else ''}"
    means = {key: statistics.fmean(part.values()) for key, part in parts.items() if part}
    return Finding(name, claim, unit, judge(found) if found.values else "undecided", found, beside or {}, means, note)


def standing(records: Records, rows: Sequence[str], setting: str) -> dict[str, float]:
    """Mean scores of rows over the tasks and targets that all of them have, so that they compare; and of the floors
    there: a guess, and a model that never saw the language. Rows without any score are left out."""
    found: dict[tuple[str, str], dict[str, list[Score]]] = {}
    for task, language, group in grid(records):
        for row in [*rows, *(["unseen"] if setting == paper.ZERO_SHOT else [])]:
            if scores := pick(records, row, setting, task, language, group):
                found.setdefault((task, language), {})[row] = scores
    present = set().union(*found.values())
    common = [scores for scores in found.values() if present == scores.keys()]
    means = {
        row: statistics.fmean(statistics.fmean(s.score for s in scores[row]) for scores in common)
        for row in (common[0] if common else ())
    }
    floor = {"majority": statistics.fmean(next(iter(s.values()))[0].majority for s in common)} if common else {}
    return means | floor


def compared(records: Records, ours: str, theirs: str, setting: str) -> dict[str, PerSeed]:
    return {
        f"{task} {language}": differences(
            pick(records, ours, setting, task, language, group), pick(records, theirs, setting, task, language, group)
        )
        for task, language, group in grid(records)
    }


# --- forms -------------------------------------------------------------------------------------------------------------
def markdown(findings: Sequence[Finding], confidence: float) -> str:
    """A table of all findings, and the scores they are to be seen beside."""
    lines = [f"| claim | verdict | effect | {confidence:.0%} interval | d | seeds | beside |", "|---" * 7 + "|"]
    for found in findings:
        beside = ", ".join(f"{name} {value:.1f}" for name, value in found.beside.items())
        note = f"{beside}{'; ' if beside and found.note else ''}{found.note}"
        numbers = interval(found)
        lines.append(
            f"| {found.claim} | **{found.verdict}** | {' | '.join(numbers)} | {len(found.effect.values)} | {note} |"
        )
    return "\n".join([*lines, "", caution(len(findings), confidence)]) + "\n"


def caution(count: int, confidence: float) -> str:
    """What a reader of many intervals must know."""
    return (
        f"The intervals are not corrected for there being {count} of them: of effects that are zero, "
        f"{1 - confidence:.0%} are still told apart from it."
    )


def interval(found: Finding) -> tuple[str, str, str]:
    """(effect, interval, size) as text."""
    e, digits = found.effect, 1 if found.unit == "points" else 3
    if not e.values:
        return "", "", ""
    spread = f"{e.low:+.{digits}f} to {e.high:+.{digits}f}" if math.isfinite(e.low) else ""
    return f"{e.mean:+.{digits}f} {found.unit}", spread, f"{e.size:.1f}" if math.isfinite(e.size) else ""
