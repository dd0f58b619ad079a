"""Parameters by name: what a run may start from, and the reader of our own checkpoints.

Reading needs neither DeepSpeed nor megatron.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from mlinterf_ds.engine.space import Segment
from mlinterf_ds.errors import UserError

Stored = tuple[Segment, Any, str]  # a segment, the open file that holds it, and the key of its shard in there


class Weights(Protocol):
    """Parameters under our names, whatever program wrote them."""

    def has(self, name: str) -> bool: ...

    def read(self, wanted: Segment, kind: str, tensor: int, tensor_rank: int) -> Tensor:
        """The elements of one segment (1-d, fp32) of the `kind`, at the reader's layout.

        kind: "master" (the weights), or one of AdamW's moments. tensor, tensor_rank: the reader's tensor-parallel size
        and rank.
        """
        ...


class CheckpointReader:
    """Reads parameters by name out of a checkpoint's shards, whatever layout saved them."""

    def __init__(self, path: Path):
        self.path = path
        self._stored: dict[str, dict[int, list[Stored]]] = {}  # name -> tensor-parallel rank -> its segments
        for file in sorted(path.glob("shard-*.safetensors")):
            opened = safe_open(file, framework="pt")
            metadata = opened.metadata()
            for row in json.loads(metadata["segments"]):
                space = row.pop("space")
                segment = Segment(**row | {"shape": tuple(row["shape"])})
                ranks = self._stored.setdefault(segment.name, {})
                ranks.setdefault(int(metadata["tensor_rank"]), []).append((segment, opened, f"{space}/{segment.shard}"))

    @property
    def names(self) -> list[str]:
        """The parameters that the checkpoint holds."""
        return list(self._stored)

    def has(self, name: str) -> bool:
        return name in self._stored

    def steps(self, name: str) -> float:
        """Adam's step count of this parameter."""
        _, opened, key = next(iter(self._ranks(name).values()))[0]
        return float(opened.get_tensor(f"{key}/step").item())

    def read(self, wanted: Segment, kind: str, tensor: int, tensor_rank: int) -> Tensor:
        ranks = self._ranks(wanted.name)
        if wanted.partition_dim is None or len(ranks) == tensor:  # cut as it was saved
            of_rank = ranks[0 if wanted.partition_dim is None else tensor_rank]
            check_shape(wanted, of_rank[0][0].shape, self.path)
            return _elements(of_rank, kind, wanted.start, wanted.length)
        return sliced(self.whole(wanted.name, kind), wanted, tensor, tensor_rank, self.path)

    def whole(self, name: str, kind: str = "master") -> Tensor:
        """A parameter in its full shape, fp32."""
        stored = [segments for _, segments in sorted(self._ranks(name).items())]
        saved = stored[0][0][0]
        numel = torch.Size(saved.shape).numel()
        if saved.partition_dim is None:  # every rank has a replica
            return _elements(stored[0], kind, 0, numel).view(saved.shape)
        return torch.cat([_elements(part, kind, 0, numel).view(saved.shape) for part in stored], saved.partition_dim)

    def _ranks(self, name: str) -> dict[int, list[Stored]]:
        if name not in self._stored:
            raise UserError(f"{self.path}: has no parameter {name}; it was saved by another variant, language or shape")
        return self._stored[name]


def _elements(stored: Sequence[Stored], kind: str, start: int, length: int) -> Tensor:
    """`length` elements of a parameter from `start` on (1-d, fp32), out of the segments that hold it."""
    elements = torch.empty(length, dtype=torch.float32)
    filled = 0
    for segment, opened, key in stored:
        low, high = max(start, segment.start), min(start + length, segment.start + segment.length)
        if low < high:
            first = segment.offset + low - segment.start
            into = elements[low - start : high - start]
            if kind != "master" and f"{key}/{kind}" not in opened.keys():  # noqa: SIM118 (not a dict)
                into.zero_()  # frozen parameters are saved without moments
            else:
                into.copy_(opened.get_slice(f"{key}/{kind}")[first : first + high - low])
            filled += high - low
    if filled != length:
        raise UserError(f"{stored[0][0].name}: {filled} of {length} elements are in the checkpoint: it is damaged")
    return elements


def sliced(whole: Tensor, wanted: Segment, tensor: int, tensor_rank: int, path: Path) -> Tensor:
    """The elements of a segment (1-d) at the reader's layout, of a whole parameter that was read from `path`."""
    local = whole if wanted.partition_dim is None else whole.chunk(tensor, wanted.partition_dim)[tensor_rank]
    check_shape(wanted, local.shape, path)
    return local.reshape(-1)[wanted.start : wanted.start + wanted.length]


def check_shape(wanted: Segment, shape: tuple[int, ...], path: Path) -> None:
    """UserError unless the parameter read from `path` has the wanted shape."""
    if tuple(wanted.shape) != tuple(shape):
        raise UserError(
            f"{path}: {wanted.name} has shape {tuple(shape)}, this run's model wants {tuple(wanted.shape)}: "
            "use the model.*, vocabulary and languages of the run that saved it"
        )
