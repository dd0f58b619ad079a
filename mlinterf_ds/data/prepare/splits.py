"""Which sentences a language holds out, by rank of hash: the same at every block size and number of workers."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from mlinterf_ds.data.prepare.blocks import HISTOGRAM_BITS, SPLITS

FEWEST_UNITS = 50
LARGEST_HASH = 2**64 - 1


class Cuts(NamedTuple):
    hashes: tuple[int, ...]  # the last unit hash of each of SPLITS, in their order; later ones are left out
    sentences: dict[str, int]  # of each split
    left_out: int  # sentences beyond the limit


def held_out(sentences: int) -> int:
    """How many of a language's sentences each of valid, test and meta gets: 2%, but at least 50 or a tenth of all,
    whichever is less, and at most 10,000."""
    return min(10_000, max(sentences // 50, min(50, sentences // 10)))


def find_cuts(histogram: np.ndarray, units: Callable[[], Iterable[np.ndarray]], limit: int | None) -> Cuts:
    """Cut the kept sentences, in the order of their unit hashes, into valid, test, meta and train (`limit` of them).

    A unit (a document, or a sentence that stands alone) is never torn apart: a split ends with the unit that fills it.
    histogram (2^HISTOGRAM_BITS,) counts sentences by the hash's leading bits; `units` gives the hashes in parts.
    """
    total = int(histogram.sum())
    cuts: list[int] = []
    taken = 0
    for wanted in (*[held_out(total)] * 3, limit if limit is not None else total):
        if taken + wanted >= total:
            cuts.append(LARGEST_HASH)
            taken = total
        else:
            cut, taken = _cut_at(taken + wanted, histogram, units)
            cuts.append(cut)
    edges = np.array(cuts, dtype=np.uint64)
    counts = np.zeros(len(SPLITS) + 1, dtype=np.int64)
    for part in units():
        counts += np.bincount(np.searchsorted(edges, part, side="left"), minlength=len(counts))
    return Cuts(tuple(cuts), dict(zip(SPLITS, counts.tolist(), strict=False)), int(counts[-1]))


def _cut_at(rank: int, histogram: np.ndarray, units: Callable[[], Iterable[np.ndarray]]) -> tuple[int, int]:
    """The hash of the `rank`-th sentence (from 1), and how many sentences have that hash or a smaller one."""
    below = np.cumsum(histogram)
    leading = int(np.searchsorted(below, rank, side="left"))
    shift = np.uint64(64 - HISTOGRAM_BITS)
    values = np.sort(np.concatenate([part[part >> shift == leading] for part in units()]))
    before = int(below[leading] - histogram[leading])
    cut = values[rank - before - 1]
    return int(cut), before + int(np.searchsorted(values, cut, side="right"))
