"""A language's text as windows: rows of consecutive tokens, visited in a random order that any rank can compute.

Shapes: a window has `width` tokens, which make a row of `width + 1` once `<s>` stands before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import numpy as np

from mlinterf_ds.data.tokenizer import EOS, Vocabulary
from mlinterf_ds.errors import UserError
from mlinterf_ds.sections import RowFormat

FARTHEST_END = 1 << 16  # tokens from the middle of a text in which a document or a sentence must begin


class TokenSource(Protocol):
    """The part of a prepared corpus that streams and evaluation sets read."""

    @property
    def languages(self) -> Sequence[str]: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    def sentences(self, language: str, split: str) -> int: ...
    def characters(self, language: str, split: str) -> int: ...
    def tokens(self, language: str, split: str) -> np.ndarray: ...  # flat, memory-mapped; `</s>` ends every sentence
    def unchanged(self, language: str, split: str) -> bool: ...  # see Corpus.unchanged
    def starts_document(self, language: str, split: str, offsets: np.ndarray) -> np.ndarray: ...  # see Corpus's


class Windows:
    """One language's text as a ring of windows of `width` tokens; an epoch visits each window once, in a new order.

    Every epoch shifts the window borders by a random amount; the fewer than `width` tokens that then fill no window are
    left out of that epoch. A text shorter than one window is repeated to fill it.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        width: int,
        source: int,
        starts_segment: Callable[[np.ndarray], np.ndarray] | None = None,
        unchanged: Callable[[], bool] = lambda: True,
        eos: int = EOS,
    ) -> None:
        """`source` keys the order. `starts_segment` says of the offsets of sentences' first tokens, (n,) -> (n,) bool, which
        of them begin a segment; None: all do. `unchanged` says whether the files of the text stayed as they were since the
        last call, and raises UserError if their contents were altered. `eos` ends a sentence."""
        assert len(tokens) > 0 and width > 0, (len(tokens), width)
        self._starts_segment, self._unchanged, self._eos = starts_segment, unchanged, eos
        self.tokens = np.asarray(tokens)  # flat; stays memory-mapped
        self.width = width
        self.count = max(1, len(tokens) // width)
        self._source = np.uint64(source)

    def visit(self, visits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the text of visits by number (0, 1, ... over all epochs), as `at` does. visits: (n,)."""
        return self.at(self.starts(visits))

    def starts(self, visits: np.ndarray) -> np.ndarray:
        """Returns the offset of each visit's first token: (n,) -> (n,) int64, below the number of tokens."""
        epoch, index = np.divmod(visits, self.count)
        keys = mix(self._source ^ mix(epoch.astype(np.uint64) + np.uint64(1)))
        shift = (mix(keys) % np.uint64(len(self.tokens))).astype(np.int64)
        return (shuffled(index, self.count, keys) * self.width + shift) % len(self.tokens)

    def at(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the `width` tokens from each start on, and whether a segment begins at each: (n, width) int64 and bool.

        starts: (n,). The text's end leads to its beginning. The first token of a window begins no segment: it continues the
        one of the `<s>` before it.
        """
        indices = (starts[:, None] + np.arange(self.width)) % len(self.tokens)
        self._unchanged()  # asked first: reading mapped memory behind the end of a file that was cut kills the process
        while True:
            text = self.tokens[indices].astype(np.int64)
            begins = np.zeros(text.shape, dtype=bool)
            begins[:, 1:] = text[:, :-1] == self._eos
            if self._starts_segment is not None:
                begins[begins] = self._starts_segment(indices[begins]) | (indices[begins] == 0)
            if self._unchanged():  # else the files may have been altered, and put right again, during the read
                return text, begins

    def beside(self, taken: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Returns the offsets of windows that have no token in common with those that start at `taken`.

        taken: (m,) offsets, m may be 0; draws: (n,) uniform numbers in [0, 1), which choose among all such windows -> (n,)
        int64. Where the taken windows leave no room for another between them, every offset is as likely as any other.
        """
        size = len(self.tokens)
        anywhere = (draws * size).astype(np.int64)
        if not len(taken):
            return anywhere
        first = np.unique(taken)
        following = np.append(first[1:], first[0] + size)
        free = np.maximum(0, following - first - 2 * self.width + 1)  # offsets between each two that a window may have
        if not free.any():
            return anywhere
        ends = np.cumsum(free)
        index = (draws * ends[-1]).astype(np.int64)
        gap = np.searchsorted(ends, index, side="right")
        return (first[gap] + self.width + index - (ends[gap] - free[gap])) % size


Half = Literal["first", "second"]


def split_windows(
    corpus: TokenSource, language: str, split: str, row_format: RowFormat, source: int, half: Half | None = None
) -> Windows:
    """Returns a language's split, or a half of it, as windows for rows of this format. `source` keys their order.

    Raises UserError if the split is empty.
    """
    if corpus.sentences(language, split) == 0:
        remedy = "Give it more text and prepare the corpus again, or take it out of `languages`."
        if split == "meta":
            remedy = (
                "Set meta.text=train or meta.text=half; only a corpus that tools/prepare_corpus.py prepared with --meta-split "
                "has one, and synthetic ones and those of studies have none."
            )
        raise UserError(f"language {language!r}: its {split!r} split is empty. {remedy}")
    tokens, offset, eos = corpus.tokens(language, split), 0, corpus.vocabulary.eos
    if half:
        middle = len(tokens) // 2
        ends = middle + np.flatnonzero(np.asarray(tokens[middle : middle + FARTHEST_END]) == eos) + 1
        ends = ends[ends < len(tokens)]  # where sentences begin
        documents = ends[corpus.starts_document(language, split, ends)] if len(ends) else ends
        middle = int(next(iter([*documents[:1], *ends[:1]]), middle))
        if not 0 < middle < len(tokens):
            raise UserError(
                f"language {language!r}: its {split!r} split is too short to be read in two halves: give it more text and "
                "prepare the corpus again, or set meta.text=train"
            )
        tokens, offset = (tokens[:middle], 0) if half == "first" else (tokens[middle:], middle)

    def starts_document(offsets: np.ndarray) -> np.ndarray:
        return corpus.starts_document(language, split, offsets + offset)

    starts_segment = starts_document if row_format.boundaries == "document" else None
    unchanged = partial(corpus.unchanged, language, split)
    return Windows(tokens, row_format.length - 1, source, starts_segment, unchanged, eos)


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
