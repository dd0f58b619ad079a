"""What frozen states say by themselves: a linear probe, nearest neighbours among translations, links between words.

All of it has a closed form or is a count: nothing is drawn at random, and no step size is chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Links = set[tuple[int, int]]  # (word of the left sentence, word of the right one)
PENALTY = 0.01  # of the ridge, in variances of a feature
NEIGHBOURS = 10  # over which CSLS takes its means (Conneau et al., 2018)


@dataclass(frozen=True)
class Probe:
    """A linear classifier of states: ridge regression of the classes' indicators on standardised features."""

    mean: Array  # (width,)
    scale: Array  # (width,)
    weights: Array  # (width, classes)
    bias: Array  # (classes,)

    @classmethod
    def fitted(cls, states: Array, classes: Array, count: int) -> Probe:
        """states: (words, width); classes: (words,) numbers below `count`."""
        states, indicators = states.astype(np.float64), np.eye(count)[classes]
        mean, scale = states.mean(0), states.std(0)
        features = (states - mean) / np.where(scale > 0, scale, 1)
        bias = indicators.mean(0)
        gram = features.T @ features + PENALTY * len(features) * np.eye(features.shape[1])
        weights = np.linalg.solve(gram, features.T @ (indicators - bias))
        return cls(mean, np.where(scale > 0, scale, 1), weights, bias)

    def classes(self, states: Array) -> Array:
        """The class of each of the states (words, width)."""
        predicted: Array = ((states - self.mean) / self.scale @ self.weights + self.bias).argmax(-1)
        return predicted


def cosines(left: Array, right: Array) -> Array:
    """(n, m) cosines of left (n, width) and right (m, width)."""
    left, right = (side / np.maximum(np.linalg.norm(side, axis=-1, keepdims=True), 1e-12) for side in (left, right))
    product: Array = left @ right.T
    return product


def csls(similarity: Array, neighbours: int = NEIGHBOURS) -> Array:
    """2 s - r(row) - r(column), where r is the mean over the nearest neighbours: neighbours of all and sundry count for less."""
    k = min(neighbours, *similarity.shape)
    of_rows = np.sort(similarity, axis=1)[:, -k:].mean(1, keepdims=True)
    of_columns = np.sort(similarity, axis=0)[-k:].mean(0, keepdims=True)
    adjusted: Array = 2 * similarity - of_rows - of_columns
    return adjusted


def retrieved(left: Array, right: Array) -> tuple[float, float]:
    """The percentages of sentences whose translation is nearest by CSLS, from left to right and back.

    left, right: (sentences, width); row k of one translates row k of the other.
    """
    similarity = csls(cosines(left, right))
    own = np.arange(len(similarity))
    return float(100 * (similarity.argmax(1) == own).mean()), float(100 * (similarity.argmax(0) == own).mean())


def linked(left: Array, right: Array) -> Links:
    """The pairs of words each of which is the other's nearest by cosine; left: (words, width), right: (words, width)."""
    similarity = cosines(left, right)
    nearest, back = similarity.argmax(1), similarity.argmax(0)
    return {(i, int(j)) for i, j in enumerate(nearest) if back[j] == i}


def diagonal(left: int, right: int) -> Links:
    """The links of words that stand at the same place in both sentences, which have so many words."""
    return {(k, k) for k in range(min(left, right))}


def f1(pairs: Iterable[tuple[Links, Links]]) -> float:
    """F1 in percent of the predicted links against the gold ones, over all sentences together."""
    right = predicted = gold = 0
    for of_sentence, known in pairs:
        right, predicted, gold = right + len(of_sentence & known), predicted + len(of_sentence), gold + len(known)
    return 200 * right / (predicted + gold) if predicted + gold else 0.0
