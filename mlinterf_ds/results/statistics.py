"""Paired comparisons: an effect over seeds with its interval and verdict, and the bootstrap over examples and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Effect:
    """A mean of paired differences, one a seed."""

    values: tuple[float, ...]
    mean: float
    low: float  # of the interval; -inf and inf for fewer than two seeds
    high: float
    size: float  # the mean over the standard deviation of the differences (Cohen's d_z); NaN if that is 0 or unknown


def effect(values: Sequence[float], confidence: float = 0.95) -> Effect:
    """Student's interval of the mean of one difference a seed."""
    found = np.asarray(values, dtype=float)
    mean = float(found.mean()) if len(found) else math.nan
    if len(found) < 2:
        return Effect(tuple(found.tolist()), mean, -math.inf, math.inf, math.nan)
    spread = float(found.std(ddof=1))
    if spread < 1e-9 * abs(mean):  # round-off
        spread = 0.0
    half = float(stats.t.ppf((1 + confidence) / 2, len(found) - 1)) * spread / math.sqrt(len(found))
    return Effect(tuple(found.tolist()), mean, mean - half, mean + half, mean / spread if spread else math.nan)


def positive(found: Effect) -> Verdict:
    """Whether the effect is above 0: decided only where the interval leaves 0 out."""
    if found.low > 0:
        return "holds"
    return "fails" if found.high < 0 else "undecided"


def negligible(found: Effect, margin: float) -> Verdict:
    """Whether the effect lies within +-margin: holds if its interval does, fails if that lies wholly outside."""
    if -margin < found.low and found.high < margin:
        return "holds"
    return "fails" if found.low > margin or found.high < -margin else "undecided"


def combined(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim that needs all its parts to hold."""
    if not verdicts:
        return "undecided"
    if "fails" in verdicts:
        return "fails"
    return "holds" if set(verdicts) == {"holds"} else "undecided"


def f1(counts: np.ndarray) -> np.ndarray:
    """Percent from (..., 3) sums of (right, predicted, gold): F1; for shares (right, 1, 1), the share."""
    total = counts[..., 1] + counts[..., 2]
    return 200 * counts[..., 0] / np.where(total > 0, total, 1)


def bootstrap_p(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], resamples: int = 1000, seed: int = 0
) -> float:
    """Two-sided p of "these score alike": paired bootstrap (Koehn, 2004) over examples and, within them, over seeds.

    ours, theirs: for each column that is averaged, (seeds, examples, 3) counts of (right, predicted, gold).
    """
    draw = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for left, right in zip(ours, theirs, strict=True):
        seeds, examples = left.shape[:2]
        rows = draw.integers(examples, size=(resamples, examples)) + examples * np.arange(resamples)[:, None]
        times = np.bincount(rows.ravel(), minlength=rows.size).reshape(rows.shape).astype(float)  # each is drawn
        runs = draw.integers(seeds, size=(resamples, seeds))
        scores = [f1(np.tensordot(times, side, axes=(1, 1))) for side in (left, right)]  # (resamples, seeds)
        total += np.take_along_axis(scores[0] - scores[1], runs, axis=1).mean(axis=1)
    below = (np.sum(total <= 0) + 1) / (resamples + 1)
    above = (np.sum(total >= 0) + 1) / (resamples + 1)
    return float(min(1.0, 2 * min(below, above)))
