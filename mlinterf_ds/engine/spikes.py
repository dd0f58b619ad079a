"""Which losses are spikes: a running mean and variance of each language's loss, the same on all ranks.

A language is judged after FEWEST of its own steps, so that warm-up, few observations and rare languages raise no alarm; while
the loss still falls steeply, its variance is large. What is skipped teaches the statistics nothing. They are part of a
checkpoint: a resumed run decides as the uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

FEWEST = 20  # steps with a language before its loss is judged
WINDOW = 100  # of its steps that the mean and variance look back
LEAST = 1.0  # nats above the mean that are no spike, however quiet the loss was

PREFIX = "loss/"


class Spikes:
    """Running statistics of `loss/<language>` in a step's facts; limit: standard deviations above the mean, None: off."""

    def __init__(self, limit: float | None):
        self.limit = limit
        self.seen: dict[str, list[float]] = {}  # language -> [observations, mean, variance]

    def found(self, facts: Mapping[str, float]) -> str:
        """The first loss that is a spike, in words; '' if none is (a loss that is not finite is no spike: see `LossScale`)."""
        for language, loss in _losses(facts).items():
            count, mean, variance = self.seen.get(language, [0, 0.0, 0.0])
            if self.limit is None or count < FEWEST or not math.isfinite(loss):
                continue
            if loss > mean + max(LEAST, self.limit * math.sqrt(variance)):
                return f"loss {loss:.4g} in {language}, where {mean:.4g} +- {math.sqrt(variance):.2g} is usual"
        return ""

    def add(self, facts: Mapping[str, float]) -> None:
        """Learn the losses of a step that counted: exact moments of the first WINDOW, then exponentially weighted ones."""
        for language, loss in _losses(facts).items():
            if math.isfinite(loss):
                count, mean, variance = self.seen.get(language, [0, 0.0, 0.0])
                weight = 1 / min(count + 1, WINDOW)
                change = loss - mean
                variance = (1 - weight) * (variance + weight * change**2)
                self.seen[language] = [count + 1, mean + weight * change, variance]


def _losses(facts: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(PREFIX): loss for name, loss in facts.items() if name.startswith(PREFIX)}
