"""Which sentences go to which split, by the rank of their hashes: the same at every block size and number of workers."""

from collections.abc import Callable, Iterable

import numpy as np

SPLIT_ORDER = ("valid", "test", "meta", "train")  # the smallest hashes go to the first
HISTOGRAM_BITS = 12
FEWEST_UNITS = 50


def held_out(sentences: int) -> int:
    """Returns how many of a language's sentences valid and test get each (and meta, if there is to be one): 2%, at most
    10,000, and at least 50 (or a tenth of all, if that is less)."""
    return min(10_000, max(sentences // 50, min(50, sentences // 10)))


def find_cuts(
    histogram: np.ndarray, units: Callable[[], Iterable[np.ndarray]], limit: int | None, meta_split: bool
) -> tuple[tuple[int, ...], list[int]]:
    """Cuts the kept sentences, sorted by their unit hashes, into valid, test, meta and train (at most `limit` sentences).

    Returns the last unit hash of each split, and how many sentences each split has and how many are left out. Without
    `meta_split`, meta stays empty and its sentences go to train.
    A unit (a document, or a sentence that stands alone) is never torn apart: a split ends with the unit that fills it.
    `histogram` (2^HISTOGRAM_BITS,) counts sentences by the leading bits of their unit hash; `units()` yields the hashes in
    parts, anew at every call.
    """
    total = int(histogram.sum())
    cuts: list[int] = []
    taken = 0
    share = held_out(total)
    for wanted in (share, share, share if meta_split else 0, limit if limit is not None else total):
        if not wanted:
            cut = cuts[-1]
        elif taken + wanted >= total:
            cut, taken = 2**64 - 1, total
        else:
            cut, taken = _cut_at(taken + wanted, histogram, units)
        cuts.append(cut)
    edges = np.array(cuts, dtype=np.uint64)
    counts = np.zeros(len(SPLIT_ORDER) + 1, dtype=np.int64)
    for part in units():
        counts += np.bincount(np.searchsorted(edges, part, side="left"), minlength=len(counts))
    return tuple(cuts), counts.tolist()


def _cut_at(rank: int, histogram: np.ndarray, units: Callable[[], Iterable[np.ndarray]]) -> tuple[int, int]:
    """Returns the hash of the `rank`-th sentence (from 1), and how many sentences have that hash or a smaller one."""
    below = np.cumsum(histogram)
    leading = int(np.searchsorted(below, rank, side="left"))
    shift = np.uint64(64 - HISTOGRAM_BITS)
    values = np.sort(np.concatenate([part[part >> shift == leading] for part in units()]))
    before = int(below[leading] - histogram[leading])
    cut = values[rank - before - 1]
    return int(cut), before + int(np.searchsorted(values, cut, side="right"))
