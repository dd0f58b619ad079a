"""Bootstrap intervals (Efron, 1979) of a mean over seeds and rows that were drawn independently of each other."""

from __future__ import annotations

import math

import numpy as np

RESAMPLES = 2000


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
