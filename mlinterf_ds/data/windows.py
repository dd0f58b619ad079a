"""A language's text as windows: rows of consecutive tokens, visited in a random order that any rank can compute.

Shapes: a window has `width` tokens, which make a row of `width + 1` once `<s>` stands before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from mlinterf_ds.data.batch import key
from mlinterf_ds.errors import UserError


class TokenSource(Protocol):
    """The part of a prepared corpus that streams and evaluation sets read."""

    @property
    def languages(self) -> Sequence[str]: ...
    @property
    def vocabulary_size(self) -> int: ...
    def sentences(self, language: str, split: str) -> int: ...
    def characters(self, language: str, split: str) -> int: ...
    def tokens(self, language: str, split: str) -> np.ndarray: ...  # flat, memory-mapped; `</s>` ends every sentence
    def unchanged(self, language: str, split: str) -> bool: ...  # see Corpus.unchanged


class Windows:
    """One language's text as a ring of windows of `width` tokens; an epoch visits each window once, in a new order.

    Every epoch shifts the window borders by a random amount; the fewer than `width` tokens that then fill no window are
    left out of that epoch. A text shorter than one window is repeated to fill it.
    """

    def __init__(
        self, tokens: np.ndarray, width: int, source: int, unchanged: Callable[[], bool] = lambda: True
    ) -> None:
        """`source` keys the order. `unchanged` says whether the file of `tokens` stayed as it was since the last call, and
        raises UserError if its contents were altered."""
        assert len(tokens) > 0 and width > 0, (len(tokens), width)
        self._unchanged = unchanged
        self.tokens = np.asarray(tokens)  # flat; stays memory-mapped
        self.width = width
        self.count = max(1, len(tokens) // width)
        self._source = np.uint64(source)

    def visit(self, visits: np.ndarray) -> np.ndarray:
        """Returns the text of visits by number (0, 1, ... over all epochs): (n,) -> (n, width) int64."""
        epoch, index = np.divmod(visits, self.count)
        keys = mix(self._source ^ mix(epoch.astype(np.uint64) + np.uint64(1)))
        shift = (mix(keys) % np.uint64(len(self.tokens))).astype(np.int64)
        return self.at(shuffled(index, self.count, keys) * self.width + shift)

    def at(self, starts: np.ndarray) -> np.ndarray:
        """Returns the `width` tokens from each start on; the text's end leads to its beginning: (n,) -> (n, width) int64."""
        indices = (starts[:, None] + np.arange(self.width)) % len(self.tokens)
        self._unchanged()  # asked first: reading mapped memory behind the end of a file that was cut kills the process
        while True:
            text = self.tokens[indices].astype(np.int64)
            if self._unchanged():  # else the file may have been altered, and put right again, during the read
                return text


def split_windows(corpus: TokenSource, language: str, split: str, length: int, seed: int) -> Windows:
    """Returns a language's split as windows for rows of `length`. Their order depends on no other language.

    Raises UserError if the split is empty.
    """
    if corpus.sentences(language, split) == 0:
        raise UserError(
            f"language {language!r}: its {split!r} split is empty. Give it more text and prepare the corpus again, "
            "or take it out of `languages`."
        )
    unchanged = partial(corpus.unchanged, language, split)
    return Windows(corpus.tokens(language, split), length - 1, key(seed, "windows", split, language), unchanged)


def mix(x: np.ndarray) -> np.ndarray:
    """Scrambles 64-bit words (uint64, at least 1-d) by the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Maps each index through a pseudo-random permutation of `range(size)`, which the key beside it selects.

    Shapes: index (n,), keys (n,) uint64 -> (n,) int64. A Feistel network permutes the next power of two; an index is
    mapped again until it is below `size`. No permutation is held in memory, so that the cost is that of the indices
    asked for, however large the corpus.
    """
    bits = (size - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    values = index.astype(np.uint64)
    pending = np.arange(len(values))
    while pending.size:
        k, low, high = keys[pending], values[pending] & low_mask, values[pending] >> low_bits
        for turn in range(1, 16, 2):  # with fewer turns some orders of five windows are likelier than others
            high = high ^ (mix(k * np.uint64(turn) + low) & high_mask)
            low = low ^ (mix(k * np.uint64(turn) + ~high) & low_mask)
        values[pending] = high << low_bits | low
        pending = pending[values[pending] >= size]
    return values.astype(np.int64)
