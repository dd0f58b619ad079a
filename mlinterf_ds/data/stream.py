"""The batches that a run trains on: the train stream, and the validation stream of the meta step.

The global batch of a step is a pure function of (seed, step), and ranks and micro-batches take row slices of it: the
data are the same at every layout, and a run resumes at step N by asking for step N. Rows are packed: `<s>` and then
`length - 1` consecutive tokens of one language's text, without padding.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from mlinterf_ds.data.batch import Batch, Masker, generator, joined, key
from mlinterf_ds.data.windows import Half, TokenSource, Windows, split_windows
from mlinterf_ds.errors import UserError
from mlinterf_ds.sections import MetaText, RowFormat

BLOCK = 1024  # steps whose languages are drawn together
Item = TypeVar("Item")


def checked_languages(corpus: TokenSource, languages: Sequence[str], length: int) -> tuple[str, ...]:
    """Returns `languages`. Raises UserError unless they are different languages of the corpus and a row can hold text."""
    unknown = [language for language in languages if language not in corpus.languages]
    if unknown or not languages or len(set(languages)) < len(languages):
        raise UserError(
            f"languages = {list(languages)}: expected one or more different languages of the corpus, "
            f"which has {', '.join(corpus.languages)}."
        )
    if length < 2:
        raise UserError(f"data.sequence_length = {length}: expected at least 2, for <s> and one token.")
    return tuple(languages)


def _texts(windows: Sequence[Windows], languages: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each row its language's text from `starts` on, and where segments begin: two arrays (rows, width)."""
    shape = len(languages), windows[0].width
    texts, begins = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=bool)
    for language in np.unique(languages):
        rows = languages == language
        texts[rows], begins[rows] = windows[language].at(starts[rows])
    return texts, begins


class Schedule:
    """Draws how many rows of each language a step holds, and knows how many rows came before it.

    A step draws a language for each of its `rows` if `mixed`, else one language for all of them.
    """

    def __init__(self, probabilities: np.ndarray, rows: int, mixed: bool, seed: int) -> None:
        self.probabilities = probabilities  # (languages,)
        self._draws, self._rows_per_draw = (rows, 1) if mixed else (1, rows)
        self._source = key(seed, "languages", size=16)
        self._before = [np.zeros(len(probabilities), dtype=np.int64)]  # rows of each language before each block so far
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0))  # the block drawn last: steps usually come in order
        self._lock = threading.Lock()  # a prefetching thread and `seen` may ask at the same time

    def _counts(self, block: int) -> np.ndarray:
        """Returns (BLOCK, languages): each language's rows in each step of a block. The caller holds the lock."""
        if self._block[0] != block:
            draws = generator(self._source, block).multinomial(self._draws, self.probabilities, size=BLOCK)
            self._block = block, draws * self._rows_per_draw
        return self._block[1]

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns each language's rows before `step` and in it: two arrays (languages,)."""
        assert step >= 0, step
        block, offset = divmod(step, BLOCK)
        with self._lock:
            while len(self._before) <= block:
                last = len(self._before) - 1
                self._before.append(self._before[last] + self._counts(last).sum(axis=0))
            counts = self._counts(block)
            return self._before[block] + counts[:offset].sum(axis=0), counts[offset]


