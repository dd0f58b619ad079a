"""Weights by name: what a run starts from, and the reader of our own checkpoints. Needs neither DeepSpeed nor megatron."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from mlinterf_ds.engine.space import Segment
from mlinterf_ds.errors import UserError


class Weights(Protocol):
    """Parameters by our names, whoever wrote them."""

    def has(self, name: str) -> bool: ...

    def read(self, wanted: Segment, kind: str, tensor: int, tensor_rank: int) -> Tensor:
        """The elements of one segment (1-d fp32) of the 'master' (or a moment), at the reader's layout."""
        ...


class Source:
    """Reads parameters by name out of a checkpoint's shards, whatever layout saved them."""

    def __init__(self, path: Path):
        self.path = path
        # name -> tensor rank -> [(segment, file, tensor key)]
        self.addresses: dict[str, dict[int, list[tuple[Segment, Any, str]]]] = {}
        for file in sorted(path.glob("shard-*.safetensors")):
            opened = safe_open(file, framework="pt")
            metadata = opened.metadata()
            for row in json.loads(metadata["segments"]):
                space = row.pop("space")
                segment = Segment(**row | {"shape": tuple(row["shape"])})
                ranks = self.addresses.setdefault(segment.name, {})
                ranks.setdefault(int(metadata["tensor_rank"]), []).append((segment, opened, f"{space}/{segment.shard}"))

    def steps(self, name: str) -> float:
        """Adam's step count of this parameter."""
        _, opened, key = next(iter(self._ranks(name).values()))[0]
        return float(opened.get_tensor(f"{key}/step").item())

    def _ranks(self, name: str) -> dict[int, list[tuple[Segment, Any, str]]]:
        if name not in self.addresses:
            raise UserError(f"{self.path}: has no parameter {name}; it was saved by another variant, language or shape")
        return self.addresses[name]

    def has(self, name: str) -> bool:
        return name in self.addresses

    def read(self, wanted: Segment, kind: str, tensor: int, tensor_rank: int) -> Tensor:
        """The elements of one segment (1-d fp32) of the 'master' or a moment, at the reader's layout."""
        ranks = self._ranks(wanted.name)
        saved = next(iter(ranks.values()))[0][0]
        if wanted.partition_dim is None or len(ranks) == tensor:
            mine = tensor_rank if wanted.partition_dim is not None else 0
            check_shape(wanted, saved.shape, self.path)
            return self._range(ranks[mine], kind, wanted.start, wanted.length)
        return sliced(self.whole(wanted.name, kind), wanted, tensor, tensor_rank, self.path)

    def whole(self, name: str, kind: str = "master") -> Tensor:
        """A parameter in its full shape, fp32."""
        ranks = self._ranks(name)
        saved = next(iter(ranks.values()))[0][0]
        numel = torch.Size(saved.shape).numel()
        held = sorted(ranks) if saved.partition_dim is not None else [min(ranks)]  # a replica: one will do
        parts = [self._range(ranks[rank], kind, 0, numel).view(saved.shape) for rank in held]
        return parts[0] if saved.partition_dim is None else torch.cat(parts, saved.partition_dim)

    @staticmethod
    def _range(found: list[tuple[Segment, Any, str]], kind: str, start: int, length: int) -> Tensor:
        result = torch.empty(length, dtype=torch.float32)
        filled = 0
        for segment, opened, key in found:
            low, high = max(start, segment.start), min(start + length, segment.start + segment.length)
            if low < high:
                at = segment.offset + low - segment.start
                result[low - start : high - start] = opened.get_slice(f"{key}/{kind}")[at : at + high - low]
                filled += high - low
        if filled != length:
            raise UserError(f"{found[0][0].name}: {filled} of {length} elements are in the checkpoint: it is damaged")
        return result


def sliced(whole: Tensor, wanted: Segment, tensor: int, tensor_rank: int, path: Path) -> Tensor:
    """The elements of a segment (1-d) at the reader's layout, of a whole parameter read from `path`."""
    local = part(whole, wanted.partition_dim, tensor, tensor_rank)
    check_shape(wanted, local.shape, path)
    return local.reshape(-1)[wanted.start : wanted.start + wanted.length]


def part(whole: Tensor, dim: int | None, tensor: int, rank: int) -> Tensor:
    """What tensor-parallel rank `rank` of `tensor` holds of a parameter (a view); dim None: all of it."""
    return whole if dim is None else whole.chunk(tensor, dim)[rank]


def check_shape(wanted: Segment, found: tuple[int, ...], path: Path) -> None:
    """UserError unless the parameter read from `path` has the wanted shape."""
    if tuple(wanted.shape) != tuple(found):
        raise UserError(
            f"{path}: {wanted.name} has shape {tuple(found)}, this run's model wants {tuple(wanted.shape)}: "
            "use the model.*, vocabulary and languages of the run that saved it"
        )
