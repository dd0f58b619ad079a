"""Cosine similarities of languages' gradients by layer and component, from exact or projected inner products.

`Exact` and `Sketch` take one gradient after another (this rank's shards) and give inner products over all ranks, replicas
counted once. Legend: L languages; n = 2L gradients; G groups (layer, component); k the projection's dimension. The number
of a gradient is 2 * (its language's index) + draw, draw 0 or 1: two batches of a language without a row in common, whose
similarity is the ceiling of what two languages can reach.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mlinterf_ds.data.batch import generator, key
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.space import Segment, Space, Vector
from mlinterf_ds.model.encoder import SHARED

DRAWS = 2  # batches of each language
Group = tuple[int | None, str]  # (layer or None, component)
COMPONENTS = ("attention", "ffn", "embedding", "other")  # other: norms, shared adapters, the head's own parameters
ALL = "all"
CHUNK = 1 << 18  # how many elements of each gradient are multiplied at once, in float64
SIGNS = 1 << 20  # least size of the table of random signs


@dataclass(frozen=True)
class Similarity:
    """Similarities of L languages: on the diagonal within a language (two batches of it), else between two languages."""

    languages: tuple[str, ...]
    groups: Sequence[Group]
    products: np.ndarray  # (groups, 2L, 2L): inner products of the gradients, by their numbers

    def cosines(self, layer: int | str | None = ALL, component: str = ALL) -> np.ndarray:
        """(2L, 2L) cosines of the gradients, over the parameters of a layer, of a component, of both, or all."""
        chosen = [layer in (ALL, number) and component in (ALL, part) for number, part in self.groups]
        products = self.products[np.array(chosen)].sum(axis=0)
        length = np.sqrt(np.diagonal(products))
        with np.errstate(invalid="ignore", divide="ignore"):
            return products / np.outer(length, length)

    def matrix(self, layer: int | str | None = ALL, component: str = ALL) -> np.ndarray:
        """(L, L): between two languages the mean over their four pairs of batches; NaN where a gradient is zero."""
        cosines, count = self.cosines(layer, component), len(self.languages)
        matrix = cosines.reshape(count, DRAWS, count, DRAWS).mean(axis=(1, 3))
        matrix = (matrix + matrix.T) / 2  # symmetric to the last bit
        within = cosines[np.arange(0, DRAWS * count, DRAWS), np.arange(1, DRAWS * count, DRAWS)]
        matrix[np.arange(count), np.arange(count)] = within
        return matrix

    def noise(self, component: str = ALL) -> np.ndarray:
        """(L, L): how far from 0 chance alone takes a similarity of two languages in 95% of cases; NaN within one.

        The four pairs of two languages share their batches, so that they do not vary independently: the variance of their mean is
        that of the means over either language's batches, at most. It is pooled over all languages, each of which has one
        difference between two batches to tell it by (hence the degrees of freedom).
        """
        from scipy.stats import t

        cosines, count = self.cosines(ALL, component), len(self.languages)
        means = cosines.reshape(count, DRAWS, count, DRAWS).mean(axis=3)  # of each batch with the other language's
        of_batches = means.var(axis=1, ddof=1) / DRAWS  # (L, L): the part that the first language's batches have
        known = (of_batches + of_batches.T)[~np.eye(count, dtype=bool)]
        known = known[np.isfinite(known)]
        noise = np.full(
            (count, count), float(t.ppf(0.975, count) * math.sqrt(known.mean())) if len(known) else math.nan
        )
        noise[np.diag_indices(count)] = math.nan
        return noise

    def corrected(self) -> np.ndarray:
        """(L, L): `matrix` divided by the geometric mean of both languages' ceilings: 1 if only sampling differs."""
        matrix = self.matrix()
        within = np.sqrt(np.where(np.diagonal(matrix) > 0, np.diagonal(matrix), np.nan))
        return matrix / np.outer(within, within)

    @property
    def components(self) -> list[str]:
        """The components whose gradients were measured, over all layers."""
        return [part for part in COMPONENTS if any(part == component for _, component in self.groups)]

    def scopes(self) -> Iterator[tuple[int | str | None, str]]:
        """(layer, component) of everything reported: the model, components, layers, components of layers."""
        yield from ((ALL, part) for part in (ALL, *self.components))
        yield from ((layer, ALL) for layer in sorted({layer for layer, _ in self.groups if layer is not None}))
        yield from ((layer, part) for layer, part in self.groups if layer is not None)


