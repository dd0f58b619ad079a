"""What a run is trained and evaluated on: the train stream, the meta step's validation stream, evaluation sets.

The global batch of a step is a pure function of (seed, step), and ranks and micro-batches take row slices of it: the
data are the same at every layout and a run resumes at step N by asking for step N. Rows are packed: <s> and then
`length - 1` consecutive tokens of one language's text, without padding.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

import numpy as np

from mlinterf_ds.data.batch import MASK_SHARE, Batch, Masker, Windows, generator, key
from mlinterf_ds.data.tokenizer import EOS
from mlinterf_ds.errors import UserError

BLOCK = 1024  # steps whose languages are drawn together
Item = TypeVar("Item")


class TokenSource(Protocol):
    """What a prepared corpus offers."""

    @property
    def languages(self) -> Sequence[str]: ...
    @property
    def vocabulary_size(self) -> int: ...
    def sentences(self, language: str, split: str) -> int: ...
    def characters(self, language: str, split: str) -> int: ...
    def tokens(self, language: str, split: str) -> np.ndarray: ...  # flat, memory-mapped, every sentence ended by </s>
    def unchanged(self, language: str, split: str) -> bool: ...  # see Corpus.unchanged


def _chosen(corpus: TokenSource, languages: Sequence[str], length: int) -> tuple[str, ...]:
    """The user's languages, checked against the corpus."""
    unknown = [language for language in languages if language not in corpus.languages]
    if unknown or not languages or len(set(languages)) < len(languages):
        raise UserError(
            f"languages = {list(languages)}: expected one or more different languages of the corpus, "
            f"which has {', '.join(corpus.languages)}."
        )
    if length < 2:
        raise UserError(f"data.sequence_length = {length}: expected at least 2, for <s> and one token.")
    return tuple(languages)


def _windows(corpus: TokenSource, language: str, split: str, length: int, seed: int) -> Windows:
    """A language's split as windows for rows of `length`; their order depends on no other language."""
    if corpus.sentences(language, split) == 0:
        raise UserError(
            f"language {language!r}: its {split!r} split is empty. Give it more text and prepare the corpus again, "
            f"or take it out of `languages`."
        )
    unchanged = partial(corpus.unchanged, language, split)
    return Windows(corpus.tokens(language, split), length - 1, key(seed, "windows", split, language), unchanged)


def _texts(windows: Sequence[Windows], languages: np.ndarray, visits: np.ndarray) -> np.ndarray:
    """Row by row, the text of a language's visit: (rows,), (rows,) -> (rows, width)."""
    texts = np.empty((len(languages), windows[0].width), dtype=np.int64)
    for language in np.unique(languages):
        rows = languages == language
        texts[rows] = windows[language].visit(visits[rows])
    return texts


class Schedule:
    """How many rows of each language a step holds, and how many were seen before it.

    A step draws `rows` languages independently when `mixed`, one language for all its rows otherwise.
    """

    def __init__(self, probabilities: np.ndarray, rows: int, mixed: bool, seed: int) -> None:
        self.probabilities = probabilities  # (languages,)
        self._draws, self._rows_per_draw = (rows, 1) if mixed else (1, rows)
        self._source = key(seed, "languages", size=16)
        self._before = [np.zeros(len(probabilities), dtype=np.int64)]  # rows of each language before each block so far
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0))  # the last block looked at: steps usually come in order
        self._lock = threading.Lock()  # a prefetching thread and `seen` may ask at the same time

    def _counts(self, block: int) -> np.ndarray:
        """(BLOCK, languages) rows of each language in each step of a block; the lock is held."""
        if self._block[0] != block:
            draws = generator(self._source, block).multinomial(self._draws, self.probabilities, size=BLOCK)
            self._block = block, draws * self._rows_per_draw
        return self._block[1]

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of each language before `step` and in it: two arrays (languages,)."""
        assert step >= 0, step
        block, place = divmod(step, BLOCK)
        with self._lock:
            while len(self._before) <= block:
                last = len(self._before) - 1
                self._before.append(self._before[last] + self._counts(last).sum(axis=0))
            counts = self._counts(block)
            return self._before[block] + counts[:place].sum(axis=0), counts[place]


class TrainStream:
    """Batches for training, of `rows` sequences over all ranks and micro-batches.

    Languages come with P_i = (n_i / sum n)^(1/T), normalised, n_i in sentences: one for the whole step, or one for
    every row if `mixed` (rows are then sorted by language). A language's text does not depend on the other languages
    of the run.
    """

    def __init__(
        self,
        corpus: TokenSource,
        languages: Sequence[str],
        *,
        rows: int,
        length: int,
        seed: int,
        temperature: float = 1.0,
        mixed: bool = False,
        mask_share: float = MASK_SHARE,
        only: Sequence[str] | None = None,
    ) -> None:
        """only: languages that are trained on; the others keep their number and never come."""
        self.languages = _chosen(corpus, languages, length)
        if only is not None and (not only or set(only) - set(self.languages)):
            raise UserError(f"data.only = {','.join(only)}: expected one or more of {', '.join(self.languages)}")
        if not temperature > 0:
            raise UserError(f"data.temperature = {temperature}: expected a number above 0 (1 samples by size).")
        self.rows = rows
        self._masker = Masker(seed, "train", length, corpus.vocabulary_size, mask_share)
        self._windows = [_windows(corpus, language, "train", length, seed) for language in self.languages]
        sentences = np.array([corpus.sentences(language, "train") for language in self.languages], dtype=np.float64)
        smoothed = (sentences / sentences.max()) ** (1 / temperature)  # any common factor goes away in the next line
        if only is not None:
            smoothed *= np.isin(self.languages, list(only))
        self.probabilities = smoothed / smoothed.sum()  # (languages,)
        self._schedule = Schedule(self.probabilities, rows, mixed, seed)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows `start` to `stop` (by default all) of the global batch of `step`, all of equal weight."""
        stop = self.rows if stop is None else stop
        assert 0 <= start <= stop <= self.rows, (start, stop, self.rows)
        before, counts = self._schedule.at(step)
        languages = np.repeat(np.arange(len(counts)), counts)[start:stop]
        first_rows = np.cumsum(counts) - counts
        visits = before[languages] + np.arange(start, stop) - first_rows[languages]
        return self._masker.batch(
            _texts(self._windows, languages, visits),
            np.full(stop - start, 1 / (self.rows * self._masker.masked)),
            languages,
            tuple(np.flatnonzero(counts).tolist()),
            step=step,
            start=start,
        )

    def seen(self, step: int) -> dict[str, dict[str, float]]:
        """What training saw before `step`, by language: rows, text tokens, and epochs (tokens over the text's size)."""
        before, _ = self._schedule.at(step)
        seen: dict[str, dict[str, float]] = {}
        for language, windows, rows in zip(self.languages, self._windows, before.tolist(), strict=True):
            tokens = rows * windows.width
            seen[language] = {"rows": rows, "tokens": tokens, "epochs": tokens / len(windows.tokens)}
        return seen


