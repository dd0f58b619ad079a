"""The paper's Algorithm 1, phase 1: the gradient of the languages' validation loss through one step of the shared weights.

A step of Algorithm 1 over language i changes its own parameters phi_i, then the shared parameters theta:

    phi_i <- GradientUpdate(phi_i, h_i)                                                                    (line 6)
    theta <- GradientUpdate(theta, grad_theta L_i^train(theta, phi_i))     with the new phi_i        (line 7, Eq. 5)

`hypergradient` is h_i. With the update rule P of the lookahead (the identity in the paper, optionally Adam's own):

    theta' = theta - beta P(g),   g = grad_theta L_i^train(theta, phi_i)                                      (Eq. 3)
    L^val  = 1/L sum_j L_j^val(theta', phi_j)                                                                  (Eq. 2)
    h_i    = grad_phi_i L^val - beta d2 L_i^train / dphi_i dtheta . v,   v = (dP/dg)^T grad_theta' L^val       (Eq. 4)
    d2 L_i^train / dphi_i dtheta . v  ~  [grad_phi_i L_i^train(theta + e v) - grad_phi_i L_i^train(theta - e v)] / 2e
                                                                                                               (Eq. 8)

The step's order can be turned round (theta first, as in the authors' released code), or both updates start from the same
point ("simultaneous": theta's gradient is then g, which phase 1 has already, and a pass is saved). A step may mix
languages: phi_i then stands for all of their parameters, and L_i^train for the mean loss of the step's rows. All equations
stay as they are.

Nothing here knows about ranks, dtypes or models: `engine/meta_step.py` takes the steps on the engine, and
`tools/bench/double_backward.py` is the same in plain torch, with exact second derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Vector = list[Tensor]  # a parameter group flattened: this rank's shards of it
Difference = Literal["central", "one_sided"]
TINY = 1e-30  # stands for a norm of zero in a quotient, which is then zero itself


class ParameterSpace(Protocol):
    """One parameter group (theta, or a language's phi_i) as flat vectors. Scalars are tensors: no one waits for their value."""

    def displaced(self, offset: Vector, scale: float | Tensor) -> AbstractContextManager[None]:
        """The weights are moved by scale * offset inside, and restored exactly after."""

    def dot(self, left: Vector, right: Vector) -> Tensor:
        """<left, right> over all ranks, replicas counted once."""

    def weights_norm(self) -> Tensor:
        """Norm of the weights over all ranks, replicas counted once."""


# The gradients of one loss at the current weights, for some of the spaces. Every call sees the same batch and dropout.
Gradients = Callable[[Sequence[Any]], list[Vector]]


@dataclass(frozen=True)
class Passes:
    """Gradients that the passes of phase 1 compute on the way to h_i: an update that uses them costs no pass."""

    descent: Vector  # g = grad_theta L_i^train(theta, phi_i)
    own: Vector  # grad_phi_i L_i^train(theta, phi_i)
    value: Vector  # grad_theta' L^val, the shared parameters' gradient on the validation rows


@dataclass(frozen=True)
class Hypergradient:
    """h_i, its terms (h_i = direct - beta * mixed), and the facts of the finite difference."""

    total: Vector  # h_i
    direct: Vector  # grad_phi_i L^val
    mixed: Vector | None  # d2 L_i^train / dphi_i dtheta . v; None where only the direct term was asked for
    direction: Vector | None  # v
    change: Tensor  # |g+ - g-| / |g|: the relative change of phi_i's gradient over the difference; NaN without one
    descent_norm: Tensor  # |g|
    direct_norm: Tensor  # |grad_phi_i L^val|
    mixed_norm: Tensor | None
    total_norm: Tensor  # |h_i|; not finite where a pass is not
    passes: Passes | None  # the passes' other gradients; None unless asked for


def hypergradient(
    train: Gradients,
    validation: Gradients,
    theta: ParameterSpace,
    phi: ParameterSpace,
    *,
    lookahead: Lookahead,
    beta: float,
    radius: float,
    difference: Difference = "central",
    second_order: bool = True,
    keep_passes: bool = False,
) -> Hypergradient:
    """h_i, the gradient of the validation loss after the lookahead with respect to phi_i (Eq. 3, 4 and 8).

    radius: the displacement |e v| / |theta| of the finite difference. difference: `one_sided` saves a pass by reusing the
    gradient at theta. second_order=False leaves the mixed term out. keep_passes: the result holds the other gradients of
    the passes, which memory would otherwise be rid of. Where a pass is not finite, neither is `total_norm`; the weights are
    as before in any case.
    """
    one_sided = second_order and difference == "one_sided"
    # the descent pass: g (Eq. 3)
    descent, *own = train([theta, phi] if one_sided or keep_passes else [theta])
    descent_norm = norm(theta, descent)
    # the validation pass at theta' = theta - beta P(g) (Eq. 3): the gradients of L^val (Eq. 2)
    with theta.displaced(lookahead.step(descent), -beta):
        value, direct = validation([theta, phi])
    direct_norm = norm(phi, direct)
    passes = Passes(descent, own[0], value) if keep_passes else None
    if not second_order:
        return Hypergradient(
            total=direct, direct=direct, mixed=None, direction=None, change=math.nan * direct_norm,
            descent_norm=descent_norm, direct_norm=direct_norm, mixed_norm=None,
            total_norm=direct_norm + 0 * descent_norm, passes=passes,
        )  # fmt: skip
    # the displaced passes: d2 L^train / dphi dtheta . v (Eq. 8), with v of Eq. 4
    v = lookahead.pull_back(descent, value)
    del descent, value  # the passes that follow need their memory
    mixed, change = mixed_product(train, theta, phi, v, radius, own[0] if one_sided else None)
    # h_i (Eq. 4)
    total = [torch.add(first, second, alpha=-beta) for first, second in zip(direct, mixed, strict=True)]
    return Hypergradient(
        total=total, direct=direct, mixed=mixed, direction=v, change=change,
        descent_norm=descent_norm, direct_norm=direct_norm, mixed_norm=norm(phi, mixed),
        total_norm=norm(phi, total) + 0 * (descent_norm + change),  # not finite where any pass is not
        passes=passes,
    )  # fmt: skip


def mixed_product(
    train: Gradients,
    theta: ParameterSpace,
    phi: ParameterSpace,
    v: Vector,
    radius: float,
    at_theta: Vector | None = None,
) -> tuple[Vector, Tensor]:
    """d2 L^train / dphi dtheta . v by differences of phi's gradient, and that gradient's relative change (Eq. 8).

    at_theta: phi's gradient at theta, for a one-sided difference; None for a central one. Both results are 0 for v = 0, and
    not finite where a pass or v is not.
    """
    epsilon = radius * theta.weights_norm() / norm(theta, v).clamp(min=TINY)
    with theta.displaced(v, epsilon):
        (plus,) = train([phi])
    if at_theta is None:
        with theta.displaced(v, -epsilon):
            (minus,) = train([phi])
        width = 2 * epsilon
    else:
        minus, width = at_theta, epsilon
    size = 0.5 * (norm(phi, plus) + norm(phi, minus))
    apart = [first - second for first, second in zip(plus, minus, strict=True)]
    change = norm(phi, apart) / size.clamp(min=TINY)
    return [shard.div_(width.to(shard.device)) for shard in apart], change


class Lookahead(Protocol):
    """The update rule P of the lookahead, and the transpose of its derivative."""

    def step(self, gradient: Vector) -> Vector:
        """The step P(gradient), before it is multiplied by -beta."""

    def pull_back(self, gradient: Vector, cotangent: Vector) -> Vector:
        """(dP/dg)^T cotangent, with the derivative at `gradient`."""


class GradientDescent:
    """P(g) = g: the paper's lookahead."""

    def step(self, gradient: Vector) -> Vector:
        return gradient

    def pull_back(self, gradient: Vector, cotangent: Vector) -> Vector:
        return cotangent


def norm(space: ParameterSpace, vector: Vector) -> Tensor:
    """|vector| over all ranks; infinite or NaN if it is not finite."""
    return space.dot(vector, vector).sqrt()


def cosine(space: ParameterSpace, left: Vector, right: Vector, norms: Tensor) -> Tensor:
    """Cosine similarity over all ranks of vectors with this product of norms; 0 where one of them vanishes."""
    return space.dot(left, right) / norms.clamp(min=TINY)
