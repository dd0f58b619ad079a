"""Training with the shared parameters frozen: all of them, but the vocabulary's new rows if it was extended."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mlinterf_ds.engine.space import Space, Vector, shape_numel

ROWS = ("embeddings.word.weight", "head.bias")  # parameters with a row a piece


class NewRows:
    """Which elements of the shared space belong to pieces from number `old` on, on this rank."""

    def __init__(self, space: Space, old: int, tensor_rank: int):
        self.masks = [torch.zeros_like(master, dtype=torch.bool) for master in space.masters]
        for segment in space.segments:
            if segment.name in ROWS:
                rows = segment.shape[0]
                element = torch.arange(segment.start, segment.start + segment.length)
                piece = tensor_rank * rows + element // (shape_numel(segment.shape) // rows)
                mask = self.masks[segment.shard]
                mask[segment.offset : segment.offset + segment.length] = (piece >= old).to(mask.device)

    def only(self, gradient: Vector) -> Vector:
        """The gradient of the new rows, 0 elsewhere."""
        return [piece * mask for piece, mask in zip(gradient, self.masks, strict=True)]

    @contextlib.contextmanager
    def kept(self, masters: Vector) -> Iterator[None]:
        """All but the new rows is afterwards as before, bit for bit: weight decay moves what has no gradient too."""
        before = [master.detach().clone() for master in masters]
        yield
        with torch.no_grad():
            for master, old, mask in zip(masters, before, self.masks, strict=True):
                master.copy_(torch.where(mask, master, old))
