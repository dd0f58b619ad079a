"""From a language's text to the batch a model is trained on: randomness, windows, masking and the `Batch` itself.

All randomness is counter based: a draw is a function of (seed, purpose, step, row) and of nothing that happened
before, so any rank may compute any slice of any step. Shapes: rows = this slice's sequences, length = <s> plus
`length - 1` text tokens, masked = positions that are predicted in a row (the same number in every row).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlinterf_ds.data.tokenizer import BOS, EOS, MASK, SPECIAL_PIECES

FIRST_ORDINARY = len(SPECIAL_PIECES)  # pieces from here on are text
MASK_SHARE, REPLACED_BY_MASK, REPLACED_AT_RANDOM = 0.15, 0.8, 0.1  # BERT's proportions; the remaining tenth is kept


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one micro-batch. The loss is `(weights * cross_entropy).sum()`, summed over all slices."""

    tokens: Tensor  # (rows, length) int64: input ids, some of them masked
    positions: Tensor  # (rows, masked) int64: the columns to predict, ascending
    labels: Tensor  # (rows, masked) int64: the original ids there
    weights: Tensor  # (rows, masked) float32: each prediction's weight in the loss; they sum to 1 over the global batch
    languages: Tensor  # (rows,) int64: index into the stream's `languages`
    step_languages: tuple[int, ...]  # of the whole global batch, ascending: the same on all ranks
    dropout_seed: int  # replays this slice's dropout: a function of (seed, step, first row)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; `languages` stays: routing reads it on the CPU."""
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in vars(self).items() if torch.is_tensor(v) and k != "languages"
        }
        return replace(self, **moved)


def key(*parts: int | str, size: int = 8) -> int:
    """A hash of `size` bytes that names a source of randomness, e.g. `key(seed, "masks")`."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=size).digest(), "little")


def generator(source: int, index: int = 0, skip: int = 0) -> np.random.Generator:
    """Philox number `index` of the 16-byte key `source`, `skip` blocks (of four 64-bit words) further on."""
    words = np.array([source & (2**64 - 1), source >> 64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words, counter=np.array([skip, index, 0, 0], dtype=np.uint64)))


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit words (uint64, at least 1-d): the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where the pseudo-random permutation of `range(size)` that its key names sends each index.

    Shapes: index (n,), keys (n,) uint64 -> (n,) int64. A Feistel network over the next power of two, walked until it
    lands below `size`: no permutation is ever held in memory, so the cost is that of the rows asked for, however large
    the corpus.
    """
    bits = (size - 1).bit_length()
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    values = index.astype(np.uint64)
    pending = np.arange(len(values))
    while pending.size:
        k, low, high = keys[pending], values[pending] & low_mask, values[pending] >> low_bits
        for turn in range(1, 16, 2):  # fewer turns leave some orders of five windows likelier than others
            high = high ^ (mix(k * np.uint64(turn) + low) & high_mask)
            low = low ^ (mix(k * np.uint64(turn) + ~high) & low_mask)
        values[pending] = high << low_bits | low
        pending = pending[values[pending] >= size]
    return values.astype(np.int64)


