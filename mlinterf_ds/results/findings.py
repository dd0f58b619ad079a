"""The paper's claims as hypotheses: what a finding is, how it is made from a study's records, and how it is shown.

An effect is a difference that the claim says is positive, one value a seed, averaged over the languages and tasks that both
sides have, in points of a score unless stated otherwise. A claim holds if the effect's interval, over paired seeds and over the
test examples (`statistics.py`), lies above 0, and fails if it lies below, after a correction for the number of claims. Else it
is undecided, and so with a single seed. Where no model scores better than guessing, there is nothing to compare: a part at the
floor is left out, and a claim of which every part is at the floor is undecided.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from mlinterf_ds.files import markdown_table
from mlinterf_ds.results import paper
from mlinterf_ds.results.records import Records, TaskScore
from mlinterf_ds.results.runs import read_counts
from mlinterf_ds.results.statistics import (
    MOST_SEEDS,
    VERDICTS,
    Effect,
    Judgement,
    Verdict,
    adjusted,
    combined,
    example_shares,
    positive,
)

PerSeed = dict[int, float]  # pretraining seed -> difference
# A task and how many examples: test sets of several languages that have both in common may be translations of each other, as XNLI's
# and the synthetic ones are, so that what one example contributes is added up over the languages. This is right for unlike texts
# too: by chance alone, their examples agree as often as they disagree.
TestSet = tuple[str, int]
MOST_TIMES = 100  # as many examples: beyond, none could be gathered
FLOORS = ("never saw it", "majority", "lexical")  # what scores are seen beside, each where a study has it


@dataclass(frozen=True)
class Finding:
    """A claim and what a study says of it."""

    name: str
    claim: str
    unit: str
    verdict: Verdict  # after the correction for the number of claims
    effect: Effect
    beside: dict[str, float] = field(default_factory=dict)  # mean scores and floors, which are shown beside the effect
    parts: dict[str, float] = field(default_factory=dict)  # the effect by task, language or rival
    note: str = ""
    uncorrected: Verdict = "not measured"  # by the interval alone
    p: float = 1.0  # the least level at which the interval decides; 1 without an effect
    adjusted_p: float = 1.0  # corrected for the number of claims
    reason: str = ""  # why it is undecided
    open: bool = False  # whether it is undecided and more seeds could decide it
    judgement: Judgement | None = None  # by which it is decided; None where the reason lies outside the effect

    def row(self) -> dict[str, Any]:
        """As JSON, with None for what is unknown."""
        numbers = asdict(self.effect) | {"size": self.effect.size}
        known = {key: x if not isinstance(x, float) or math.isfinite(x) else None for key, x in numbers.items()}
        shown = asdict(replace(self, judgement=None))
        del shown["judgement"]
        return shown | {"effect": known}

    @property
    def tested(self) -> bool:
        """Whether it could have been decided, so that it counts among the claims whose number is corrected for."""
        return self.judgement is not None and self.effect.has_interval and len(self.judgement.effect.values) > 1


# --- parts -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Part:
    """One task of a claim: a weighted sum of rows' scores on the test set of a language, or on those of two.

    terms: name -> (weight, scores, one a seed). unseen: scores of rows that never saw the language. constant: added for each seed.
    """

    terms: Mapping[str, tuple[float, Sequence[TaskScore]]]
    unseen: Sequence[TaskScore] = ()
    constant: PerSeed = field(default_factory=dict)

    @property
    def per_seed(self) -> PerSeed:
        """The weighted sums at the seeds that all rows have."""
        tables = [(weight, {score.seed: score.score for score in scores}) for weight, scores in self.terms.values()]
        seeds = sorted(set.intersection(*(set(table) for _, table in tables))) if tables else []
        return {
            seed: sum(weight * table[seed] for weight, table in tables) + self.constant.get(seed, 0.0) for seed in seeds
        }

    @property
    def scores(self) -> list[TaskScore]:
        """The scores of all rows, at the seeds that all of them have."""
        seeds = self.per_seed.keys()
        return [score for _, scores in self.terms.values() for score in scores if score.seed in seeds]

    def at(self, seeds: Collection[int]) -> Part:
        """The same of these seeds alone."""
        kept = {name: (weight, [s for s in scores if s.seed in seeds]) for name, (weight, scores) in self.terms.items()}
        return replace(self, terms=kept, unseen=[score for score in self.unseen if score.seed in seeds])

    def shares(self, seeds: Sequence[int]) -> dict[TestSet, np.ndarray] | None:
        """Test set -> (seeds, examples): what each of its examples contributes to the sum.

        None where counts of the examples are not kept, or rows were tested on different examples of one language.
        """
        tables: dict[TestSet, np.ndarray] = {}
        examples: dict[str, int] = {}  # by language
        for weight, scores in self.terms.values():
            counts = example_counts([score for score in scores if score.seed in seeds])
            if counts is None or examples.setdefault(scores[0].language, counts.shape[1]) != counts.shape[1]:
                return None
            test_set = scores[0].task, counts.shape[1]
            tables[test_set] = tables.get(test_set, 0.0) + weight * example_shares(counts)
        return tables

    @property
    def floors(self) -> dict[str, float]:
        """Mean scores without training on the language: guessing, looking words up, and a model that never saw it."""
        scores = self.scores
        floors = {"majority": statistics.fmean(score.majority for score in scores)}
        if lexical := [score.lexical for score in scores if score.lexical is not None]:
            floors["lexical"] = statistics.fmean(lexical)
        if self.unseen:
            floors[FLOORS[0]] = statistics.fmean(score.score for score in self.unseen)
        return floors

    def at_floor(self, margin: float, confidence: float) -> bool:
        """Whether no row is told apart from guessing, or from a model that never saw the language."""
        floors = self.floors
        floor = max(value for name, value in floors.items() if name != "lexical")
        return all(above_floor(scores, floor, confidence) <= margin for _, scores in self.terms.values())


def above_floor(scores: Sequence[TaskScore], floor: float, confidence: float) -> float:
    """By how many points a row surely scores more than the floor: the lower end of its interval over the test examples."""
    mean, counts = statistics.fmean(score.score for score in scores) - floor, example_counts(scores)
    if counts is None:
        return mean
    return mean - Effect.of([mean], [example_shares(counts)]).half(1 - confidence)


def example_counts(scores: Sequence[TaskScore]) -> np.ndarray | None:
    """(scores, examples, 3) counts of (right, predicted, gold), each the mean over a model's fine-tunings; None if not known."""
    tables = [read_counts(score.counts) for score in scores]
    known = [table.mean(axis=0) for table in tables if table is not None]
    comparable = known and len(known) == len(tables) and len({len(table) for table in known}) == 1
    return np.stack(known) if comparable else None