class TrainStream:
    """Batches for training, of `rows` sequences over all ranks and micro-batches.

    Language i, with n_i training sentences, is drawn with probability P_i proportional to (n_i / sum n)^(1/T): once for
    the whole step, or once a row if `mixed` (rows are then sorted by language). The order of a language's text does not
    depend on the run's other languages.
    """

    def __init__(
        self,
        corpus: TokenSource,
        languages: Sequence[str],
        *,
        rows: int,
        row_format: RowFormat,
        seed: int,
        temperature: float = 1.0,
        mixed: bool = False,
        only: Sequence[str] | None = None,
        half: Half | None = None,
    ) -> None:
        """`only` names the languages that are drawn; the others keep their index. `half`: of each text, all that is read.

        Raises UserError for unusable settings.
        """
        self.languages = checked_languages(corpus, languages, row_format.length)
        if only is not None and (not only or set(only) - set(self.languages)):
            raise UserError(f"data.only = {','.join(only)}: expected one or more of {', '.join(self.languages)}")
        if not temperature > 0:
            raise UserError(f"data.temperature = {temperature}: expected a number above 0 (1 samples by size).")
        self.rows = rows
        self._masker = Masker(seed, "train", row_format, corpus.vocabulary)
        self._windows = [
            split_windows(corpus, language, "train", row_format, key(seed, "windows", "train", language), half)
            for language in self.languages
        ]
        sentences = np.array([corpus.sentences(language, "train") for language in self.languages], dtype=np.float64)
        smoothed = (sentences / sentences.max()) ** (1 / temperature)  # the sum below cancels the common factor
        if only is not None:
            smoothed *= np.isin(self.languages, list(only))
        self.probabilities = smoothed / smoothed.sum()  # (languages,)
        self._mixed = mixed
        self._schedule = Schedule(self.probabilities, rows, mixed, seed)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Returns rows `start` to `stop` (default: all) of the global batch of `step`, all of equal weight."""
        stop = self.rows if stop is None else stop
        assert 0 <= start <= stop <= self.rows, (start, stop, self.rows)
        languages, starts = self._starts(step, start, stop)
        return self._masker.batch(
            *_texts(self._windows, languages, starts),
            np.full(stop - start, 1 / (self.rows * self._masker.masked)),
            languages,
            self._step_languages(step),
            step=step,
            start=start,
        )

    def _step_languages(self, step: int) -> tuple[int, ...]:
        return tuple(np.flatnonzero(self._schedule.at(step)[1]).tolist())

    def _starts(self, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the language of each of the step's rows from `start` to `stop`, and its window's offset: two (rows,)."""
        before, counts = self._schedule.at(step)
        languages = np.repeat(np.arange(len(counts)), counts)[start:stop]
        first_rows = np.cumsum(counts) - counts
        visits = before[languages] + np.arange(start, stop) - first_rows[languages]
        starts = np.empty(stop - start, dtype=np.int64)
        for language in np.unique(languages):
            rows = languages == language
            starts[rows] = self._windows[language].starts(visits[rows])
        return languages, starts

    def read(self, step: int, language: int) -> np.ndarray:
        """Returns the offsets of the windows of a language's training text that the step reads: (n,)."""
        languages, starts = self._starts(step, 0, self.rows)
        return starts[languages == language]

    @property
    def together(self) -> list[int]:
        """The numbers of the languages that are drawn, if a step mixes them; else none."""
        return np.flatnonzero(self.probabilities).tolist() if self._mixed else []

    def language(self, step: int) -> int | None:
        """Returns the number of a step's one language; None where a step mixes languages."""
        if self._mixed:
            return None
        (index,) = np.flatnonzero(self._schedule.at(step)[1])
        return int(index)

    def seen(self, step: int, validation: ValidationStream | None = None) -> dict[str, dict[str, float]]:
        """Returns what training saw before `step`, by language: rows, tokens of text, and epochs (tokens over all tokens).

        validation: given where the rows of the validation loss train the shared parameters too (`meta.reuse`).
        """
        before, _ = self._schedule.at(step)
        sizes = [len(windows.tokens) for windows in self._windows]
        if validation:
            before = before + validation.rows_before(step)
            sizes = [own + other for own, other in zip(sizes, validation.further_tokens(), strict=True)]
        width = self._windows[0].width
        return {
            language: {"rows": rows, "tokens": rows * width, "epochs": rows * width / size}
            for language, rows, size in zip(self.languages, before.tolist(), sizes, strict=True)
        }


