"""Cosine similarities of languages' gradients, from inner products; what measuring them cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.throughput import peak_memory
from mlinterf_ds.gradients.collect import COMPONENTS, DRAWS, Draws, Group, gradients
from mlinterf_ds.gradients.products import Exact, Sketch

MOST_EXACT = 4  # languages up to which sketch=auto keeps whole gradients
DIMENSION = 4096  # of the projection beyond

ALL = "all"


@dataclass(frozen=True)
class Similarity:
    """Similarities of L languages: diagonal within a language (two batches), else between two."""

    languages: tuple[str, ...]
    groups: Sequence[Group]
    products: np.ndarray  # (groups, 2L, 2L): inner products of the gradients, by their numbers

    def cosines(self, layer: int | str | None = ALL, component: str = ALL) -> np.ndarray:
        """(2L, 2L) cosines of the gradients, over the parameters of a layer, of a component, of both, or all."""
        chosen = [layer in (ALL, at) and component in (ALL, part) for at, part in self.groups]
        products = self.products[np.array(chosen)].sum(axis=0)
        length = np.sqrt(np.diagonal(products))
        with np.errstate(invalid="ignore", divide="ignore"):
            return products / np.outer(length, length)

    def matrix(self, layer: int | str | None = ALL, component: str = ALL) -> np.ndarray:
        """(L, L): between two languages the mean over their four pairs of batches; NaN where a gradient is zero."""
        cosines, count = self.cosines(layer, component), len(self.languages)
        found = cosines.reshape(count, DRAWS, count, DRAWS).mean(axis=(1, 3))
        found = (found + found.T) / 2  # symmetric to the last bit
        within = cosines[np.arange(0, DRAWS * count, DRAWS), np.arange(1, DRAWS * count, DRAWS)]
        found[np.arange(count), np.arange(count)] = within
        return found

    def corrected(self) -> np.ndarray:
        """(L, L): between languages, divided by the geometric mean of the two ceilings: 1 if only sampling differs."""
        found = self.matrix()
        within = np.sqrt(np.where(np.diagonal(found) > 0, np.diagonal(found), np.nan))
        return found / np.outer(within, within)

    def scopes(self) -> Iterator[tuple[int | str | None, str]]:
        """(layer, component) of everything reported: the model, components, layers, components of layers."""
        parts = [part for part in COMPONENTS if any(part == found for _, found in self.groups)]
        layers = sorted({at for at, _ in self.groups if at is not None})
        yield ALL, ALL
        yield from ((ALL, part) for part in parts)
        yield from ((layer, ALL) for layer in layers)
        yield from ((layer, part) for layer, part in self.groups if layer is not None)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Places of every language with itself, then of every two."""
        count = range(len(self.languages))
        yield from ((place, place) for place in count)
        yield from ((left, right) for left in count for right in count if left < right)


def spread(matrix: np.ndarray) -> dict[str, float]:
    """Means within a language and between two (the latter NaN for one language), and the least between."""
    between = matrix[np.triu_indices(len(matrix), 1)]
    facts = {"within": float(np.diagonal(matrix).mean())}
    return facts | ({"between": float(between.mean()), "least": float(between.min())} if len(between) else {})


def measure(
    engine: Engine, draws: Draws, sketch: str | int, seed: int, measurement: int = 0
) -> tuple[Similarity, dict[str, Any]]:
    """The similarities now, and their costs: seconds, and bytes of this rank beyond the model and one gradient."""
    from deepspeed.accelerator import get_accelerator

    dimension = sketch
    if sketch == "auto":
        dimension = "exact" if len(draws.languages) <= MOST_EXACT else DIMENSION
    clock = _Clock(get_accelerator().synchronize)
    table = Exact(engine) if dimension == "exact" else Sketch(engine, int(dimension), seed)
    clock.lap("similarity")
    peak = 0
    for vector in gradients(engine, draws, measurement):
        clock.lap("gradients")
        peak = peak or peak_memory(engine.device)  # one gradient has been computed, nothing compared
        table.add(vector)
        del vector
        clock.lap("similarity")
    products = table.products()
    clock.lap("similarity")
    costs = {
        "seconds_gradients": clock.seconds["gradients"],
        "seconds_similarity": clock.seconds["similarity"],
        "ratio": 1 + clock.seconds["similarity"] / clock.seconds["gradients"],
        "bytes_held": table.bytes,
        "bytes_peak_increase": peak_memory(engine.device) - peak,
    }
    return Similarity(draws.languages, table.groups, products), costs | {"sketch": dimension}


class _Clock:
    """Seconds by what was done, the device's work included."""

    def __init__(self, synchronize: Any):
        self.seconds = {"gradients": 0.0, "similarity": 0.0}
        self._synchronize, self._last = synchronize, time.perf_counter()

    def lap(self, what: str) -> None:
        self._synchronize()
        now = time.perf_counter()
        self.seconds[what] += now - self._last
        self._last = now