def difference(
    left: Sequence[TaskScore], right: Sequence[TaskScore], names: tuple[str, str], unseen: Sequence[TaskScore] = ()
) -> Part:
    """Left minus right; `names` of both rows."""
    return Part({names[0]: (1.0, left), names[1]: (-1.0, right)}, unseen)


def averaged(parts: Iterable[PerSeed]) -> PerSeed:
    """The mean over parts at the seeds that all of them have; parts without any seed are left out."""
    known = [part for part in parts if part]
    seeds = set.intersection(*(set(part) for part in known)) if known else set()
    return {seed: statistics.fmean(part[seed] for part in known) for seed in sorted(seeds)}


def cells(records: Records) -> list[tuple[str, str, str]]:
    """(task, target language, pair set) of the tables."""
    return [(task, language, group) for task in records.tasks for language, group in records.targets.items()]


def compared(records: Records, left: str, right: str, setting: str, low: bool = False) -> dict[str, Part]:
    """Task and language -> two rows of the tables. low: also of the sets with a low-resource language."""
    parts = {}
    for cell in [*cells(records), *(records.groups("low") if low else ())]:
        ours, theirs = (records.pick(row, setting, *cell) for row in (left, right))
        name = f"{cell[0]} {cell[1]}"
        parts[f"{name} ({cell[2]})" if name in parts else name] = difference(
            ours, theirs, (left, right), unseen(records, setting, *cell)
        )
    return parts


