"""Algorithm 1's hypergradient in one process of plain torch, in any dtype: the reference with exact double backward.

A `LocalSpace` also serves `meta/bilevel.py`, so finite differences and the exact product can be compared side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlinterf_ds.meta.bilevel import Gradients, Lookahead, Vector


class LocalSpace:
    """Some parameters of a module as flat vectors of their own dtype (a `ParameterSpace`)."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)

    @contextmanager
    def displaced(self, offset: Vector, scale: float | Tensor) -> Iterator[None]:
        saved = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            for parameter, vector in zip(self.parameters, offset, strict=True):
                parameter.add_(vector.view_as(parameter) * scale)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(self.parameters, saved, strict=True):
                    parameter.copy_(before)

    def dot(self, left: Vector, right: Vector) -> Tensor:
        products = [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)]
        return torch.stack(products).sum(dtype=torch.float64)

    def weights_norm(self) -> Tensor:
        weights = [parameter.detach() for parameter in self.parameters]
        return self.dot(weights, weights).sqrt()


def gradients_of(loss: Callable[[], Tensor]) -> Gradients:
    """Gradients of a replayable loss for LocalSpaces; parameters that the loss does not use get zeros."""

    def gradients(spaces: Sequence[Any]) -> list[Vector]:
        parameters = [parameter for space in spaces for parameter in space.parameters]
        flat = iter(_flat(torch.autograd.grad(loss(), parameters, allow_unused=True), parameters))
        return [[next(flat) for _ in space.parameters] for space in spaces]

    return gradients


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Vector:
    """The gradients of parameters as flat tensors, with zeros in place of None."""
    return [
        torch.zeros_like(parameter).reshape(-1) if gradient is None else gradient.reshape(-1)
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]


def exact_mixed_product(loss: Callable[[], Tensor], theta: LocalSpace, phi: LocalSpace, v: Vector) -> Vector:
    """d2 L^train / dphi dtheta . v by double backward: what Eq. 8 approximates. The loss must be twice differentiable."""
    first = torch.autograd.grad(loss(), theta.parameters, create_graph=True, allow_unused=True)
    inner = sum(
        ((g.reshape(-1) * vector.detach()).sum() for g, vector in zip(first, v, strict=True) if g is not None),
        torch.zeros((), dtype=v[0].dtype),
    )
    return _flat(torch.autograd.grad(inner, phi.parameters, allow_unused=True), phi.parameters)


def exact_hypergradient(
    train: Callable[[], Tensor],
    validation: Callable[[], Tensor],
    theta: LocalSpace,
    phi: LocalSpace,
    *,
    lookahead: Lookahead,
    beta: float,
) -> Vector:
    """h_i (Eq. 4) with the mixed product by double backward."""
    (descent,) = gradients_of(train)([theta])
    with theta.displaced(lookahead.step(descent), -beta):
        value, direct = gradients_of(validation)([theta, phi])
    mixed = exact_mixed_product(train, theta, phi, lookahead.pull_back(descent, value))
    return [first - beta * second for first, second in zip(direct, mixed, strict=True)]
