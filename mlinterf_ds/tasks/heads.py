"""The encoder with a task's linear classifier on top: one class for each chosen column, or the two ends of a span.

Legend: rows = sequences; positions = the columns of a row that are looked at (words' first pieces, `<s>`, or a context's
pieces); targets = the predictions wanted of a row (a class at each position, or the start and end of a span).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlinterf_ds.model.encoder import SHARED, Encoder
from mlinterf_ds.model.layers import at_positions
from mlinterf_ds.runtime.parallel import replayed
from mlinterf_ds.sections import ModelConfig, WordState
from mlinterf_ds.tasks.base import Kind

HEAD_STD = 0.02  # standard deviation of a new classifier's weights, as in BERT
CLASSIFIER = "task classifier"  # the name of its parameter group, in checkpoints too


@dataclass(frozen=True)
class TaskBatch:
    """One rank's rows of one micro-batch. The loss is `(weights * cross_entropy).sum()`, summed over all slices."""

    tokens: Tensor  # (rows, length) int64
    padding: Tensor  # (rows, length) bool, True where a row has ended
    positions: Tensor  # (rows, positions) int64: columns
    ends: Tensor | None  # (rows, positions) int64: columns after the last piece of the words that begin at `positions`
    valid: Tensor  # (rows, positions) bool: False where a row has fewer positions
    targets: Tensor  # (rows, targets) int64: classes (0 where there is none), or indices into `positions`
    weights: Tensor  # (rows, targets) float32: they sum to 1 over the global batch; 0 where there is no target
    languages: Tensor  # (rows,) int64: index into the encoder's languages
    step_languages: tuple[int, ...]  # languages of the global batch, ascending: the same on all ranks
    dropout_seed: int

    def to(self, device: torch.device | str) -> TaskBatch:
        """The same batch with its tensors on `device`, except `languages`: routing reads them on the CPU."""
        tensors: dict[str, Any] = {
            name: value for name, value in vars(self).items() if torch.is_tensor(value) and name != "languages"
        }
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


class TaskModel(Encoder):
    """The pretrained encoder (its parameters keep their names) with a linear classifier in place of the masked head.

    kind "labels": `classes` logits at each position (sentence pairs have one, `<s>`). kind "span": every position is scored
    as a start and as an end. word "mean": a word's logits come from the mean state of all its pieces (Ács et al., 2021), "first": from
    that of its first one. The classifier is a parameter group of its own, which can have its own learning rate and is
    trained where all else is frozen; tensor-parallel ranks hold replicas of it.
    """

    def __init__(
        self, config: ModelConfig, *, kind: Kind, classes: int, seed: int, word: WordState = "first", **shape: Any
    ):
        """shape: the encoder's other arguments, as `Pretrained.architecture` gives them."""
        super().__init__(config, **shape)
        del self.head
        self.kind, self.word = kind, word
        self.dropout = config.dropout
        self.classifier = nn.Linear(config.width, 2 if kind == "span" else classes)
        digest = blake2b(f"{seed} classifier".encode(), digest_size=8).digest()
        source = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        with torch.no_grad():
            self.classifier.weight.normal_(0.0, HEAD_STD, generator=source)
            self.classifier.bias.zero_()

    def forward(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The loss, and in training each row's mean nll (rows, 1), in evaluation the logits.

        Logits are fp32, (rows, positions, classes), or (rows, 2, positions) of a span.
        """
        with contextlib.ExitStack() as stack:
            if self.training:
                stack.enter_context(replayed(batch.dropout_seed))
            hidden = self.hidden(batch.tokens, batch.languages, batch.step_languages, batch.padding)
            if self.word == "mean" and batch.ends is not None:
                hidden = means(hidden, batch.positions, batch.ends)
            else:
                hidden = at_positions(hidden, batch.positions)
            hidden = F.dropout(hidden, self.dropout, self.training)
        logits = self.classifier(hidden).float()
        if self.kind == "span":
            logits = logits.masked_fill(~batch.valid[:, :, None], -torch.inf).transpose(1, 2)
        flat = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        nll = flat.view(batch.targets.shape)
        loss = (batch.weights * nll).sum()
        if not self.training:
            return loss.detach(), logits.detach()
        counted = (batch.weights > 0).float()
        return loss, ((counted * nll).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)).detach()

    def parameter_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """The encoder's groups, and the classifier's parameters as the group `CLASSIFIER`."""
        groups = super().parameter_groups()
        classifier = {name: groups[SHARED].pop(name) for name in list(groups[SHARED]) if name.startswith("classifier.")}
        return groups | {CLASSIFIER: classifier}


def means(hidden: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """The mean of hidden (rows, length, width) over the columns from each start to before its end: (rows, starts, width).

    starts, ends: (rows, starts); 0 where nothing lies between them.
    """
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    within = (columns >= starts[..., None]) & (columns < ends[..., None])  # (rows, starts, length)
    return (within / within.sum(-1, keepdim=True).clamp(min=1)).to(hidden.dtype) @ hidden