def unseen(records: Records, setting: str, task: str, language: str, group: str = "") -> list[TaskScore]:
    """Zero-shot scores of a model that never saw the language; none within a language."""
    return records.pick("unseen", setting, task, language, group) if setting == paper.ZERO_SHOT else []


# --- judging -----------------------------------------------------------------------------------------------------------
def finding(
    records: Records, name: str, claim: str, parts: Mapping[str, Part], *, note: str = "",
    judge: Callable[[Effect], Judgement] = positive, cause: str = "",
) -> Finding:  # fmt: skip
    """Judges a claim by the mean of its parts, those at the floor left out. cause: why nothing can be decided, if so."""
    known = {key: part for key, part in parts.items() if part.per_seed}
    floored = [key for key, part in known.items() if part.at_floor(records.margin, records.confidence)]
    told = {key: part for key, part in known.items() if key not in floored} or known
    effect, unsampled = mean_effect(list(told.values()), records.confidence)
    common = averaged(part.per_seed for part in told.values()).keys()
    lost = sorted(set().union(*(part.per_seed for part in told.values())) - common)
    if common:
        told = {key: part.at(common) for key, part in told.items()}
    means = {key: statistics.fmean(part.per_seed.values()) for key, part in told.items()}
    notes = [note, f"without {', '.join(floored)}: at the floor" if len(told) < len(known) else ""]
    if unsampled:
        notes.append(f"{unsampled} of {len(told)} test sets have no counts of their examples: seeds alone vary there")
    if lost and not common:
        cause = cause or "inconclusive: no seed that every task and language has"
    if lost:
        notes.append(f"without seeds {', '.join(map(str, lost))}: not every task and language has them")
    cause = cause or ("at the floor: no row scores more than guessing" if known and len(floored) == len(known) else "")
    beside = _beside(list(told.values()))
    result = Finding(name, claim, "points", "not measured", effect, beside, means, "; ".join(filter(None, notes)))
    return judged(result, judge(effect), records.confidence, cause)


def mean_effect(parts: Sequence[Part], confidence: float) -> tuple[Effect, int]:
    """The mean of the parts over their common seeds, and the number of parts without counts of each example."""
    per_seed = averaged(part.per_seed for part in parts)
    known = [shares for part in parts if (shares := part.shares(list(per_seed))) is not None]
    tables: dict[TestSet, np.ndarray] = {}
    for shares in known:
        for test_set, table in shares.items():
            tables[test_set] = tables.get(test_set, 0.0) + table / len(parts)
    return Effect.of(list(per_seed.values()), list(tables.values()), confidence), len(parts) - len(known)


def _beside(parts: Sequence[Part]) -> dict[str, float]:
    """The mean score of each row over the parts that have it, and of the floors."""
    columns: dict[str, list[float]] = {}
    for part in parts:
        rows = {name: statistics.fmean(s.score for s in scores) for name, (_, scores) in part.terms.items()}
        for name, value in (rows | part.floors).items():
            columns.setdefault(name, []).append(value)
    return {name: statistics.fmean(columns[name]) for name in sorted(columns, key=lambda name: name in FLOORS)}


