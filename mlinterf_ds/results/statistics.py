"""Effects with their intervals, and the one rule that judges them.

An effect is a mean of paired differences between two models. Two things vary in it: training (over the pretraining seeds) and
the sample of test examples (or rows of text), which all seeds share, so that the spread over seeds does not show it. The interval
of confidence 1 - alpha reaches from the mean by the square root of the larger of

    t(alpha; S - 1)^2 A + t(alpha; n - 1)^2 (B - AB)      and      t(alpha; n - 1)^2 B

with A the variance of the mean that the S seeds show, B the one that the n examples show, and AB what is in both because seeds
and examples interact (a crossed analysis of variance). The first is Student's interval where one of the two is all (for sums:
Graybill and Wang, 1980); the second holds where few seeds agree by chance. A score is a ratio of sums over the examples (an F1,
or an accuracy), whose variance is that of its linearisation (Cochran, Sampling Techniques, section 2.11).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

Left = TypeVar("Left")
Right = TypeVar("Right")
Verdict = Literal["holds", "fails", "undecided", "not measured"]
VERDICTS: tuple[Verdict, ...] = ("holds", "fails", "undecided", "not measured")
LEAST_P = 1e-12  # p-values are not told below this
POWER = 0.8  # share of studies that are to tell an effect from none
MOST_SEEDS = 1000  # seeds at which `seeds_needed` gives up


def paired(left: Mapping[int, Left], right: Mapping[int, Right]) -> dict[int, tuple[Left, Right]]:
    """Seed -> (left, right) at the pretraining seeds that both sides have, ascending."""
    return {seed: (left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())}


@dataclass(frozen=True)
class Effect:
    """A mean of paired differences and its interval, which reaches from -inf to inf where nothing is known of the spread."""

    values: tuple[float, ...]  # the difference of each pretraining seed
    mean: float
    low: float
    high: float
    of_seeds: float = 0.0  # A above; 0 with one seed
    of_examples: float = 0.0  # B above; 0 where nothing was sampled or where it is not known
    of_both: float = 0.0  # AB above
    examples: int = 0  # test examples or rows of text; 0 where B is not known

    @classmethod
    def of(cls, values: Sequence[float], shares: Sequence[np.ndarray] = (), confidence: float = 0.95) -> Effect:
        """The mean of one difference a seed. A single seed's interval is of its test examples alone.

        shares: for each test set (seeds, examples): what each example contributes to each seed's difference, up to a constant.
        """
        count, mean = len(values), float(np.mean(values)) if len(values) else math.nan
        tables = [table for table in shares if table.size and table.shape[1] > 1]
        of_examples = sum(table.shape[1] * _spread(table.mean(axis=0)) ** 2 for table in tables)
        of_both = sum(table.shape[1] * _interaction(table) / count for table in tables)
        examples = sum(table.shape[1] for table in tables)
        of_seeds = _spread(values) ** 2 / max(1, count)
        effect = cls(
            tuple(values), mean, -math.inf, math.inf, of_seeds, of_examples, min(of_both, of_examples), examples
        )
        if not effect.values or not (of_examples or of_seeds):
            return effect
        half = effect.half(1 - confidence)
        return replace(effect, low=mean - half, high=mean + half)

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low)

    @property
    def size(self) -> float:
        """Cohen's d_z: the mean over the standard deviation of `values`; NaN if that is 0 or unknown."""
        spread = _spread(self.values)
        return self.mean / spread if spread else math.nan

    def half(self, alpha: float, seeds: int | None = None) -> float:
        """Half the width of the interval of confidence 1 - alpha; `seeds`: as it would be with so many."""
        count = seeds or len(self.values)
        shrunk, own = len(self.values) / count, self.of_examples - self.of_both
        of_seeds, of_examples = (
            _quantile(alpha, count) ** 2 * self.of_seeds * shrunk,
            _quantile(alpha, self.examples) ** 2,
        )
        return math.sqrt(max(of_seeds + of_examples * own, of_examples * (own + self.of_both * shrunk)))

    def p(self, distance: float) -> float:
        """The least alpha at which the interval reaches less far than `distance` from the mean; 1 without an interval."""
        if not self.has_interval or distance <= 0:
            return 1.0
        if self.half(LEAST_P) < distance:
            return LEAST_P
        from scipy.optimize import brentq

        return float(brentq(lambda alpha: self.half(alpha) - distance, LEAST_P, 1.0))

    def seeds_needed(self, distance: float, alpha: float) -> int | None:
        """The number of seeds of this spread with which 80 of 100 studies would tell a mean this far off; None where none would do."""
        from scipy.stats import nct

        counts = range(2, MOST_SEEDS + 1)  # power rises with the number of seeds

        def suffices(count: int) -> bool:
            if self.half(alpha, count) >= distance:
                return False
            shrunk = len(self.values) / count
            variance = self.of_seeds * shrunk + self.of_examples - self.of_both
            power = (
                float(nct.sf(_quantile(alpha, count), count - 1, distance / math.sqrt(variance))) if variance else 1.0
            )
            return power > POWER

        first = bisect_left(counts, True, key=suffices)
        return counts[first] if first < len(counts) else None