def pairs(count: int) -> list[tuple[int, int]]:
    """The indices of each of `count` languages with itself, then of every two."""
    return [*((index, index) for index in range(count)), *itertools.combinations(range(count), 2)]


def spread_table(title: str, spreads: Mapping[str, Mapping[str, Any]]) -> str:
    """Sets spreads by name as a table for the screen, under a title; '-' where a mean is missing or None."""
    lines = [f"{title:<22}{'within':>9}{'between':>9}"]
    for name, facts in spreads.items():
        means = [facts.get(column) for column in ("within", "between")]
        lines.append(f"{name:<22}" + "".join(f"{'-' if mean is None else f'{mean:.3f}':>9}" for mean in means))
    return "\n".join(lines)


def spread(matrix: np.ndarray) -> dict[str, float]:
    """Means within a language and between two (the latter NaN for one language), and the least between."""
    between = matrix[np.triu_indices(len(matrix), 1)]
    facts = {"within": float(np.diagonal(matrix).mean())}
    return facts | ({"between": float(between.mean()), "least": float(between.min())} if len(between) else {})


def group_of(name: str) -> Group:
    """The layer and component of a parameter.

    The word embeddings are the output matrix too, and their gradient is the sum of both uses.
    """
    if name.startswith("embeddings."):
        return None, "embedding"
    if not name.startswith("block.layers."):
        return None, "other"
    _, _, layer, module, *_ = name.split(".")
    return int(layer), {"self_attention": "attention", "mlp": "ffn"}.get(module, "other")


def groups_of(space: Space) -> list[Group]:
    """The groups of a space, the same on all ranks: layers ascending, then what lies outside them."""
    groups = {group_of(name) for name in space.parameters}
    return sorted(groups, key=lambda group: (group[0] is None, group[0] or 0, group[1]))


class Exact:
    """Keeps every gradient's shards: the memory of n gradients (divided by the ranks under ZeRO)."""

    def __init__(self, engine: Engine):
        self.space, self.device = engine.spaces[SHARED], engine.device
        self.groups = groups_of(self.space)
        self._gradients: list[Vector] = []

    @property
    def bytes(self) -> int:
        """The bytes that this rank holds."""
        return sum(shard.nbytes for vector in self._gradients for shard in vector)

    def add(self, vector: Vector) -> None:
        """Takes the next gradient."""
        self._gradients.append(vector)

    def products(self) -> np.ndarray:
        """(G, n, n) inner products, float64."""
        count = len(self._gradients)
        table = torch.zeros(len(self.groups), count, count, dtype=torch.float64, device=self._gradients[0][0].device)
        for segment in self.space.counted:
            group = self.groups.index(group_of(segment.name))
            for begin in range(segment.offset, segment.offset + segment.length, CHUNK):
                end = min(begin + CHUNK, segment.offset + segment.length)
                rows = torch.stack([vector[segment.shard][begin:end] for vector in self._gradients]).double()
                table[group] += rows @ rows.T
        table = table.to(self.device)
        dist.all_reduce(table)
        return table.cpu().numpy()