def measured(
    records: Records, name: str, claim: str, parts: Mapping[str, PerSeed], unit: str,
    beside: Mapping[str, Mapping[str, PerSeed]] | None = None,
) -> Finding:  # fmt: skip
    """Judges a claim about a quantity that is not a score of a task, so that it varies over seeds only.

    beside: name -> by part what the effect is to be seen beside; its mean is shown.
    """
    effect = Effect.of(list(averaged(parts.values()).values()), confidence=records.confidence)
    means = {key: statistics.fmean(part.values()) for key, part in parts.items() if part}
    known = {side: averaged(values.values()) for side, values in (beside or {}).items()}
    shown = {side: statistics.fmean(per_seed.values()) for side, per_seed in known.items() if per_seed}
    result = Finding(name, claim, unit, "not measured", effect, shown, means)
    return judged(result, positive(effect), records.confidence)


def judged(result: Finding, judgement: Judgement, confidence: float, cause: str = "") -> Finding:
    """The finding with its verdict and, where it is undecided, the reason. cause: a reason that lies outside the effect."""
    effect, alpha = result.effect, 1 - confidence
    if not effect.values and cause:
        return replace(result, verdict="undecided", uncorrected="undecided", reason=cause)
    if not effect.values:
        return replace(result, reason="not measured: this study has no records for it")
    decided = judgement.p < alpha and len(judgement.effect.values) > 1 and not cause
    verdict: Verdict = judgement.side if decided else "undecided"
    reason, is_open = (cause, False) if decided or cause else inconclusive(judgement, alpha)
    return replace(
        result,
        verdict=verdict,
        uncorrected=verdict,
        p=judgement.p,
        reason=reason,
        open=is_open,
        judgement=None if cause else judgement,
    )


def inconclusive(judgement: Judgement, alpha: float) -> tuple[str, bool]:
    """Why an interval decides nothing, and what would; and whether more seeds would."""
    effect, distance, alpha = judgement.effect, judgement.distance, alpha / judgement.tests
    if len(effect.values) < 2:
        return "inconclusive: one seed gives no interval over seeds; run three or more", True
    if not effect.has_interval:
        return "inconclusive: all seeds and examples give the same difference, so that its spread is not known", False
    if distance < 1e-9:
        return "inconclusive: a tie", False
    if seeds := effect.seeds_needed(distance, alpha):
        return (
            f"inconclusive: {seeds} seeds would tell it in 80 of 100 studies, if the effect is as large as it seems",
            True,
        )
    times = (effect.half(alpha, len(effect.values) * 10**6) / distance) ** 2
    if times < 1:
        return f"inconclusive: would need more than {MOST_SEEDS:,} seeds", False
    times = max(2.0, times)
    if times > MOST_TIMES:
        return "inconclusive: the difference is too close to the border to be told by a study like this", False
    reason = f"the test sets are too small, about {times:,.0f} times as many examples would do, however many the seeds"
    return f"inconclusive: {reason}", False


def corrected(findings: Sequence[Finding], confidence: float) -> list[Finding]:
    """The findings with their verdicts corrected for the number of claims that could have been decided.

    What is open is told the seeds that it needs at the level of its place among them, as the correction has it.
    """
    tested = sorted((finding for finding in findings if finding.tested), key=lambda finding: finding.p)
    place = {finding.name: number for number, finding in enumerate(tested, 1)}
    of = {finding.name: p for finding, p in zip(tested, adjusted([f.p for f in tested]), strict=True)}
    results = []
    for row in findings:
        row = replace(row, adjusted_p=of.get(row.name, 1.0))
        lost = row.verdict in ("holds", "fails") and row.adjusted_p >= 1 - confidence
        if row.judgement and row.tested and (lost or row.open):
            reason, is_open = inconclusive(row.judgement, (1 - confidence) * place[row.name] / len(tested))
            if lost:
                reason = f"{reason}; {row.verdict} by itself (p {row.p:.2g}), but not among {len(tested)} claims"
            row = replace(row, verdict="undecided", reason=reason, open=is_open)
        results.append(row)
    return results


