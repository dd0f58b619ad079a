"""Effects with their intervals, and the one rule that judges them.

An effect is the mean of paired differences. Its interval is one of two, because two kinds of differences are paired:

- `student_effect` takes one difference a pretraining seed. The study's claims use it: a claim averages over languages and
  tasks first, and only seeds are left to vary.
- `bootstrap_effect` takes one difference for each pretraining seed and row of text (or fine-tuning seed). The interference
  analysis uses it: it often has a single seed, of which the rows still say something.

`bootstrap_p` is the test behind the marks in the study's tables. F1 is no mean over examples, so neither interval fits there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from scipy import stats

Left = TypeVar("Left")
Right = TypeVar("Right")
Verdict = Literal["holds", "fails", "undecided"]
VERDICTS: tuple[Verdict, ...] = ("holds", "fails", "undecided")


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

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low)

    @property
    def size(self) -> float:
        """Cohen's d_z: the mean over the standard deviation of `values`; NaN if that is 0 or unknown."""
        spread = _spread(self.values)
        return self.mean / spread if spread else math.nan


def _spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample of two or more; 0 where it is round-off alone, or unknown."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return spread if spread and spread >= 1e-9 * abs(float(np.mean(values))) else 0.0


def student_effect(values: Sequence[float], confidence: float = 0.95) -> Effect:
    """The mean of one difference a seed with Student's interval."""
    count, mean = len(values), float(np.mean(values)) if values else math.nan
    if count < 2:
        return Effect(tuple(values), mean, -math.inf, math.inf)
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * _spread(values) / math.sqrt(count)
    return Effect(tuple(values), mean, mean - half, mean + half)


def bootstrap_effect(differences: np.ndarray, resamples: int = 2000, seed: int = 0) -> Effect:
    """The mean of (seeds, rows) differences with its 95% percentile bootstrap interval (Efron, 1979).

    Seeds and rows are both resampled; of a single seed, rows alone. Few seeds make the interval too narrow: with S seeds their
    share of the variance is (S - 1) / S of the unbiased one, which is half of it for two.
    """
    seeds, rows = differences.shape
    low, high = -math.inf, math.inf
    if differences.size > 1:
        draw = np.random.default_rng(seed)
        means = np.empty(resamples)
        chunk = max(1, (1 << 22) // rows)  # resamples at once: memory stays flat
        for first in range(0, resamples, chunk):
            count = min(chunk, resamples - first)
            seed_counts = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)  # (count, seeds)
            row_counts = draw.multinomial(rows, np.full(rows, 1 / rows), size=count)  # (count, rows)
            sums = ((seed_counts @ differences) * row_counts).sum(axis=1)
            means[first : first + count] = sums / (seeds * rows)
        low, high = map(float, np.quantile(means, [0.025, 0.975]))
    return Effect(tuple(differences.mean(axis=1).tolist()), float(differences.mean()), low, high)


# --- verdicts ----------------------------------------------------------------------------------------------------------
def positive(effect: Effect) -> Verdict:
    """Judges "the effect is above 0": decided only where the interval leaves 0 out."""
    if effect.low > 0:
        return "holds"
    return "fails" if effect.high < 0 else "undecided"


def negligible(effect: Effect, margin: float) -> Verdict:
    """Judges "the effect lies within +-margin": holds if its interval does, fails if that lies wholly outside."""
    if -margin < effect.low and effect.high < margin:
        return "holds"
    return "fails" if effect.low > margin or effect.high < -margin else "undecided"


def combined(verdicts: Sequence[Verdict]) -> Verdict:
    """Judges a claim that needs all its parts to hold."""
    if "fails" in verdicts:
        return "fails"
    return "holds" if set(verdicts) == {"holds"} else "undecided"


# --- tables ------------------------------------------------------------------------------------------------------------
def f1(counts: np.ndarray) -> np.ndarray:
    """F1 in percent from (..., 3) sums of (right, predicted, gold); a share of right answers counts as (right, 1, 1)."""
    total = counts[..., 1] + counts[..., 2]
    return 200 * counts[..., 0] / np.where(total > 0, total, 1)


def bootstrap_p(left: Sequence[np.ndarray], right: Sequence[np.ndarray], resamples: int = 1000, seed: int = 0) -> float:
    """Two-sided p of "both score alike": paired bootstrap (Koehn, 2004) over examples and, within them, over seeds.

    left, right: for each test set whose scores are averaged, (seeds, examples, 3) counts of (right, predicted, gold).
    """
    draw = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for pair in zip(left, right, strict=True):
        seeds, examples = pair[0].shape[:2]
        rows = draw.integers(examples, size=(resamples, examples)) + examples * np.arange(resamples)[:, None]
        counts = np.bincount(rows.ravel(), minlength=rows.size).reshape(rows.shape).astype(float)  # of every example
        drawn_seeds = draw.integers(seeds, size=(resamples, seeds))
        scores = [f1(np.tensordot(counts, side, axes=(1, 1))) for side in pair]  # (resamples, seeds)
        total += np.take_along_axis(scores[0] - scores[1], drawn_seeds, axis=1).mean(axis=1)
    below = (np.sum(total <= 0) + 1) / (resamples + 1)
    above = (np.sum(total >= 0) + 1) / (resamples + 1)
    return float(min(1.0, 2 * min(below, above)))