class Sketch:
    """A seeded random projection of each gradient's groups to k dimensions (a CountSketch: Charikar et al. 2002).

    An element goes to one of its group's k columns with a random sign. Each parameter is cut into blocks of k neighbouring
    elements; a block draws a rotation, a sign and a stretch of one table of T random signs, from the parameter's name and
    the seed: the same at every ZeRO and tensor-parallel layout. Two elements meet in a column with probability at most
    1/k, so the inner products are unbiased and, to first order, a cosine c over any union of groups has a standard error
    of at most (1 - c^2) / sqrt(k) over seeds (times 1 + k/T, for sharing the table). Memory: n * G * k numbers, and the
    table.
    """

    def __init__(self, engine: Engine, dimension: int, seed: int):
        self.space, self.device, self.dimension = engine.spaces[SHARED], engine.device, dimension
        self.groups = groups_of(self.space)
        size = max(SIGNS, 64 * dimension)
        source = torch.Generator().manual_seed(key(seed, "signs") >> 1)
        signs = torch.randint(2, (size,), generator=source, dtype=torch.int8).float().mul_(2).sub_(1)
        self._signs = torch.cat([signs, signs[:dimension]]).to(self.space.masters[0].device)
        self._blocks = [
            (self.groups.index(group_of(segment.name)), segment.shard, blocks(segment, engine, dimension, seed, size))
            for segment in self.space.counted
        ]
        self._sketches: list[Tensor] = []  # (G, k) each

    @property
    def bytes(self) -> int:
        """Bytes that this rank holds: sketches, signs and the table of blocks."""
        table_bytes = sum(table.nbytes for _, _, table in self._blocks)
        return sum(sketch.nbytes for sketch in self._sketches) + self._signs.nbytes + table_bytes

    @torch.no_grad()
    def add(self, vector: Vector) -> None:
        """Takes the next gradient, which may be dropped afterwards."""
        k = self.dimension
        sums = torch.zeros(len(self.groups), 2 * k, device=self._signs.device)
        for group, shard, table in self._blocks:
            flat, row = vector[shard], sums[group]
            for begin, length, column, sign_at, sign in table.tolist():
                row[column : column + length].addcmul_(
                    flat[begin : begin + length], self._signs[sign_at : sign_at + length], value=sign
                )
        self._sketches.append(sums[:, :k] + sums[:, k:])  # columns are modulo k

    def products(self) -> np.ndarray:
        """(G, n, n) inner products of the projections, float64."""
        products = []
        for group in range(len(self.groups)):  # one at a time: no second copy of all sketches
            rows = torch.stack([sketch[group] for sketch in self._sketches]).to(self.device)  # (n, k)
            dist.all_reduce(rows)
            products.append(rows.double() @ rows.double().T)
        return torch.stack(products).cpu().numpy()


def blocks(segment: Segment, engine: Engine, dimension: int, seed: int, signs: int) -> np.ndarray:
    """The segment cut at the blocks of its whole parameter.

    Returns (blocks, 5) int64: begin in the shard, length, first column of the (unfolded) sketch, first sign, +1 or -1.
    """
    tensor, rank = engine.layout.tensor, engine.layout.tensor_rank
    copies = tensor if segment.partition_dim is not None else 1
    count = -(-math.prod(segment.shape) * copies // dimension)
    source = generator(key(seed, "blocks", segment.name, size=16))
    rotation, sign_at = source.integers(dimension, size=count), source.integers(signs, size=count)
    sign = 2 * source.integers(2, size=count) - 1
    rows = []
    for begin, length, position in runs(segment, copies, rank):
        first, last = position // dimension, (position + length - 1) // dimension
        block = np.arange(first, last + 1)
        starts = np.maximum(block * dimension, position)
        ends = np.minimum((block + 1) * dimension, position + length)
        column = starts - block * dimension
        columns = [
            begin + starts - position,
            ends - starts,
            rotation[block] + column,
            sign_at[block] + column,
            sign[block],
        ]
        rows.append(np.stack(columns))
    return np.concatenate(rows, axis=1).T if rows else np.empty((0, 5), dtype=np.int64)


def runs(segment: Segment, copies: int, rank: int) -> Sequence[tuple[int, int, int]]:
    """The stretches of the segment that are contiguous in the whole parameter, which `copies` ranks share.

    Each is (begin in the shard, length, position in the whole parameter's row-major order).
    """
    if not segment.length:
        return []
    outer = math.prod(segment.shape[: segment.partition_dim or 0])  # slices of the parameter that ranks share out
    inner = math.prod(segment.shape) // outer  # elements of each that this rank holds
    stretches = []
    start, end = segment.start, segment.start + segment.length
    for row in range(start // inner, (end - 1) // inner + 1):
        low, high = max(start, row * inner), min(end, (row + 1) * inner)
        shift = (row * (copies - 1) + rank % copies) * inner
        stretches.append((segment.offset + low - start, high - low, low + shift))
    return stretches