def needing_all(
    results: Mapping[str, Finding], judge: Callable[[Effect], Judgement], records: Records, word: str
) -> Finding:
    """Judges a claim that holds if all of these findings do, and fails if one does; the effect shown is that of the one which decides.

    results: by what they are about, all with an effect. word: what one of them is called in the note. Those at the floor are left
    out, and one with a single seed decides nothing.
    """
    floored = {key for key, result in results.items() if result.reason.startswith("at the floor")}
    told = {key: result for key, result in results.items() if key not in floored} or dict(results)
    judgements = {key: judge(result.effect) for key, result in told.items()}
    single = [key for key, result in told.items() if len(result.effect.values) < 2]
    judgement = combined([replace(of, p=1.0) if key in single else of for key, of in judgements.items()])

    shown = next(key for key in told if judgements[key].effect is judgement.effect)
    result = replace(
        told[shown], parts={key: of.effect.mean for key, of in results.items()},
        note="; ".join(filter(None, [f"{word}: {shown}", told[shown].note])),
    )  # fmt: skip
    result = judged(result, judgement, records.confidence, told[shown].reason if len(floored) == len(results) else "")
    if single and judgement.side == "holds" and len(floored) < len(results):
        return replace(result, reason=f"inconclusive: one seed of {', '.join(single)}; run three or more", open=True)
    return result


# --- as text -----------------------------------------------------------------------------------------------------------
def markdown(findings: Sequence[Finding], confidence: float) -> str:
    """A table of all findings, by verdict, with the scores that they are to be seen beside."""
    span = f"{100 * confidence:.3g}% interval"
    head = ["claim", "verdict", "uncorrected", "effect", span, "d", "seeds", "p", "adjusted p", "beside"]
    rows = []
    for row in sorted(findings, key=lambda finding: VERDICTS.index(finding.verdict)):
        notes = "; ".join(dict.fromkeys(filter(None, [row.reason, shown_beside(row), below_lexical(row), row.note])))
        told = [row.claim, f"**{row.verdict}**", row.uncorrected, *interval(row), len(row.effect.values)]
        rows.append([*told, *p_values(row), notes])
    return "\n".join([*markdown_table(head, rows), "", caution(findings, confidence)]) + "\n"


def shown_beside(finding: Finding) -> str:
    """What the effect is to be seen beside, as text; '' where there is nothing."""
    digits = 1 if finding.unit == "points" else 3
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in finding.beside.items())


def below_lexical(finding: Finding) -> str:
    """Says which rows score less than a dictionary of each word's commonest label; '' where none does or it is not known."""
    floor = finding.beside.get("lexical")
    rows = [name for name in finding.beside if name not in ("majority", "lexical")]
    below = [name for name in rows if floor is not None and finding.beside[name] < floor]
    return f"below the lexical baseline: {', '.join(below)}" if below else ""


def caution(findings: Sequence[Finding], confidence: float) -> str:
    """The sentence under the verdicts that says how they are corrected for their number."""
    count = sum(finding.tested for finding in findings)
    return (
        f"Verdicts are corrected for there being {count} of them (Benjamini and Hochberg): of those that are decided, a share of "
        f"at most {100 * (1 - confidence):.2g}% is wrong on average. The intervals, and the uncorrected verdicts, are each by itself."
    )


def p_values(finding: Finding) -> tuple[str, str]:
    """p and adjusted p as text; empty where unknown."""
    if not finding.effect.has_interval:
        return "", ""
    one, both = (f"{p:.3f}" if p >= 0.001 else "< 0.001" for p in (finding.p, finding.adjusted_p))
    return one, both if finding.tested else ""


def interval(finding: Finding) -> tuple[str, str, str]:
    """The effect, its interval and its size as text; empty where unknown."""
    effect, digits = finding.effect, 1 if finding.unit == "points" else 3
    if not effect.values:
        return "", "", ""
    span = f"{effect.low:+.{digits}f} to {effect.high:+.{digits}f}" if effect.has_interval else ""
    size = f"{effect.size:.1f}" if math.isfinite(effect.size) else ""
    return f"{effect.mean:+.{digits}f} {finding.unit}", span, size
