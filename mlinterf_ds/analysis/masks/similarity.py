"""Similarity of the languages' masks: cosines of pi over the model, its components and its layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlinterf_ds.analysis.masks.gates import COMPONENTS, Gates
from mlinterf_ds.gradients.similarity import ALL

EXTREMES = 10  # groups of either end in figure 4b


@dataclass(frozen=True)
class Masks:
    """pi of all languages and seeds, and the gates that they belong to."""

    languages: tuple[str, ...]
    seeds: tuple[int, ...]
    pi: np.ndarray  # (languages, seeds, groups) float64
    gates: Gates

    @property
    def components(self) -> list[str]:
        """The components that have groups."""
        return [component for component in COMPONENTS if component in self.gates.per_group("component")]

    @property
    def layers(self) -> list[int]:
        """The layers that have groups."""
        return sorted(set(self.gates.per_group("layer")))

    def scopes(self) -> Iterator[tuple[int | str, str]]:
        """(layer, component) of every reported similarity: the model, its components, and the components of each layer."""
        yield ALL, ALL
        layers: list[int | str] = [ALL, *self.layers]
        yield from itertools.product(layers, self.components)

    def matrix(self, layer: int | str = ALL, component: str = ALL, *, centred: bool = False) -> np.ndarray:
        """(L, L) similarities over a scope's groups; NaN on the diagonal if there is one seed.

        centred: subtract each pi's mean over the scope first, which makes the cosines correlations.
        """
        where = zip(self.gates.per_group("layer"), self.gates.per_group("component"), strict=True)
        chosen = [layer in (ALL, number) and component in (ALL, part) for number, part in where]
        pi = self.pi[..., np.array(chosen)]
        return similarities(pi - pi.mean(axis=-1, keepdims=True) if centred else pi)

    def extremes(self, language: int) -> list[tuple[str, np.ndarray]]:
        """(group, values (L,)) of the groups with a language's lowest and highest pi, ascending.

        Values are means over the seeds, divided by each language's largest absolute mean.
        """
        mean = self.pi.mean(axis=1)
        mean = mean / np.abs(mean).max(axis=1, keepdims=True)
        order = np.argsort(mean[language], kind="stable")
        count, names = min(EXTREMES, len(order) // 2), self.gates.names
        chosen = [*order[:count], *order[len(order) - count :]]
        return [(names[group], mean[:, group]) for group in chosen]


def similarities(pi: np.ndarray) -> np.ndarray:
    """(L, L) mean cosines of pi (L, seeds, groups): over all pairs of seeds of two languages, and over pairs of different
    seeds of one language."""
    count, seeds = pi.shape[:2]
    length = np.linalg.norm(pi, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = (pi / length).reshape(count * seeds, -1)
    cosines = (unit @ unit.T).reshape(count, seeds, count, seeds)
    matrix = cosines.mean(axis=(1, 3))
    different = np.triu_indices(seeds, 1)
    for language in range(count):
        within = cosines[language, :, language][different]
        matrix[language, language] = within.mean() if len(within) else np.nan
    return matrix
