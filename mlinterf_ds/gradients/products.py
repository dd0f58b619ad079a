"""Inner products of gradients by layer and component: exact, or of a random projection of each gradient.

Both take one gradient after another (this rank's shards) and give products over all ranks, replicas counted once.
Legend: n gradients; G groups (layer, component); k the projection's dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mlinterf_ds.data.batch import generator, key
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.space import Segment, Space, Vector, shape_numel
from mlinterf_ds.gradients.collect import Group, group_of
from mlinterf_ds.model.encoder import SHARED

CHUNK = 1 << 18  # elements of each gradient multiplied at once, in float64
SIGNS = 1 << 20  # least size of the table of random signs


def groups_of(space: Space) -> list[Group]:
    """The groups of a space, the same on all ranks: layers ascending, then what lies outside them."""
    found = {group_of(name) for name in space.parameters}
    return sorted(found, key=lambda group: (group[0] is None, group[0] or 0, group[1]))


class Exact:
    """Keeps every gradient's shards: n gradients of memory (divided by the ranks under ZeRO)."""

    def __init__(self, engine: Engine):
        self.space, self.device = engine.spaces[SHARED], engine.device
        self.groups = groups_of(self.space)
        self._kept: list[Vector] = []

    @property
    def bytes(self) -> int:
        """Held by this rank."""
        return sum(piece.nbytes for vector in self._kept for piece in vector)

    def add(self, vector: Vector) -> None:
        """The next gradient."""
        self._kept.append(vector)

    def products(self) -> np.ndarray:
        """(G, n, n) inner products, float64."""
        count = len(self._kept)
        table = torch.zeros(len(self.groups), count, count, dtype=torch.float64, device=self._kept[0][0].device)
        for segment in self.space.counted:
            group = self.groups.index(group_of(segment.name))
            for begin in range(segment.offset, segment.offset + segment.length, CHUNK):
                end = min(begin + CHUNK, segment.offset + segment.length)
                rows = torch.stack([vector[segment.shard][begin:end] for vector in self._kept]).double()
                table[group] += rows @ rows.T
        table = table.to(self.device)
        dist.all_reduce(table)
        return table.cpu().numpy()


class Sketch:
    """A seeded random projection of each gradient's groups to k dimensions (a CountSketch: Charikar et al. 2002).

    An element goes to one place of its group's k with a random sign. Each parameter is cut into blocks of k
    neighbouring elements; a block draws a rotation, a sign and a stretch of one table of T random signs, from the
    parameter's name and the seed: the same at every ZeRO and tensor-parallel layout. Two elements meet in a place with
    probability at most 1/k, so the inner products are unbiased and, to first order, a cosine c over any union of groups
    has a standard error of at most (1 - c^2) / sqrt(k) over seeds (times 1 + k/T, for sharing the table). Memory: n * G * k
    numbers, and the table.
    """

    def __init__(self, engine: Engine, dimension: int, seed: int):
        self.space, self.device, self.dimension = engine.spaces[SHARED], engine.device, dimension
        self.groups = groups_of(self.space)
        size = max(SIGNS, 64 * dimension)
        source = torch.Generator().manual_seed(key(seed, "signs") >> 1)
        signs = torch.randint(2, (size,), generator=source, dtype=torch.int8).float().mul_(2).sub_(1)
        self._signs = torch.cat([signs, signs[:dimension]]).to(self.space.masters[0].device)
        self._pieces = [
            (self.groups.index(group_of(segment.name)), segment.shard, pieces(segment, engine, dimension, seed, size))
            for segment in self.space.counted
        ]
        self._kept: list[Tensor] = []  # (G, k) each

    @property
    def bytes(self) -> int:
        """Held by this rank: sketches, signs, plan."""
        plan = sum(table.nbytes for _, _, table in self._pieces)
        return sum(sketch.nbytes for sketch in self._kept) + self._signs.nbytes + plan

    @torch.no_grad()
    def add(self, vector: Vector) -> None:
        """The next gradient; it may be dropped afterwards."""
        k = self.dimension
        sums = torch.zeros(len(self.groups), 2 * k, device=self._signs.device)
        for group, shard, table in self._pieces:
            flat, row = vector[shard], sums[group]
            for begin, length, place, sign_at, sign in table.tolist():
                row[place : place + length].addcmul_(
                    flat[begin : begin + length], self._signs[sign_at : sign_at + length], value=sign
                )
        self._kept.append(sums[:, :k] + sums[:, k:])  # places are modulo k

    def products(self) -> np.ndarray:
        """(G, n, n) inner products of the projections, float64."""
        found = []
        for group in range(len(self.groups)):  # one at a time: no second copy of all sketches
            rows = torch.stack([sketch[group] for sketch in self._kept]).to(self.device)  # (n, k)
            dist.all_reduce(rows)
            found.append(rows.double() @ rows.double().T)
        return torch.stack(found).cpu().numpy()


def pieces(segment: Segment, engine: Engine, dimension: int, seed: int, signs: int) -> np.ndarray:
    """The segment cut at the blocks of its whole parameter.

    Returns (pieces, 5) int64: begin in the shard, length, first place of the (unfolded) sketch, first sign, +1 or -1.
    """
    tensor, rank = engine.layout.tensor, engine.layout.tensor_rank
    copies = tensor if segment.partition_dim is not None else 1
    blocks = -(-shape_numel(segment.shape) * copies // dimension)
    source = generator(key(seed, "blocks", segment.name, size=16))
    rotation, sign_at = source.integers(dimension, size=blocks), source.integers(signs, size=blocks)
    sign = 2 * source.integers(2, size=blocks) - 1
    found = []
    for begin, length, position in runs(segment, copies, rank):
        first, last = position // dimension, (position + length - 1) // dimension
        block = np.arange(first, last + 1)
        starts = np.maximum(block * dimension, position)
        ends = np.minimum((block + 1) * dimension, position + length)
        column = starts - block * dimension
        found.append(
            np.stack(
                [
                    begin + starts - position,
                    ends - starts,
                    rotation[block] + column,
                    sign_at[block] + column,
                    sign[block],
                ]
            )
        )
    return np.concatenate(found, axis=1).T if found else np.empty((0, 5), dtype=np.int64)


def runs(segment: Segment, copies: int, rank: int) -> Sequence[tuple[int, int, int]]:
    """Stretches of the segment that are contiguous in the whole parameter, which `copies` ranks share.

    (begin in the shard, length, position in the whole parameter's row-major order) each.
    """
    if not segment.length:
        return []
    outer = shape_numel(segment.shape[: segment.partition_dim or 0])  # slices of the parameter that ranks share out
    inner = shape_numel(segment.shape) // outer  # elements of each that this rank holds
    found = []
    start, end = segment.start, segment.start + segment.length
    for row in range(start // inner, (end - 1) // inner + 1):
        low, high = max(start, row * inner), min(end, (row + 1) * inner)
        shift = (row * (copies - 1) + rank % copies) * inner
        found.append((segment.offset + low - start, high - low, low + shift))
    return found
