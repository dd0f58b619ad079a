"""One language in a joint model against its mono models, with a bootstrap interval (Efron, 1979) of the difference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mlinterf_ds.results.runs import Group

BITS = "bits per character"  # the one metric that is the better the lower
RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """Seeds and rows paired. A positive difference: joint training hurts."""

    metric: str  # "bits per character", "ner f1"
    language: str
    group: Group
    seeds: tuple[int, ...]  # of pretraining
    rows: int  # scored for each seed: rows of text, or fine-tuning seeds
    mono: tuple[float, ...]  # by seed
    joint: tuple[float, ...]
    difference: float
    low: float  # of its 95% interval
    high: float

    @classmethod
    def of(
        cls, metric: str, language: str, group: Group, seeds: list[int], mono: np.ndarray, joint: np.ndarray
    ) -> Comparison:
        """From two tables (seeds, rows) of the same seeds and rows."""
        table = joint - mono if metric == BITS else mono - joint
        means = tuple(mono.mean(axis=1).tolist()), tuple(joint.mean(axis=1).tolist())
        return cls(metric, language, group, tuple(seeds), mono.shape[1], *means, float(table.mean()), *interval(table))

    @property
    def others(self) -> tuple[str, ...]:
        """The language's partners."""
        return tuple(code for code in self.group[0] if code != self.language)


def interval(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` (seeds, rows), both resampled; of one seed, rows alone.

    Pair first (give differences) where two models saw the same seeds and rows. NaN if there is one value. Few seeds make it
    too narrow: their share of the variance is (S - 1) / S of the unbiased one, half of it for two.
    """
    seeds, rows = values.shape
    if values.size < 2:
        return math.nan, math.nan
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, (1 << 22) // rows)
    for first in range(0, resamples, step):
        count = min(step, resamples - first)
        of_seeds = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)  # (count, seeds) times each is drawn
        of_rows = draw.multinomial(rows, np.full(rows, 1 / rows), size=count)  # (count, rows)
        means[first : first + count] = ((of_seeds @ values) * of_rows).sum(axis=1) / (seeds * rows)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
