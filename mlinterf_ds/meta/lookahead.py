"""Adam's update rule in place of the paper's plain gradient step, for the lookahead of Eq. 3."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlinterf_ds.meta.bilevel import Vector


@dataclass(frozen=True)
class AdamLookahead:
    """P(g) = Adam's own step from these moments, which are read and never advanced; `step_number` counts from 1.

    dP/dg is diagonal: c1 / (sqrt(u) + eps) - c2 g m / (sqrt(u) (sqrt(u) + eps)^2), with m, u the bias-corrected moments
    after the step, c1 = (1 - b1) / (1 - b1^t) and c2 = (1 - b2) / (1 - b2^t).
    """

    first: Vector
    second: Vector
    step_number: int | Tensor  # a tensor where the device counts
    beta1: float
    beta2: float
    eps: float

    def _moments(self, gradient: Vector) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(g, m, sqrt(u)) of every shard."""
        c1 = 1 / (1 - self.beta1**self.step_number)
        c2 = 1 / (1 - self.beta2**self.step_number)
        return [
            (g, c1 * (self.beta1 * m + (1 - self.beta1) * g), (c2 * (self.beta2 * u + (1 - self.beta2) * g * g)).sqrt())
            for g, m, u in zip(gradient, self.first, self.second, strict=True)
        ]

    def step(self, gradient: Vector) -> Vector:
        return [m / (root + self.eps) for _, m, root in self._moments(gradient)]

    def pull_back(self, gradient: Vector, cotangent: Vector) -> Vector:
        c1 = (1 - self.beta1) / (1 - self.beta1**self.step_number)
        c2 = (1 - self.beta2) / (1 - self.beta2**self.step_number)
        result = []
        for shard, (g, m, root) in zip(cotangent, self._moments(gradient), strict=True):
            slope = c1 / (root + self.eps)
            bend = c2 * g * m / (root * (root + self.eps) ** 2)  # 0 / 0 where no gradient ever came
            result.append(shard * torch.where(root > 0, slope - bend, slope))
        return result