class Windows:
    """One language's text as a ring of windows of `width` tokens, each visited once an epoch, in a fresh order.

    Every epoch turns the grid by a random amount; the fewer than `width` tokens that fit no window sit that epoch
    out. A text shorter than one window is repeated to fill it.
    """

    def __init__(
        self, tokens: np.ndarray, width: int, source: int, unchanged: Callable[[], bool] = lambda: True
    ) -> None:
        """unchanged: whether nothing happened to the file of `tokens` since it was last asked; raises if it was altered."""
        assert len(tokens) > 0 and width > 0, (len(tokens), width)
        self._unchanged = unchanged
        self.tokens = np.asarray(tokens)  # flat; stays memory-mapped
        self.width = width
        self.count = max(1, len(tokens) // width)
        self._source = np.uint64(source)

    def visit(self, visits: np.ndarray) -> np.ndarray:
        """The text of the visits of these numbers (0, 1, ... over all epochs): (n,) -> (n, width) int64."""
        epoch, index = np.divmod(visits, self.count)
        keys = mix(self._source ^ mix(epoch.astype(np.uint64) + np.uint64(1)))
        turn = (mix(keys) % np.uint64(len(self.tokens))).astype(np.int64)
        return self.at(shuffled(index, self.count, keys) * self.width + turn)

    def at(self, starts: np.ndarray) -> np.ndarray:
        """The `width` tokens from each of these places on, round the ring: (n,) -> (n, width) int64."""
        places = (starts[:, None] + np.arange(self.width)) % len(self.tokens)
        self._unchanged()  # before: to touch memory behind the end of a file that was cut would kill the process
        while True:
            text = self.tokens[places].astype(np.int64)
            if self._unchanged():  # nor was it altered, and perhaps put right again, meanwhile
                return text


def masked_per_row(length: int, mask_share: float = MASK_SHARE) -> int:
    """Predicted positions in a row of `length`: `round(mask_share * (length - 1))`, at least one."""
    assert length >= 2 and 0 < mask_share < 1, (length, mask_share)
    return max(1, round(mask_share * (length - 1)))


def row_draws(source: int, step: int, start: int, stop: int, length: int, masked: int) -> np.ndarray:
    """Uniform draws for rows `start` to `stop` of `step`, (rows, at least length - 1 + 2 * masked) float64.

    Every row owns a fixed stretch of the step's Philox sequence, which is why slices agree with the whole.
    """
    blocks = -(-(length - 1 + 2 * masked) // 4)
    return generator(source, step, skip=start * blocks).random((stop - start, 4 * blocks))


def mask_rows(
    rows: np.ndarray, draws: np.ndarray, masked: int, vocabulary_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask `masked` positions of each row: input ids (rows, length), positions and labels (rows, masked).

    Positions are uniform among a row's text tokens, <unk> included. <s> (column 0) is never masked, </s> only in a
    row that has fewer than `masked` other tokens. Of the chosen, 80% become <mask>, 10% an ordinary piece drawn
    uniformly, 10% stay.
    """
    assert vocabulary_size > FIRST_ORDINARY and rows.shape[1] > masked, (vocabulary_size, rows.shape, masked)
    candidates = rows.shape[1] - 1
    # Draws are below 1, so that every </s> comes after every other token.
    order = draws[:, :candidates] + (rows[:, 1:] == EOS)
    chosen = np.argpartition(order, masked - 1, axis=1)[:, :masked]
    positions = np.sort(chosen, axis=1) + 1
    labels = np.take_along_axis(rows, positions, axis=1)
    action, piece = draws[:, candidates : candidates + masked], draws[:, candidates + masked : candidates + 2 * masked]
    random_piece = FIRST_ORDINARY + (piece * (vocabulary_size - FIRST_ORDINARY)).astype(np.int64)
    kept_or_random = np.where(action < REPLACED_BY_MASK + REPLACED_AT_RANDOM, random_piece, labels)
    tokens = rows.copy()
    np.put_along_axis(tokens, positions, np.where(action < REPLACED_BY_MASK, MASK, kept_or_random), axis=1)
    return tokens, positions, labels


@dataclass(frozen=True)
class Masker:
    """Makes batches of one purpose ("train", "meta", "valid/en": each has its own randomness) from windows of text."""

    seed: int
    purpose: str
    length: int
    vocabulary_size: int
    mask_share: float = MASK_SHARE

    @property
    def masked(self) -> int:
        """Predicted positions in a row."""
        return masked_per_row(self.length, self.mask_share)

    def batch(
        self,
        text: np.ndarray,  # (rows, length - 1) int64
        weights: np.ndarray,  # (rows,) what each of a row's predictions weighs
        languages: np.ndarray,  # (rows,)
        step_languages: tuple[int, ...],
        *,
        step: int,
        start: int,
    ) -> Batch:
        """The batch of these rows, which are rows `start`, `start + 1`, ... of the step's global batch."""
        rows = np.concatenate([np.full((len(text), 1), BOS, dtype=np.int64), text], axis=1)
        source = key(self.seed, "masks", self.purpose, size=16)
        draws = row_draws(source, step, start, start + len(text), self.length, self.masked)
        tokens, positions, labels = mask_rows(rows, draws, self.masked, self.vocabulary_size)
        return Batch(
            tokens=torch.from_numpy(tokens),
            positions=torch.from_numpy(positions),
            labels=torch.from_numpy(labels),
            weights=torch.from_numpy(np.repeat(weights.astype(np.float32)[:, None], self.masked, axis=1)),
            languages=torch.from_numpy(languages.astype(np.int64)),
            step_languages=step_languages,
            dropout_seed=key(self.seed, "dropout", self.purpose, step, start) >> 1,  # 63 bits: torch takes signed seeds
        )