def _quantile(alpha: float, count: int) -> float:
    """Student's two-sided quantile of a mean of `count` values; 0 for fewer than two."""
    from scipy.special import stdtrit

    return -float(stdtrit(count - 1, alpha / 2)) if count > 1 else 0.0


def _interaction(table: np.ndarray) -> float:
    """The variance of (seeds, examples) that neither the seed nor the example explains; 0 with one seed."""
    if len(table) < 2:
        return 0.0
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    return float((rest**2).sum()) / ((table.shape[0] - 1) * (table.shape[1] - 1))


def _spread(values: Sequence[float] | np.ndarray) -> float:
    """Standard deviation of a sample of two or more; 0 where it is round-off alone, or unknown."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return spread if spread and spread >= 1e-9 * abs(float(np.mean(values))) else 0.0


def detectable(spread: float, seeds: int, confidence: float, power: float = POWER, of_examples: float = 0.0) -> float:
    """The least mean of paired differences that is told from 0 with this power; inf with one seed.

    spread: the standard deviation of the differences over seeds, of which a two-sided t test has the power of the noncentral t
    distribution (Cohen, Statistical Power Analysis, 1988, chapter 2). of_examples: the standard deviation that the sample of test
    examples gives the mean, however many the seeds; it is taken as normal, and the two add up as independent ones do.
    """
    if seeds < 2:
        return math.inf
    from scipy.optimize import brentq
    from scipy.stats import nct, norm, t

    freedom, border = seeds - 1, t.ppf((1 + confidence) / 2, seeds - 1)

    def lacking(shift: float) -> float:
        return power - float(nct.sf(border, freedom, shift))

    by_seeds = float(brentq(lacking, 0.0, 10.0 + 2.0 * float(border))) * spread / math.sqrt(seeds)
    return math.hypot(by_seeds, float(norm.ppf((1 + confidence) / 2) + norm.ppf(power)) * of_examples)


# --- verdicts ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Judgement:
    """What an effect says of a claim: the side on which its mean lies, and how far from the border between them."""

    side: Verdict
    distance: float
    p: float
    effect: Effect
    tests: int = 1  # among which this one was chosen by its p-value; `p` is multiplied by it (Bonferroni)


def positive(effect: Effect) -> Judgement:
    """Judges "the effect is above 0"."""
    distance = abs(effect.mean) if effect.values else 0.0
    return Judgement("holds" if effect.mean > 0 else "fails", distance, effect.p(distance), effect)


def negligible(effect: Effect, margin: float) -> Judgement:
    """Judges "the effect lies within +-margin", by two one-sided tests (Schuirmann, 1987)."""
    distance = abs(abs(effect.mean) - margin) if effect.values else 0.0
    return Judgement("holds" if abs(effect.mean) < margin else "fails", distance, effect.p(distance), effect)


def combined(judgements: Sequence[Judgement]) -> Judgement:
    """Judges a claim that needs all its parts to hold: the weakest of those that hold, or the clearest of those that fail."""
    failing = [judgement for judgement in judgements if judgement.side == "fails"]
    if not failing:
        return max(judgements, key=lambda judgement: judgement.p)
    clearest = min(failing, key=lambda judgement: judgement.p)
    tests = len(judgements)
    return replace(clearest, p=min(1.0, clearest.p * tests), tests=tests)  # Bonferroni, because any of them may fail


def adjusted(ps: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Benjamini and Hochberg, 1995): of the claims with a value below q, on average
    at most the share q is decided wrongly."""
    from scipy.stats import false_discovery_control

    return false_discovery_control(ps).tolist() if len(ps) else []


# --- scores ------------------------------------------------------------------------------------------------------------
def f1(counts: np.ndarray) -> np.ndarray:
    """F1 in percent from (..., 3) sums of (right, predicted, gold); a share of right answers counts as (right, 1, 1)."""
    total = counts[..., 1] + counts[..., 2]
    return 200 * counts[..., 0] / np.where(total > 0, total, 1)


def example_shares(counts: np.ndarray) -> np.ndarray:
    """(..., examples): each example's share of the score, up to a constant, from its counts (..., examples, 3).

    It is the first-order change of the score with the example's weight: (200 right - score (predicted + gold)) / total.
    """
    sums = counts.sum(axis=-2)
    total = np.maximum(sums[..., 1] + sums[..., 2], 1)[..., None]
    score = f1(sums)[..., None]
    return (200 * counts[..., 0] - score * (counts[..., 1] + counts[..., 2])) / total
