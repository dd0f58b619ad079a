"""The rows that score a model on a language's text, the baseline on the same rows, and bits per character."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from mlinterf_ds.data.batch import Batch, Masker, key
from mlinterf_ds.data.stream import checked_languages
from mlinterf_ds.data.windows import TokenSource, split_windows
from mlinterf_ds.sections import RowFormat

TOKENS_AT_ONCE = 1 << 22  # tokens that are counted at once, so that memory stays flat on any corpus


class EvaluationSet:
    """One language's split, read once under fixed masks: the predictions are the same at any batch size.

    Windows follow each other; the last partial one is dropped, unless it is the only one: a text shorter than one window
    is repeated to fill a row, where its copies do not see each other. `max_rows` keeps that many windows, evenly spaced. Every prediction has the same weight, and
    the weights sum to 1.
    """

    def __init__(
        self,
        corpus: TokenSource,
        language: str,
        split: str,
        *,
        languages: Sequence[str],
        row_format: RowFormat,
        seed: int = 0,
        max_rows: int | None = None,
    ) -> None:
        """`languages` are the model's, in its order. Raises UserError if the corpus lacks `language` or its split is empty."""
        self.corpus, self.language, self.split = corpus, language, split
        checked_languages(corpus, [language], row_format.length)
        self.index = list(languages).index(language)  # the model's number for the language
        if row_format.boundaries == "none" and len(corpus.tokens(language, split)) < row_format.length - 1:
            # else each copy would show what is masked in another
            row_format = replace(row_format, boundaries="document")
        self._masker = Masker(seed, f"{split}/{language}", row_format, corpus.vocabulary)
        self._windows = split_windows(corpus, language, split, row_format, key(seed, "windows", split, language))
        windows = self._windows.count
        self.rows = windows if max_rows is None else min(windows, max_rows)
        self._starts = np.arange(self.rows) * windows // self.rows * self._windows.width
        self.predictions = self.rows * self._masker.masked

    def batch(self, start: int, stop: int) -> Batch:
        """Returns rows `start` to `stop`. Rows beyond the set repeat its last one at weight 0, which keeps shapes equal."""
        numbers = np.arange(start, stop)
        return self._masker.batch(
            *self._windows.at(self._starts[np.minimum(numbers, self.rows - 1)]),
            (numbers < self.rows) / self.predictions,
            np.full(len(numbers), self.index),
            (self.index,),
            step=0,
            start=start,
        )

    def batches(self, rows: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """Yields this rank's share, at most `rows` at a time: equally many batches of one shape on every rank."""
        rows = min(rows, -(-self.rows // ranks))
        for first in range(0, self.rows, rows * ranks):
            yield self.batch(first + rank * rows, first + (rank + 1) * rows)

    @cached_property
    def counts(self) -> np.ndarray:
        """(vocabulary,) how often each piece occurs in the language's `train`; `</s>`, which is not predicted, counts 0."""
        counts = piece_counts(self.corpus, self.language)
        counts[self.corpus.vocabulary.eos] = 0
        return counts

    def unigram_perplexity(self) -> float:
        """Returns the perplexity of a baseline on the same predictions: smoothed frequencies in the language's `train`.

        Each piece counts one more than it occurs. `</s>`, which is not predicted, is left out, which favours the baseline.
        """
        counts = self.counts
        surprisal = math.log(counts.sum() + len(counts)) - np.log(counts + 1.0)
        parts = (self.batch(first, min(first + 256, self.rows)) for first in range(0, self.rows, 256))
        return math.exp(sum(surprisal[part.labels.numpy()].sum() for part in parts) / self.predictions)

    def bits_per_character(self, nll_per_token: float) -> float:
        """Converts a mean loss in nats per prediction, at the whole split's tokens (without `</s>`) per character."""
        tokens = len(self._windows.tokens) - self.corpus.sentences(self.language, self.split)
        return bits_per_character(nll_per_token, tokens, self.corpus.characters(self.language, self.split))


def piece_counts(corpus: TokenSource, language: str) -> np.ndarray:
    """(vocabulary,) int64: how often each piece occurs in the language's `train`."""
    counts, train = np.zeros(corpus.vocabulary.size, dtype=np.int64), corpus.tokens(language, "train")
    for first in range(0, len(train), TOKENS_AT_ONCE):
        counts += np.bincount(train[first : first + TOKENS_AT_ONCE], minlength=len(counts))
    return counts


def bits_per_character(nll_per_token: float, tokens: int, characters: int) -> float:
    """Converts a loss in nats per token of a text with this many tokens and characters.

    Of masked tokens it depends less on the vocabulary than perplexity does, but still favours short pieces, which see the rest
    of their word.
    """
    assert tokens > 0 and characters > 0, (tokens, characters)
    return nll_per_token / math.log(2) * tokens / characters