class ValidationStream:
    """Batches of the `meta` split for the meta step: the loss is 1/L times the sum of the languages' mean losses.

    With `languages_per_step` = K below L, a step holds its own language at weight 1/L and K - 1 others, drawn
    uniformly without replacement, at (L - 1) / (L (K - 1)) each: unbiased, and exact in the step's own language.
    """

    def __init__(
        self,
        corpus: TokenSource,
        languages: Sequence[str],
        *,
        rows: int,
        length: int,
        seed: int,
        languages_per_step: int | None = None,
        mask_share: float = MASK_SHARE,
    ) -> None:
        self.languages = _chosen(corpus, languages, length)
        total = len(self.languages)
        self.per_step = total if languages_per_step is None else languages_per_step
        if not min(2, total) <= self.per_step <= total:
            raise UserError(
                f"meta.languages_per_step = {self.per_step}: expected 2 to {total}, the number of `languages` "
                f"(the step's own language and at least one other); leave it out to take all of them."
            )
        if rows < self.per_step:
            raise UserError(
                f"meta.batch = {rows}: a step's validation loss covers {self.per_step} languages and needs a row of "
                f"each. Set meta.batch to at least {self.per_step}, or meta.languages_per_step (2 or more) to fewer."
            )
        self.rows, self._seed = rows, seed
        self._masker = Masker(seed, "meta", length, corpus.vocabulary_size, mask_share)
        self._windows = [_windows(corpus, language, "meta", length, seed) for language in self.languages]
        for language, windows in zip(self.languages, self._windows, strict=True):
            if len(windows.tokens) < windows.width:
                raise UserError(
                    f"language {language!r}: its 'meta' split has {len(windows.tokens)} tokens, too few for one row of "
                    f"data.sequence_length = {length}. Give it more text or a larger meta split and prepare the corpus "
                    f"again, shorten data.sequence_length, or take the language out of `languages`."
                )

    def plan(self, step: int, language: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The step's languages, ascending, with their weights in the loss and their rows: three arrays (per_step,)."""
        total, held = len(self.languages), self.per_step
        assert 0 <= language < total and step >= 0, (language, step)
        others = np.delete(np.arange(total), language)
        if held < total:
            drawn = generator(key(self._seed, "meta languages", size=16), step).permutation(total - 1)
            others = others[drawn[: held - 1]]
        chosen = np.sort(np.append(others, language))
        weights = np.where(chosen == language, 1 / total, (total - 1) / (total * max(1, held - 1)))
        share, extra = divmod(self.rows, held)  # who gets one of the extra rows rotates from step to step
        counts = share + ((np.arange(held) - step * extra) % held < extra)
        return chosen, weights, counts

    def batch(self, step: int, language: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows `start` to `stop` of the global batch of `step`; `language`: index of the step's train language."""
        stop = self.rows if stop is None else stop
        assert 0 <= start <= stop <= self.rows, (start, stop, self.rows)
        chosen, weights, counts = self.plan(step, language)
        slot = np.repeat(np.arange(len(chosen)), counts)[start:stop]
        first_rows = np.cumsum(counts) - counts
        # Numbered by the step alone, with room for the extra row: no state, no repetition within an epoch. The numbers
        # that a step leaves unused are windows that sit the epoch out.
        visits = step * -(-self.rows // self.per_step) + np.arange(start, stop) - first_rows[slot]
        return self._masker.batch(
            _texts(self._windows, chosen[slot], visits),
            (weights / (counts * self._masker.masked))[slot],
            chosen[slot],
            tuple(chosen.tolist()),
            step=step,
            start=start,
        )


class EvaluationSet:
    """One language's split, once, under fixed masks: the same at any batch size.

    Windows follow each other; the last partial one is dropped, unless it is the only one: a text shorter than one
    window is repeated to fill a row. `max_rows` keeps that many windows, evenly spaced. Each prediction weighs one
    over their number.
    """

    def __init__(
        self,
        corpus: TokenSource,
        language: str,
        split: str,
        *,
        languages: Sequence[str],
        length: int,
        seed: int = 0,
        max_rows: int | None = None,
        mask_share: float = MASK_SHARE,
    ) -> None:
        self.corpus, self.language, self.split = corpus, language, split
        _chosen(corpus, [language], length)
        self.index = list(languages).index(language)  # the model's number for the language
        self._masker = Masker(seed, f"{split}/{language}", length, corpus.vocabulary_size, mask_share)
        self._windows = _windows(corpus, language, split, length, seed)
        windows = self._windows.count
        self.rows = windows if max_rows is None else min(windows, max_rows)
        self._starts = np.arange(self.rows) * windows // self.rows * (length - 1)
        self.predictions = self.rows * self._masker.masked

    def batch(self, start: int, stop: int) -> Batch:
        """Rows `start` to `stop`. Rows beyond the set repeat its last one at weight zero, to keep shapes equal."""
        numbers = np.arange(start, stop)
        return self._masker.batch(
            self._windows.at(self._starts[np.minimum(numbers, self.rows - 1)]),
            (numbers < self.rows) / self.predictions,
            np.full(len(numbers), self.index),
            (self.index,),
            step=0,
            start=start,
        )

    def batches(self, rows: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
        """This rank's share, at most `rows` at a time: equally many batches of one shape on every rank."""
        rows = min(rows, -(-self.rows // ranks))
        for first in range(0, self.rows, rows * ranks):
            yield self.batch(first + rank * rows, first + (rank + 1) * rows)

    @cached_property
    def counts(self) -> np.ndarray:
        """(vocabulary,) how often each piece occurs in the language's `train`; </s>, which is not predicted, counts 0."""
        counts = np.zeros(self.corpus.vocabulary_size, dtype=np.int64)
        train = self.corpus.tokens(self.language, "train")
        for first in range(0, len(train), 1 << 22):  # in pieces: memory stays flat on any corpus
            counts += np.bincount(train[first : first + (1 << 22)], minlength=len(counts))
        counts[EOS] = 0
        return counts

    def unigram_perplexity(self) -> float:
        """The baseline on these very predictions: frequencies in the language's `train`, plus one, over the vocabulary.

        </s> is left out of the counts since it is not predicted: the baseline is the stronger for it.
        """
        counts = self.counts
        surprisal = math.log(counts.sum() + len(counts)) - np.log(counts + 1.0)
        parts = (self.batch(first, min(first + 256, self.rows)) for first in range(0, self.rows, 256))
        return math.exp(sum(surprisal[part.labels.numpy()].sum() for part in parts) / self.predictions)

    def bits_per_character(self, nll_per_token: float) -> float:
        """Of a mean loss in nats per prediction, at the whole split's text tokens (without </s>) per character."""
        tokens = len(self._windows.tokens) - self.corpus.sentences(self.language, self.split)
        return bits_per_character(nll_per_token, tokens, self.corpus.characters(self.language, self.split))


def bits_per_character(nll_per_token: float, tokens: int, characters: int) -> float:
    """A loss in nats per token in bits per character of a text of that many tokens: comparable across vocabularies."""
    assert tokens > 0 and characters > 0, (tokens, characters)
    return nll_per_token / math.log(2) * tokens / characters


def prefetch(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, made up to `depth` ahead on another thread. Its errors are raised here; it ends when we stop."""
    made: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def produce() -> None:
        try:
            for item in items:
                made.put(("item", item))
                if stopped.is_set():
                    return
            made.put(("end", None))
        except BaseException as error:
            made.put(("error", error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        while thread.is_alive():  # a producer that waits for room finds some, sees that we stopped, and ends
            with contextlib.suppress(queue.Empty):
                made.get_nowait()
            thread.join(timeout=0.01)
