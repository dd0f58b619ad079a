"""Algorithm 1 on the engine: phase 1 (phi_i by the hypergradient), phase 2 (theta at the new phi_i), as one step.

Any pass may overflow: then phi_i, theta and all moments are as before, and only the loss scale and the count of skipped
steps have moved.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mlinterf_ds.engine.engine import SHARED, Engine, Rows
from mlinterf_ds.engine.optimizer import learning_rate
from mlinterf_ds.engine.space import Space, Vector
from mlinterf_ds.meta.bilevel import (
    AdamLookahead,
    GradientDescent,
    Gradients,
    Hypergradient,
    Lookahead,
    RadiusControl,
    cosine,
    finite,
    hypergradient,
    mixed_product,
    norm,
)
from mlinterf_ds.sections import MetaConfig

SEARCH = 12  # tries of a radius in a run's first step; later steps follow it
AGREEMENT = 0.8  # below this cosine of two radii's estimates, the difference is called noise
# Relative change of phi's gradient that the radius aims at: above the round-off of the precision, below the curvature
# (which a one-sided difference feels in the first order).
TARGETS = {
    "central": {"fp32": 0.01, "bf16": 0.15, "fp16": 0.1},
    "one_sided": {"fp32": 0.005, "bf16": 0.08, "fp16": 0.02},
}


class WholeSpace:
    """A space as the algorithm sees it: sums run over all ranks."""

    def __init__(self, space: Space):
        self.space = space
        self.device = next(iter(space.parameters.values())).device  # masters may be offloaded to where no collective is

    def displaced(self, offset: Vector, scale: float) -> contextlib.AbstractContextManager[None]:
        return self.space.displaced(offset, scale)

    def dot(self, left: Vector, right: Vector) -> float:
        total = self.space.dot(left, right).to(self.device)
        dist.all_reduce(total)
        return total.item()

    def weights_norm(self) -> float:
        masters = [master.detach() for master in self.space.masters]
        return math.sqrt(self.dot(masters, masters))


class MetaStep:
    """Steps of a `meta_*` variant; holds the radius of the finite difference, which is part of a checkpoint."""

    def __init__(self, engine: Engine, config: MetaConfig):
        self.engine, self.config = engine, config
        fixed = config.radius != "auto"
        start = float(config.radius) if fixed else 1e-3
        self.radius = RadiusControl(start, TARGETS[config.difference][engine.precision], fixed=fixed)

    def step(self, batches: Sequence[Rows], validation: Sequence[Rows]) -> dict[str, float]:
        """One step: this rank's micro-batches of the step's language, and those of L^val (none between meta steps)."""
        engine, config = self.engine, self.config
        if engine.step % config.every:
            shared_only = [engine.spaces[SHARED]] if config.between == "freeze" else None
            return engine.train_step(batches, shared_only)
        (language,) = batches[0].step_languages
        lr = learning_rate(engine.config.train, engine.updates + 1)
        facts = {"lr": lr, "loss_scale": engine.scale.value}
        run = _Run(self, batches, validation, engine.languages[language], lr, facts)
        phases = [run.phase_1, run.phase_2] if config.order == "phi_first" else [run.phase_2, run.phase_1]
        try:
            with run.kept(run.phi if config.order == "phi_first" else run.theta):
                for phase in phases:
                    phase()
        except FloatingPointError:
            engine.settle(False, facts)
        else:
            engine.settle(True, facts)
            self.radius.update(facts.get("meta/change", math.nan))
        return facts | {"skipped": float(engine.skipped)}


class _Run:
    """The two phases of one step."""

    def __init__(
        self,
        owner: MetaStep,
        batches: Sequence[Rows],
        validation: Sequence[Rows],
        language: str,
        lr: float,
        facts: dict[str, float],
    ):
        self.owner, self.engine, self.config = owner, owner.engine, owner.config
        self.batches, self.lr, self.facts = batches, lr, facts
        self.theta = WholeSpace(self.engine.spaces[SHARED])
        self.phi = WholeSpace(self.engine.spaces[language])
        self.train = self._gradients(batches, "loss")
        self.validation = self._gradients(validation, "meta/validation")

    def _gradients(self, batches: Sequence[Rows], name: str) -> Gradients:
        """Passes over these micro-batches; the losses of the first pass are the step's facts."""

        def gradients(spaces: Sequence[WholeSpace]) -> list[Vector]:
            engine = self.engine
            sums = engine.accumulate(batches, [whole.space for whole in spaces])
            found = [whole.space.gradient() for whole in spaces]
            if engine.scale.value != 1.0:
                found = [[piece.div_(engine.scale.value) for piece in vector] for vector in found]
            if name not in self.facts:
                dist.all_reduce(sums)
                self.facts |= engine.loss_facts(batches[0].step_languages, sums / engine.layout.tensor, name)
                if why := engine.spikes.found(self.facts):  # no phase has changed anything yet
                    raise FloatingPointError(why)
            return found

        return gradients

    @contextlib.contextmanager
    def kept(self, whole: WholeSpace) -> Iterator[None]:
        """Put the weights and moments of a space back if a later pass is not finite."""
        name = self.engine.name_of(whole.space)
        saved = [
            (tensor, tensor.detach().clone())
            for master in whole.space.masters
            for tensor in (master, *self.engine.optimizers[name].state[master].values())
        ]
        try:
            yield
        except FloatingPointError:
            with torch.no_grad():
                for tensor, before in saved:
                    tensor.copy_(before)
            whole.space.write()
            raise

    def phase_1(self) -> None:
        """phi_i <- AdamW(phi_i, h_i) (Algorithm 1, line 6)."""
        config = self.config
        beta = self.lr if config.beta is None else config.beta
        radius = self.owner.radius
        for left in reversed(range(SEARCH if self.engine.updates == 0 else 1)):
            found = hypergradient(
                self.train,
                self.validation,
                self.theta,
                self.phi,
                lookahead=self._lookahead(),
                beta=beta,
                radius=radius.radius,
                difference=config.difference,
                second_order=config.terms == "both",
            )
            if not left or radius.near(found.change):
                break
            radius.update(found.change)
        self._report(found, beta)
        self._apply(self.phi, found.total, "meta/gradient_norm")

    def phase_2(self) -> None:
        """theta <- AdamW(theta, grad_theta L_i^train(theta, phi_i_new)) (Algorithm 1, line 7; Eq. 5)."""
        (gradient,) = self.train([self.theta])
        self._apply(self.theta, gradient, "gradient_norm")

    def _apply(self, whole: WholeSpace, gradient: Vector, name: str) -> None:
        self.facts[name] = length = finite(whole, gradient, name)
        clip = self.engine.config.train.clip
        self.engine.update(whole.space, gradient, min(1.0, clip / (length + 1e-6)) if clip else 1.0, self.lr)

    def _lookahead(self) -> Lookahead:
        if self.config.lookahead == "sgd":
            return GradientDescent()
        states = [self.engine.optimizers[SHARED].state[master] for master in self.theta.space.masters]
        train = self.engine.config.train
        first: list[Tensor] = [state["exp_avg"] for state in states]
        second: list[Tensor] = [state["exp_avg_sq"] for state in states]
        number = int(states[0]["step"].item()) + 1
        return AdamLookahead(first, second, number, train.beta1, train.beta2, train.eps)

    def _report(self, found: Hypergradient, beta: float) -> None:
        """The terms of h_i, so that a user sees whether the second-order one matters."""
        facts = self.facts
        facts["meta/beta"], facts["meta/descent_norm"] = beta, found.descent_norm
        facts["meta/direct_norm"] = norm(self.phi, found.direct)
        if found.mixed is None or found.direction is None:
            return
        facts["meta/second_order_norm"] = beta * norm(self.phi, found.mixed)
        facts["meta/cosine"] = -cosine(self.phi, found.direct, found.mixed)  # of the two terms as they enter h_i
        facts["meta/radius"], facts["meta/change"] = self.owner.radius.radius, found.change
        if self.config.check_every and self.engine.step % self.config.check_every == 0:
            radius = self.owner.radius.radius / 2
            other, _ = mixed_product(self.train, self.theta, self.phi, found.direction, radius)
            facts["meta/self_check"] = cosine(self.phi, found.mixed, other)
