"""Small encoders and hand-made batches for tests of the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mlinterf_ds.model.encoder import Encoder
from mlinterf_ds.sections import ModelConfig

CODES = ["te", "to", "keys"]
VARIANTS = ["joint", "ffn", "attn", "adpt", "share_adpt"]
ROUTED = ["ffn", "attn", "adpt"]
VOCABULARY, LENGTH, MASKED = 100, 12, 3
SHAPE: dict[str, Any] = {"layers": 2, "heads": 4, "width": 32, "ffn": 64, "adapter": 8}


@dataclass(frozen=True)
class Batch:
    """The fields that Encoder reads."""

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    weights: Tensor
    languages: Tensor
    step_languages: tuple[int, ...]
    dropout_seed: int = 5
    segment_ids: Tensor | None = None
    position_ids: Tensor | None = None

    def rows(self, index: Tensor, step_languages: tuple[int, ...]) -> Batch:
        chosen = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **chosen, step_languages=step_languages)


def batch(languages: list[int], step_languages: tuple[int, ...] | None = None, vocabulary: int = VOCABULARY) -> Batch:
    """Random rows in these languages, each of a few segments."""
    source, rows = torch.Generator().manual_seed(0), len(languages)
    begins = torch.rand(rows, LENGTH, generator=source) < 0.25
    begins[:, :2] = False  # `<s>` and the first token of the text
    columns = torch.arange(LENGTH)
    return Batch(
        segment_ids=begins.cumsum(1),
        position_ids=columns - torch.where(begins, columns - 1, 0).cummax(1).values,
        tokens=torch.randint(vocabulary, (rows, LENGTH), generator=source),
        positions=torch.rand(rows, LENGTH, generator=source).argsort(dim=1)[:, :MASKED],
        labels=torch.randint(vocabulary, (rows, MASKED), generator=source),
        weights=torch.rand(rows, MASKED, generator=source),
        languages=torch.tensor(languages, dtype=torch.long),
        step_languages=tuple(sorted(set(languages))) if step_languages is None else step_languages,
    )


def encoder(variant: str, dropout: float = 0.0, spread: float = 0.3, **options: Any) -> Encoder:
    """A tiny encoder whose weights are all far from zero, so that every parameter matters."""
    shape = SHAPE | {"dropout": dropout, "attention_dropout": dropout} | options
    model = Encoder(
        ModelConfig(**shape), variant=variant, languages=CODES, vocabulary=VOCABULARY, positions=LENGTH, seed=3
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(spread / parameter.std())
    return model


def gradients(model: Encoder) -> dict[str, Tensor]:
    """Every gradient by name, cleared from the model."""
    by_name = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return by_name


def hidden(model: Encoder, rows: Batch) -> Tensor:
    """The hidden states (rows, length, width) that the model's loss on these rows is computed from."""
    segments = {"segment_ids": rows.segment_ids, "position_ids": rows.position_ids}
    return model.hidden(rows.tokens, rows.languages, rows.step_languages, **segments)
