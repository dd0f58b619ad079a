"""The hard concrete distribution against its density, Monte Carlo and autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mlinterf_ds.analysis.masks import hard_concrete as hc

LOG_ALPHAS = [-6.0, -1.7, 0.0, 0.4, 3.0, 8.0]
DRAWS = 400_000


def draws() -> Tensor:
    """Evenly spread draws of U(0, 1): the error of a mean over them is of order 1 / DRAWS."""
    return (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS


def density(z: np.ndarray, log_alpha: float) -> np.ndarray:
    """Of the stretched variable: the binary concrete density (Maddison et al., 2017) divided by the stretch."""
    width = hc.ZETA - hc.GAMMA
    s, alpha, beta = (z - hc.GAMMA) / width, math.exp(log_alpha), hc.BETA
    rise = beta * alpha * s ** (-beta - 1) * (1 - s) ** (-beta - 1)
    return rise / (alpha * s**-beta + (1 - s) ** -beta) ** 2 / width


def integral(weight: np.ndarray, low: float, high: float, log_alpha: float) -> float:
    """Of weight(z) * density(z), by the midpoint rule on points that crowd towards the ends (the density is infinite
    at those of its support); `weight` are polynomial coefficients."""
    edges = (1 - np.cos(np.linspace(0, math.pi, 200_001))) / 2
    middle, width = low + (high - low) * (edges[1:] + edges[:-1]) / 2, (high - low) * np.diff(edges)
    return float((np.polyval(weight, middle) * density(middle, log_alpha) * width).sum())


@pytest.mark.parametrize("value", LOG_ALPHAS)
def test_samples_have_the_density(value: float) -> None:
    log_alpha = torch.tensor(value, dtype=torch.float64)
    below = integral(np.array([1.0]), hc.GAMMA, 0, value)
    above = integral(np.array([1.0]), 1, hc.ZETA, value)
    inside = integral(np.array([1.0]), 0, 1, value)
    assert below + inside + above == pytest.approx(1, abs=1e-4)  # the density is one
    assert 1 - float(hc.nonzero(log_alpha)) == pytest.approx(below, abs=1e-4)
    z = hc.sample(log_alpha, draws())
    assert float(z.min()) >= 0 and float(z.max()) <= 1
    assert float((z > 0).double().mean()) == pytest.approx(float(hc.nonzero(log_alpha)), abs=1e-5)
    assert float((z == 1).double().mean()) == pytest.approx(above, abs=1e-4)
    by_density = integral(np.array([1.0, 0.0]), 0, 1, value) + above  # plus the point mass at one
    assert float(z.mean()) == pytest.approx(by_density, abs=1e-4)


@pytest.mark.parametrize("value", LOG_ALPHAS)
def test_gradients(value: float) -> None:
    log_alpha = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    # d P(z != 0) = P (1 - P)
    (slope,) = torch.autograd.grad(hc.nonzero(log_alpha), log_alpha)
    chance = float(hc.nonzero(log_alpha.detach()))
    assert float(slope) == pytest.approx(chance * (1 - chance), rel=1e-12)
    # of a sample: (ZETA - GAMMA) s (1 - s) / BETA inside, zero where it is clamped
    u = torch.tensor([1e-6, 0.2, 0.5, 0.9, 1 - 1e-6], dtype=torch.float64)
    s = 1 / (1 + torch.exp(-(torch.log(u / (1 - u)) + value) / hc.BETA))
    stretched = s * (hc.ZETA - hc.GAMMA) + hc.GAMMA
    wanted = (hc.ZETA - hc.GAMMA) * s * (1 - s) / hc.BETA * ((stretched > 0) & (stretched < 1))
    found = torch.stack([torch.autograd.grad(hc.sample(log_alpha, x), log_alpha)[0] for x in u])
    torch.testing.assert_close(found, wanted.detach())


def test_extremes_are_finite() -> None:
    log_alpha = torch.tensor([-60.0, 0.0, 60.0], requires_grad=True)
    for uniform in (0.0, 1.0):  # what a generator may draw, rounded to fp32
        z = hc.sample(log_alpha, torch.tensor(uniform))
        z.sum().backward()
        assert torch.isfinite(z).all() and torch.isfinite(log_alpha.grad).all()  # type: ignore[arg-type]
    assert hc.gate(log_alpha).tolist() == [0.0, 0.5, 1.0]


def test_gate_is_zero_below_its_threshold() -> None:
    threshold = math.log(-hc.GAMMA / hc.ZETA)  # sigmoid(log_alpha) = -GAMMA / (ZETA - GAMMA)
    edge = torch.tensor([threshold - 1e-3, threshold + 1e-3], dtype=torch.float64)
    below, above = hc.gate(edge).tolist()
    assert below == 0 and 0 < above < 1e-3