class ValidationStream:
    """Batches for the validation loss of the meta step: the mean over the L languages of each one's mean loss.

    Their text is one of three (`meta.text`): "train", windows of the training text that the step does not read, drawn anew
    in every step; "half", the second half of the training text, whose first half the training stream then reads (as in
    DARTS; Liu et al., 2019); "held_out", the corpus's `meta` split.

    With `languages_per_step` = K below L, a step holds its own language at weight 1/L and K - 1 others, drawn uniformly
    without replacement, at weight (L - 1) / (L (K - 1)) each: the loss is unbiased, and exact in the step's own language.
    A step that mixes languages has none of its own: it holds K at weight 1/K each.
    """

    def __init__(
        self,
        corpus: TokenSource,
        languages: Sequence[str],
        *,
        rows: int,
        row_format: RowFormat,
        seed: int,
        languages_per_step: int | None = None,
        text: MetaText = "held_out",
        training: TrainStream | None = None,
        every: int = 1,
    ) -> None:
        """`training` is the stream whose rows those of text="train" avoid; every `every`-th of its steps is a meta step.

        Raises UserError for unusable settings.
        """
        assert text != "train" or training is not None
        self.languages = checked_languages(corpus, languages, row_format.length)
        total = len(self.languages)
        self.per_step = total if languages_per_step is None else languages_per_step
        self.rows, self._seed = rows, seed
        self._check_rows()
        self._masker = Masker(seed, "meta", row_format, corpus.vocabulary)
        self._training, self._every, self._beside = training, every, text == "train"
        # a step, and the rows of each language in the meta steps before it
        self._counted = 0, np.zeros(total, dtype=np.int64)
        split = "meta" if text == "held_out" else "train"
        half: Half | None = "second" if text == "half" else None
        self._windows = [
            split_windows(corpus, language, split, row_format, key(seed, "windows", "meta", language), half)
            for language in self.languages
        ]
        self._check_texts("the second half of its 'train'" if half else f"its {split!r}")

    def _check_rows(self) -> None:
        """Raises UserError unless a step has a row of each of its languages, which are two or more."""
        total = len(self.languages)
        if not min(2, total) <= self.per_step <= total:
            raise UserError(
                f"meta.languages_per_step = {self.per_step}: expected 2 to {total}, the number of `languages` "
                f"(the step's own language and at least one other); leave it out to take all of them."
            )
        if self.rows < self.per_step:
            raise UserError(
                f"meta.batch = {self.rows}: a step's validation loss covers {self.per_step} languages and needs a row of "
                f"each. Set meta.batch (in plain training data.meta_rows) to at least {self.per_step}, or "
                "meta.languages_per_step (2 or more) to fewer."
            )

    def _check_texts(self, part: str) -> None:
        """Raises UserError if a language's text is too short; part: which split that is, in words."""
        needed, wanted = 1, "a row"
        if self._beside:
            needed, wanted = 2, "two separate rows, one for training and one for the validation loss,"
        for language, windows in zip(self.languages, self._windows, strict=True):
            if len(windows.tokens) < needed * windows.width:
                raise UserError(
                    f"language {language!r}: {part} split has {len(windows.tokens)} tokens, too few for {wanted} of "
                    f"data.sequence_length = {windows.width + 1}. Give it more text and prepare the corpus again, shorten "
                    "data.sequence_length, or take the language out of `languages`."
                )

    def crowded(self) -> list[str]:
        """Returns the languages whose training text may leave a step's validation rows no room beside its own."""
        if self._training is None or not self._beside:
            return []
        pairs = zip(self.languages, self._windows, strict=True)
        return [language for language, windows in pairs if windows.count < 2 * self._training.rows]

    def rows_before(self, step: int) -> np.ndarray:
        """Returns how many rows of each language the meta steps before `step` read: (languages,)."""
        assert self._training is not None
        counted, rows = self._counted
        if step < counted:
            counted, rows = 0, np.zeros_like(rows)
        for earlier in range(-(-counted // self._every) * self._every, step, self._every):
            chosen, _, counts = self.plan(earlier, self._training.language(earlier))
            rows[chosen] += counts
        self._counted = step, rows
        return rows.copy()

    def further_tokens(self) -> list[int]:
        """Returns how many tokens of each language's text it reads that training proper does not."""
        return [0 if self._beside else len(windows.tokens) for windows in self._windows]

    def plan(self, step: int, language: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the step's languages, ascending, their weights in the loss and their rows: three arrays (per_step,).

        language: the step's own; None where it mixes languages.
        """
        total, per_step = len(self.languages), self.per_step
        assert step >= 0, step
        own = np.array([] if language is None else [language], dtype=np.int64)
        others = np.delete(np.arange(total), own)
        drawn, each = others, 1 / total
        if per_step < total:
            wanted = per_step - len(own)
            order = generator(key(self._seed, "meta languages", size=16), step).permutation(len(others))
            drawn, each = others[order[:wanted]], len(others) / (total * wanted)
        chosen = np.sort(np.append(drawn, own))
        weights = np.where(np.isin(chosen, own), 1 / total, each)
        share, extra = divmod(self.rows, per_step)  # each step gives the extra rows to other languages
        counts = share + ((np.arange(per_step) - step * extra) % per_step < extra)
        return chosen, weights, counts

    def batch(self, step: int, language: int | None, start: int = 0, stop: int | None = None) -> Batch:
        """Returns rows `start` to `stop` (default: all) of the global batch of `step`; language: see `plan`."""
        stop = self.rows if stop is None else stop
        assert 0 <= start <= stop <= self.rows, (start, stop, self.rows)
        chosen, weights, counts = self.plan(step, language)
        slot = np.repeat(np.arange(len(chosen)), counts)[start:stop]
        return self._masker.batch(
            *_texts(self._windows, chosen[slot], self._starts(step, chosen, counts)[start:stop]),
            (weights / (counts * self._masker.masked))[slot],
            chosen[slot],
            tuple(chosen.tolist()),
            step=step,
            start=start,
        )

    def _starts(self, step: int, chosen: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Returns the offset of each of the step's rows in its language's text: (rows,)."""
        starts: list[np.ndarray] = []
        draws = generator(key(self._seed, "meta windows", size=16), step).random(self.rows)
        for language, own in zip(chosen, np.split(draws, np.cumsum(counts)[:-1]), strict=True):
            windows = self._windows[language]
            if self._training is not None and self._beside:
                starts.append(windows.beside(self._training.read(step, language), own))
            else:
                # Visits are numbered by the step alone, with room for an extra row: there is no state, and no window comes
                # twice in an epoch. A window whose number a step leaves unused is left out of that epoch.
                starts.append(windows.starts(step * -(-self.rows // self.per_step) + np.arange(len(own))))
        return np.concatenate(starts)


def _halved(batch: Batch) -> Batch:
    """Returns the batch with half the weight."""
    return replace(batch, weights=batch.weights / 2)


class MetaRowsStream(TrainStream):
    """Batches of plain training on the very rows of a meta step: those that it trains on, and those of its validation loss.

    Both losses count half, as a meta step counts them that trains on every row (`meta.reuse`) and all languages (`data.mixed`).
    What differs between a run of such steps and one on these batches is the treatment alone: text, order and masks are the same.
    """

    def __init__(
        self,
        corpus: TokenSource,
        languages: Sequence[str],
        *,
        rows: int,
        meta_rows: int,
        row_format: RowFormat,
        seed: int,
        text: MetaText = "train",
        languages_per_step: int | None = None,
        **training: Any,
    ) -> None:
        """Of a step's `rows`, the last `meta_rows` are those of the validation loss. The rest is as for the other streams."""
        common: dict[str, Any] = {"row_format": row_format, "seed": seed}
        super().__init__(corpus, languages, rows=rows - meta_rows, **common, **training)
        self._validation = ValidationStream(
            corpus, languages, rows=meta_rows, languages_per_step=languages_per_step, text=text, training=self, **common
        )

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Returns rows `start` to `stop` (default: all) of the global batch of `step`."""
        own, other = self.rows, self._validation.rows
        stop = own + other if stop is None else stop
        assert 0 <= start <= stop <= own + other, (start, stop, own, other)
        language = self.language(step)
        languages = {*self._step_languages(step), *self._validation.plan(step, language)[0].tolist()}
        parts = []
        if start < own or stop <= own:
            parts.append(_halved(super().batch(step, start, min(stop, own))))
        if stop > own:
            parts.append(_halved(self._validation.batch(step, language, max(start, own) - own, stop - own)))
        return replace(joined(parts), step_languages=tuple(sorted(languages)))

    def seen(self, step: int, validation: ValidationStream | None = None) -> dict[str, dict[str, float]]:
        """Returns what training saw before `step`, as TrainStream's, the rows of the validation loss included."""
        return super().seen(step, self._validation)


def prefetch(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """Yields the items, made up to `depth` ahead on another thread. That thread's errors are raised here, and it ends when
    the caller stops asking."""
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
        while thread.is_alive():  # room for an item lets a waiting producer go on, see the event and end
            with contextlib.suppress(queue.Empty):
                made.get_nowait()
            thread.join(timeout=0.01)
