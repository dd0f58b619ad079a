"""Batches of rows: the training order, each rank's share, padding; and what a model says of rows.

A global batch depends on seed and step alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mlinterf_ds.data.batch import generator, key
from mlinterf_ds.data.tokenizer import PAD
from mlinterf_ds.runtime.parallel import Layout
from mlinterf_ds.tasks.base import Kind, Row
from mlinterf_ds.tasks.heads import TaskBatch

PREDICTED_ROWS = 64  # rows that a rank predicts at once


@dataclass(frozen=True)
class TrainBatches:
    """Every row once an epoch, in a new order each time. Rows of weight 0 fill the last batch of an epoch."""

    rows: Sequence[Row]
    languages: np.ndarray  # (rows,) the encoder's index of each row's language
    batch: int
    seed: int

    @property
    def epoch_steps(self) -> int:
        """The number of steps in an epoch."""
        return -(-len(self.rows) // self.batch)

    def filled(self, step: int) -> float:
        """The share of the rows of a step's global batch that are real: the last batch of an epoch may have others to fill it."""
        return min(1.0, len(self.rows) / self.batch - step % self.epoch_steps)

    def at(self, step: int, start: int, stop: int) -> TaskBatch:
        """Rows `start` to `stop` (exclusive) of the global batch of `step`."""
        epoch, number = divmod(step, self.epoch_steps)
        order = generator(key(self.seed, "order", size=16), epoch).permutation(len(self.rows))
        indices = np.arange(number * self.batch, (number + 1) * self.batch)
        chosen, real = order[indices % len(order)], indices < len(order)  # real: not there to fill the batch
        targets = sum(target >= 0 for index in chosen[real] for target in self.rows[index].targets)
        return collate(
            [self.rows[index] for index in chosen[start:stop]],
            self.languages[chosen[start:stop]],
            tuple(np.unique(self.languages[chosen]).tolist()),
            weights=real[start:stop] / targets,
            dropout_seed=key(self.seed, "dropout", "task", step, start) >> 1,
        )


def evaluation_batches(
    rows: Sequence[Row], language: int, size: int, rank: int, ranks: int
) -> Iterator[tuple[list[int], TaskBatch]]:
    """Yields (indices of the rows, their batch) for this rank: equally many batches on every rank, similar lengths together.

    A rank for which no row of a batch is left repeats the last one.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens))
    for first in range(0, len(order), size * ranks):
        block = order[first : first + size * ranks]
        indices = block[rank::ranks] or block[-1:]
        batch = collate(
            [rows[index] for index in indices],
            np.full(len(indices), language),
            (language,),
            weights=np.zeros(len(indices)),
            dropout_seed=0,
        )
        yield indices, batch


@torch.no_grad()
def outputs(
    model: nn.Module, kind: Kind, rows: Sequence[Row], language: int, layout: Layout, device: torch.device
) -> list[np.ndarray]:
    """Returns each row's scores on rank 0: (positions, classes), or (2, positions) for a span's start and end.

    language: the number of the language whose modules read the rows.
    """
    model.eval()
    own: dict[int, np.ndarray] = {}  # this rank's scores by row
    for numbers, batch in evaluation_batches(rows, language, PREDICTED_ROWS, layout.data_rank, layout.data):
        _, logits = model(batch.to(device))
        for number, scores in zip(numbers, logits.cpu().numpy(), strict=True):
            width = len(rows[number].positions)
            own[number] = scores[:, :width] if kind == "span" else scores[:width]
    parts: list[dict[int, np.ndarray]] = [own]
    if layout.world > 1:
        parts = [{}] * layout.world
        dist.all_gather_object(parts, own if layout.tensor_rank == 0 else {})
    by_row = {number: scores for part in parts for number, scores in part.items()}
    return [by_row[number] for number in range(len(rows))]


def best(kind: Kind, scores: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs that `Task.predict` takes: the best class at each position, or the scores of a span."""
    return scores if kind == "span" else [values.argmax(-1) for values in scores]


def collate(
    rows: Sequence[Row],
    languages: np.ndarray,
    step_languages: tuple[int, ...],
    *,
    weights: np.ndarray,  # (rows,) weight of each target of a row
    dropout_seed: int,
) -> TaskBatch:
    """Puts rows of different lengths into one batch, padded to the longest."""
    tokens = _padded([row.tokens for row in rows], PAD)
    positions = _padded([row.positions for row in rows], 0)
    targets = _padded([row.targets for row in rows], -1)
    ends = [row.ends for row in rows if row.ends is not None]
    lengths = torch.tensor([[len(row.tokens), len(row.positions)] for row in rows])
    return TaskBatch(
        tokens=tokens,
        padding=torch.arange(tokens.shape[1]) >= lengths[:, :1],
        positions=positions,
        ends=_padded(ends, 0) if ends else None,
        valid=torch.arange(positions.shape[1]) < lengths[:, 1:],
        targets=targets.clamp(min=0),
        weights=((targets >= 0) * torch.from_numpy(weights)[:, None]).float(),
        languages=torch.from_numpy(languages.astype(np.int64)),
        step_languages=step_languages,
        dropout_seed=dropout_seed,
    )


def _padded(lists: list[list[int]], value: int) -> Tensor:
    """Lists of different lengths as the rows of one int64 tensor, filled up with `value`."""
    tensors = [torch.tensor(numbers, dtype=torch.int64) for numbers in lists]
    return pad_sequence(tensors, batch_first=True, padding_value=value)
