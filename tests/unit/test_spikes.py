"""Running statistics of the loss, against NumPy; what counts as a spike and what does not."""

from __future__ import annotations

import math

import numpy as np

from mlinterf_ds.engine.spikes import FEWEST, LEAST, WINDOW, Spikes


def taught(losses: np.ndarray, limit: float | None = 10.0) -> Spikes:
    found = Spikes(limit)
    for loss in losses.tolist():
        assert not found.found({"loss": loss, "loss/en": loss})
        found.add({"loss": loss, "loss/en": loss, "loss_scale": 1e9, "lr": 1e9})
    return found


def test_the_first_steps_moments_are_exact_and_later_ones_weighted() -> None:
    losses = np.random.default_rng(0).normal(3, 0.2, 3 * WINDOW)
    count, mean, variance = taught(losses[:WINDOW]).seen["en"]
    assert count == WINDOW
    assert math.isclose(mean, losses[:WINDOW].mean(), rel_tol=1e-12)
    assert math.isclose(variance, losses[:WINDOW].var(), rel_tol=1e-9)
    # from then on: weights 1/WINDOW (1 - 1/WINDOW)^age over what came before
    weights = np.full(3 * WINDOW, 1 / WINDOW)
    weights[WINDOW:] = 1.0
    for number in range(WINDOW, 3 * WINDOW):
        weights[:number] *= 1 - 1 / WINDOW
        weights[number] = 1 / WINDOW
    _, mean, variance = taught(losses).seen["en"]
    assert math.isclose(mean, weights @ losses, rel_tol=1e-12)
    assert math.isclose(variance, weights @ (losses - weights @ losses) ** 2, rel_tol=1e-9)


def test_what_is_a_spike() -> None:
    losses = np.random.default_rng(1).normal(3, 0.2, 200)
    found = taught(losses)
    _, mean, variance = found.seen["en"]
    edge = mean + 10 * math.sqrt(variance)
    assert not found.found({"loss/en": edge - 1e-6})
    assert "in en, where 2.98" in found.found({"loss/en": edge + 1e-6})
    assert not found.found({"loss/sw": 1e6}), "a language that was never seen"
    assert not any(found.found({"loss/en": bad}) for bad in (math.nan, math.inf)), "the loss scale's affair"
    quiet = taught(np.full(50, 0.01))
    assert not quiet.found({"loss/en": 0.01 + LEAST - 1e-6}) and quiet.found({"loss/en": 0.01 + LEAST + 1e-6})
    assert not taught(losses, None).found({"loss/en": 1e6}), "switched off"


def test_warm_up_and_rare_languages_raise_no_alarm() -> None:
    """A falling loss, one that rises for a while, few observations."""
    steps = np.arange(400)
    noise = np.random.default_rng(2).normal(0, 0.3, 400)
    taught(10 * np.exp(-steps / 60) + 2 + noise)
    taught(4 + 2 * np.sin(steps / 30) + noise)
    few = taught(np.full(FEWEST - 1, 2.0))
    assert not few.found({"loss/en": 50.0})
    few.add({"loss/en": 2.0})
    assert few.found({"loss/en": 50.0})
