"""The batch that a model is trained on: its tensors, the keys of its randomness, and masking.

All randomness is counter based: a draw is a function of (seed, purpose, step, row) and of nothing that was drawn before,
so that any rank can compute any slice of any step.

Shapes: rows = the sequences of this slice; length = `<s>` and `length - 1` tokens of text; masked = the predicted
positions of a row, equally many in every row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlinterf_ds.data.tokenizer import Vocabulary
from mlinterf_ds.sections import RowFormat

REPLACED_BY_MASK, REPLACED_AT_RANDOM = 0.8, 0.1  # BERT's proportions of the masked; the remaining tenth is kept


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one micro-batch. The loss is `(weights * cross_entropy).sum()`, summed over all slices."""

    tokens: Tensor  # (rows, length) int64: input ids, some of them masked
    positions: Tensor  # (rows, masked) int64: the columns to predict, ascending
    labels: Tensor  # (rows, masked) int64: the original ids at these positions
    weights: Tensor  # (rows, masked) float32: each prediction's weight in the loss; they sum to 1 over the global batch
    languages: Tensor  # (rows,) int64: index into the stream's `languages`
    step_languages: tuple[int, ...]  # the languages of the whole global batch, ascending: the same on all ranks
    dropout_seed: int  # replays this slice's dropout: a function of (seed, purpose, step, first row)
    segment_ids: Tensor | None = None  # (rows, length) int32: tokens see those of the same number; None: the whole row
    position_ids: Tensor | None = None  # (rows, length) int64: which position embedding a token gets; None: its column

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with its tensors on `device`, except `languages`: routing reads them on the CPU.

        From page-locked memory (`pinned`) they are copied while the program goes on.
        """
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Returns the batch with the tensors that `to` copies in page-locked memory; it needs an accelerator."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if torch.is_tensor(value) and name != "languages"
        }
        return replace(self, **changed)


def joined(batches: Sequence[Batch]) -> Batch:
    """Returns the rows of all these as one slice, with the first one's languages of the step and dropout."""
    first = batches[0]
    tensors: dict[str, Any] = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name, value in vars(first).items()
        if torch.is_tensor(value)
    }
    return replace(first, **tensors)


def key(*parts: int | str, size: int = 8) -> int:
    """Returns a hash of `size` bytes that names a source of randomness, for example `key(seed, "masks")`."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=size).digest(), "little")


def generator(source: int, index: int = 0, skip: int = 0) -> np.random.Generator:
    """Returns Philox generator number `index` of the 16-byte key `source`, advanced by `skip` blocks of four 64-bit words."""
    words = np.array([source & (2**64 - 1), source >> 64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words, counter=np.array([skip, index, 0, 0], dtype=np.uint64)))


def row_draws(source: int, step: int, start: int, stop: int, length: int, masked: int) -> np.ndarray:
    """Draws uniform numbers for rows `start` to `stop` of `step`: (rows, at least length - 1 + 2 * masked) float64.

    Every row owns a fixed stretch of the step's Philox sequence, so that the draws of a slice are a slice of the draws.
    """
    blocks = -(-(length - 1 + 2 * masked) // 4)
    return generator(source, step, skip=start * blocks).random((stop - start, 4 * blocks))


def mask_rows(
    rows: np.ndarray, draws: np.ndarray, masked: int, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks `masked` positions of each row: returns input ids (rows, length), positions and labels (rows, masked).

    Positions are uniform over a row's tokens of text, `<unk>` included. `<s>` (column 0) is never masked, `</s>` only in a
    row with fewer than `masked` other tokens. Of the masked positions 80% become `<mask>`, 10% a uniformly drawn ordinary
    piece, and 10% keep their token.
    """
    ordinary = vocabulary.ordinary
    assert len(ordinary) and rows.shape[1] > masked, (vocabulary.size, rows.shape, masked)
    candidates = rows.shape[1] - 1
    # Draws are below 1: adding 1 puts every </s> after all other tokens.
    order = draws[:, :candidates] + (rows[:, 1:] == vocabulary.eos)
    columns = np.argpartition(order, masked - 1, axis=1)[:, :masked]
    positions = np.sort(columns, axis=1) + 1
    labels = np.take_along_axis(rows, positions, axis=1)
    action, piece = draws[:, candidates : candidates + masked], draws[:, candidates + masked : candidates + 2 * masked]
    random_piece = ordinary[(piece * len(ordinary)).astype(np.int64)]
    kept_or_random = np.where(action < REPLACED_BY_MASK + REPLACED_AT_RANDOM, random_piece, labels)
    tokens = rows.copy()
    np.put_along_axis(tokens, positions, np.where(action < REPLACED_BY_MASK, vocabulary.mask, kept_or_random), axis=1)
    return tokens, positions, labels


@dataclass(frozen=True)
class Masker:
    """Turns windows of text into batches of one purpose ("train", "meta", "valid/en"), which has its own randomness."""

    seed: int
    purpose: str
    row_format: RowFormat
    vocabulary: Vocabulary

    @property
    def masked(self) -> int:
        """How many positions of a row are predicted."""
        return self.row_format.masked

    def batch(
        self,
        text: np.ndarray,  # (rows, length - 1) int64
        begins: np.ndarray,  # (rows, length - 1) bool: a segment begins at this token (see `Windows.at`)
        weights: np.ndarray,  # (rows,) the weight of each prediction of a row
        languages: np.ndarray,  # (rows,)
        step_languages: tuple[int, ...],
        *,
        step: int,
        start: int,
    ) -> Batch:
        """Returns the batch of these texts, which are rows `start`, `start + 1`, ... of the step's global batch."""
        rows = np.concatenate([np.full((len(text), 1), self.vocabulary.bos, dtype=np.int64), text], axis=1)
        source = key(self.seed, "masks", self.purpose, size=16)
        draws = row_draws(source, step, start, start + len(text), self.row_format.length, self.masked)
        tokens, positions, labels = mask_rows(rows, draws, self.masked, self.vocabulary)
        return Batch(
            tokens=torch.from_numpy(tokens),
            positions=torch.from_numpy(positions),
            labels=torch.from_numpy(labels),
            weights=torch.from_numpy(np.repeat(weights.astype(np.float32)[:, None], self.masked, axis=1)),
            languages=torch.from_numpy(languages.astype(np.int64)),
            step_languages=step_languages,
            dropout_seed=key(self.seed, "dropout", self.purpose, step, start) >> 1,  # 63 bits: torch takes signed seeds
            **self._segments(np.pad(begins, ((0, 0), (1, 0)))),
        )

    def _segments(self, begins: np.ndarray) -> dict[str, Tensor]:
        """Returns the segment and position ids of rows whose later segments begin at these columns: (rows, length) bool."""
        if self.row_format.boundaries == "none":
            return {}
        ids = {"segment_ids": torch.from_numpy(begins.cumsum(axis=1, dtype=np.int32))}
        if self.row_format.positions == "boundary":
            columns = np.arange(begins.shape[1])
            # the column where the `<s>` of each token's segment would stand
            before = np.maximum.accumulate(np.where(begins, columns - 1, 0), axis=1)
            ids["position_ids"] = torch.from_numpy(columns - before)
        return ids
