"""The reference: one process, plain torch, any dtype; finite differences and exact double backward side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlinterf_ds.meta.bilevel import Gradients, Lookahead, Vector


class LocalSpace:
    """Some parameters of a module, as flat vectors of their own dtype."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)

    @contextmanager
    def displaced(self, offset: Vector, scale: float) -> Iterator[None]:
        saved = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            for parameter, piece in zip(self.parameters, offset, strict=True):
                parameter.add_(piece.view_as(parameter), alpha=scale)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(self.parameters, saved, strict=True):
                    parameter.copy_(before)

    def dot(self, left: Vector, right: Vector) -> float:
        return sum(torch.dot(a.reshape(-1), b.reshape(-1)).item() for a, b in zip(left, right, strict=True))

    def weights_norm(self) -> float:
        return math.sqrt(sum(parameter.detach().square().sum().item() for parameter in self.parameters))


def gradients_of(loss: Callable[[], Tensor]) -> Gradients:
    """Gradients of a replayable loss for LocalSpaces; parameters the loss does not use get zeros."""

    def gradients(spaces: Sequence[Any]) -> list[Vector]:
        wanted = [parameter for space in spaces for parameter in space.parameters]
        found = iter(torch.autograd.grad(loss(), wanted, allow_unused=True))
        result = []
        for space in spaces:
            pieces = [next(found) for _ in space.parameters]
            result.append(
                [
                    torch.zeros_like(parameter).reshape(-1) if piece is None else piece.reshape(-1)
                    for piece, parameter in zip(pieces, space.parameters, strict=True)
                ]
            )
        return result

    return gradients


def exact_mixed_product(loss: Callable[[], Tensor], theta: LocalSpace, phi: LocalSpace, v: Vector) -> Vector:
    """d2 L^train / dphi dtheta . v by double backward: the oracle of Eq. 8 (needs a twice differentiable loss)."""
    first = torch.autograd.grad(loss(), theta.parameters, create_graph=True, allow_unused=True)
    inner = sum(
        ((g.reshape(-1) * piece.detach()).sum() for g, piece in zip(first, v, strict=True) if g is not None),
        torch.zeros((), dtype=v[0].dtype),
    )
    second = torch.autograd.grad(inner, phi.parameters, allow_unused=True)
    return [
        torch.zeros_like(parameter).reshape(-1) if piece is None else piece.reshape(-1)
        for piece, parameter in zip(second, phi.parameters, strict=True)
    ]


def exact_hypergradient(
    train: Callable[[], Tensor],
    validation: Callable[[], Tensor],
    theta: LocalSpace,
    phi: LocalSpace,
    *,
    lookahead: Lookahead,
    beta: float,
) -> Vector:
    """h_i with the mixed product by double backward: three passes, the middle one twice as deep."""
    (descent,) = gradients_of(train)([theta])
    with theta.displaced(lookahead.step(descent), -beta):
        value, direct = gradients_of(validation)([theta, phi])
    mixed = exact_mixed_product(train, theta, phi, lookahead.pull_back(descent, value))
    return [first - beta * second for first, second in zip(direct, mixed, strict=True)]
