"""From rows to batches: training order, padding, and every rank's share. A global batch is a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mlinterf_ds.data.batch import generator, key
from mlinterf_ds.data.tokenizer import PAD
from mlinterf_ds.tasks.base import Row
from mlinterf_ds.tasks.heads import TaskBatch


@dataclass(frozen=True)
class TrainBatches:
    """Every row once an epoch, in a fresh order; the last batch of an epoch is filled up with rows of weight 0."""

    rows: Sequence[Row]
    languages: np.ndarray  # (rows,) the encoder's index of each row's language
    batch: int
    seed: int

    @property
    def epoch_steps(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.rows) // self.batch)

    def at(self, step: int, start: int, stop: int) -> TaskBatch:
        """Rows `start` to `stop` of the global batch of `step`."""
        epoch, place = divmod(step, self.epoch_steps)
        order = generator(key(self.seed, "order", size=16), epoch).permutation(len(self.rows))
        numbers = np.arange(place * self.batch, (place + 1) * self.batch)
        chosen, real = order[numbers % len(order)], numbers < len(order)
        wanted = sum(target >= 0 for index in chosen[real] for target in self.rows[index].targets)
        return collate(
            [self.rows[index] for index in chosen[start:stop]],
            self.languages[chosen[start:stop]],
            tuple(np.unique(self.languages[chosen]).tolist()),
            weights=real[start:stop] / wanted,
            dropout_seed=key(self.seed, "dropout", "task", step, start) >> 1,
        )


def evaluation_batches(
    rows: Sequence[Row], language: int, size: int, rank: int, ranks: int
) -> Iterator[tuple[list[int], TaskBatch]]:
    """(numbers of the rows, their batch) for this rank: equally many on every rank, rows of similar length together.

    Where there are too few rows for all ranks, the last ones are done more than once.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens))
    for first in range(0, len(order), size * ranks):
        block = order[first : first + size * ranks]
        mine = block[rank::ranks] or block[-1:]
        batch = collate(
            [rows[index] for index in mine],
            np.full(len(mine), language),
            (language,),
            weights=np.zeros(len(mine)),
            dropout_seed=0,
        )
        yield mine, batch


def collate(
    rows: Sequence[Row],
    languages: np.ndarray,
    step_languages: tuple[int, ...],
    *,
    weights: np.ndarray,  # (rows,) of each of a row's targets
    dropout_seed: int,
) -> TaskBatch:
    """Rows side by side, padded."""
    length = max(len(row.tokens) for row in rows)
    places = max(len(row.positions) for row in rows)
    targets = max(len(row.targets) for row in rows)
    tokens = np.full((len(rows), length), PAD, dtype=np.int64)
    positions = np.zeros((len(rows), places), dtype=np.int64)
    wanted = np.full((len(rows), targets), -1, dtype=np.int64)
    lengths = np.array([len(row.tokens) for row in rows])
    counts = np.array([len(row.positions) for row in rows])
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
        positions[index, : len(row.positions)] = row.positions
        wanted[index, : len(row.targets)] = row.targets
    return TaskBatch(
        tokens=torch.from_numpy(tokens),
        padding=torch.from_numpy(np.arange(length) >= lengths[:, None]),
        positions=torch.from_numpy(positions),
        valid=torch.from_numpy(np.arange(places) < counts[:, None]),
        targets=torch.from_numpy(np.maximum(wanted, 0)),
        weights=torch.from_numpy(((wanted >= 0) * weights[:, None]).astype(np.float32)),
        languages=torch.from_numpy(np.asarray(languages, dtype=np.int64)),
        step_languages=step_languages,
        dropout_seed=dropout_seed,
    )
