"""The hard concrete distribution over gates z in [0, 1] (Louizos, Welling and Kingma, 2017, section 2.3).

A binary concrete variable s, with log-odds `log_alpha` (the paper's pi) and temperature BETA, is stretched to (GAMMA, ZETA) and
clamped to [0, 1]. The gate is then exactly 0 or 1 with positive probability, and yet a sample has a gradient. All functions are
elementwise in log_alpha and differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3  # the stretch and the temperature of Louizos et al., section 4


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """The gates that follow from draws of U(0, 1) (Eq. 10 and 11); the shapes broadcast."""
    return _stretched(torch.sigmoid((torch.logit(uniform) + log_alpha) / BETA))


def nonzero(log_alpha: Tensor) -> Tensor:
    """P(z != 0), which is a group's term in the expected L0 norm (Eq. 12)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def gate(log_alpha: Tensor) -> Tensor:
    """The gate of a trained mask (Eq. 13): exactly 0 or 1 where log_alpha is far from 0."""
    return _stretched(torch.sigmoid(log_alpha))


def _stretched(concrete: Tensor) -> Tensor:
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0.0, 1.0)
