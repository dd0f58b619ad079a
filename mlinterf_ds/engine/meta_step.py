"""Algorithm 1 on the engine, one step at a time: phase 1 updates phi_i by the hypergradient, phase 2 theta at the new phi_i.

`meta/bilevel.py` has the mathematics. Here are the passes over micro-batches that it asks for, the AdamW updates, and what
happens on an overflow: any pass may have one, and then phi_i, theta and all moments stay as they were before the step; only
the loss scale and the count of skipped steps move.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from mlinterf_ds.engine.engine import Engine, Rows
from mlinterf_ds.engine.optimizer import clip_factor
from mlinterf_ds.engine.space import Space, Vector
from mlinterf_ds.meta.bilevel import (
    AdamLookahead,
    GradientDescent,
    Gradients,
    Hypergradient,
    Lookahead,
    RadiusControl,
    cosine,
    finite_norm,
    hypergradient,
    mixed_product,
    norm,
)
from mlinterf_ds.model.encoder import SHARED
from mlinterf_ds.sections import MetaConfig

SEARCH = 12  # radii that a run's first step may try; later steps follow the one it ends with
AGREEMENT = 0.8  # below this cosine of two radii's estimates, the difference is called noise
# Relative change of phi's gradient that the radius aims at: above the round-off of the precision, below the curvature
# (which a one-sided difference feels in the first order).
TARGETS = {
    "central": {"fp32": 0.01, "bf16": 0.15, "fp16": 0.1},
    "one_sided": {"fp32": 0.005, "bf16": 0.08, "fp16": 0.02},
}


class MetaStep:
    """Steps of a `meta_*` variant. Holds the radius of the finite difference, which is part of a checkpoint."""

    def __init__(self, engine: Engine, config: MetaConfig):
        self.engine, self.config = engine, config
        fixed = config.radius != "auto"
        start = float(config.radius) if fixed else 1e-3
        self.radius = RadiusControl(start, TARGETS[config.difference][engine.precision], fixed=fixed)

    def step(self, batches: Sequence[Rows], validation: Sequence[Rows]) -> dict[str, float]:
        """One step; returns its facts.

        batches: this rank's micro-batches of the step's language. validation: those of L^val (none between meta steps).
        """
        engine, config = self.engine, self.config
        if engine.step % config.every:
            return engine.train_step(batches, {SHARED: engine.learning_rate} if config.between == "freeze" else None)
        phases = Phases(self, batches, validation)
        updates = [(phases.phi, phases.update_phi), (phases.theta, phases.update_theta)]
        if config.order == "theta_first":  # the order of the authors' released code
            updates.reverse()
        elif config.order == "simultaneous":
            updates = [(phases.phi, phases.update_both)]
        try:
            with phases.undone_on_overflow(updates[0][0]):
                for _, update in updates:
                    update()
        except FloatingPointError:
            engine.settle(False, phases.facts)
        else:
            engine.settle(True, phases.facts)
            self.radius.update(phases.facts.get("meta/change", math.nan))
        return phases.facts | {"skipped": float(engine.skipped)}


class Phases:
    """The two updates of one step over one language i (Algorithm 1, lines 6 and 7), and the facts that they gather.

    A pass whose gradient is not finite raises FloatingPointError, the same on all ranks.
    """

    def __init__(self, meta: MetaStep, batches: Sequence[Rows], validation: Sequence[Rows]):
        self.meta, self.engine, self.config = meta, meta.engine, meta.config
        (language,) = batches[0].step_languages
        self.theta = self.engine.spaces[SHARED]
        self.phi = self.engine.spaces[self.engine.languages[language]]
        self.rate = self.engine.learning_rate
        self.facts = {"lr": self.rate, "loss_scale": self.engine.scale.value}
        self.train = self._gradients_of(batches, "loss")
        self.validation = self._gradients_of(validation, "meta/validation")

    def update_phi(self) -> None:
        """phi_i <- AdamW(phi_i, h_i) (Algorithm 1, line 6)."""
        self._update(self.phi, self._hypergradient().total, "meta/gradient_norm")

    def update_theta(self) -> None:
        """theta <- AdamW(theta, grad_theta L_i^train(theta, phi_i)), with the new phi_i (Algorithm 1, line 7; Eq. 5)."""
        (gradient,) = self.train([self.theta])
        self._update(self.theta, gradient, "gradient_norm")

    def update_both(self) -> None:
        """Both updates from gradients that phase 1's passes computed at theta and phi_i.

        With `meta.reuse` no row is wasted: theta steps along the mean of its gradients on the training rows and, at the
        lookahead's theta', on the validation rows; phi_i steps along h_i plus its ordinary gradient.
        """
        h = self._hypergradient(keep_passes=True)
        assert h.passes is not None
        theta, phi = h.passes.descent, h.total
        if self.config.reuse:
            theta = [(first + second) / 2 for first, second in zip(theta, h.passes.value, strict=True)]
            phi = [first + second for first, second in zip(phi, h.passes.own, strict=True)]
        finite_norm(self.theta, theta, "gradient_norm")  # asked before either update, so that none has to be undone
        self._update(self.phi, phi, "meta/gradient_norm")
        self._update(self.theta, theta, "gradient_norm")

    def _hypergradient(self, keep_passes: bool = False) -> Hypergradient:
        """h_i, noted in the facts. A run's first step tries radii until one is near the target."""
        config, radius = self.config, self.meta.radius
        beta = self.rate if config.beta is None else config.beta
        for tries_left in reversed(range(SEARCH if self.engine.updates == 0 else 1)):
            h = hypergradient(
                self.train, self.validation, self.theta, self.phi, lookahead=self._lookahead(), beta=beta,
                radius=radius.radius, difference=config.difference, second_order=config.terms == "both",
                keep_passes=keep_passes,
            )  # fmt: skip
            if not tries_left or radius.near(h.change):
                break
            radius.update(h.change)
        self._note(h, beta)
        return h

    def _update(self, space: Space, gradient: Vector, name: str) -> None:
        self.facts[name] = length = finite_norm(space, gradient, name)
        self.engine.update(space, gradient, clip_factor(length, self.engine.training.clip), self.rate)

    def _gradients_of(self, batches: Sequence[Rows], name: str) -> Gradients:
        """The passes over these micro-batches; the losses of the first one become the step's facts under `name`."""

        def gradients(spaces: Sequence[Space]) -> list[Vector]:
            engine = self.engine
            sums = engine.accumulate(batches, spaces)
            vectors = [space.gradient() for space in spaces]
            if engine.scale.value != 1.0:
                vectors = [[shard.div_(engine.scale.value) for shard in vector] for vector in vectors]
            if name not in self.facts:
                dist.all_reduce(sums)
                self.facts |= engine.loss_facts(batches[0].step_languages, sums / engine.layout.tensor, name)
                if spike := engine.spikes.spike(self.facts):  # no phase has changed anything yet
                    raise FloatingPointError(spike)
            return vectors

        return gradients

    @contextlib.contextmanager
    def undone_on_overflow(self, space: Space) -> Iterator[None]:
        """Puts the weights and moments of a space back if a pass inside is not finite."""
        state = self.engine.optimizers[space.name].state
        tensors = [tensor for master in space.masters for tensor in (master, *state[master].values())]
        saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
        try:
            yield
        except FloatingPointError:
            with torch.no_grad():
                for tensor, before in saved:
                    tensor.copy_(before)
            space.write()
            raise

    def _lookahead(self) -> Lookahead:
        if self.config.lookahead == "sgd":
            return GradientDescent()
        training = self.engine.training
        states = [self.engine.optimizers[SHARED].state[master] for master in self.theta.masters]
        first, second = ([state[moment] for state in states] for moment in ("exp_avg", "exp_avg_sq"))
        number = int(states[0]["step"].item()) + 1
        return AdamLookahead(first, second, number, training.beta1, training.beta2, training.eps)

    def _note(self, h: Hypergradient, beta: float) -> None:
        """The sizes of h_i's terms as facts, so that a user sees whether the second-order one matters."""
        facts, radius = self.facts, self.meta.radius.radius
        facts["meta/beta"], facts["meta/descent_norm"] = beta, h.descent_norm
        facts["meta/direct_norm"] = norm(self.phi, h.direct)
        if h.mixed is None or h.direction is None:
            return
        facts["meta/second_order_norm"] = beta * norm(self.phi, h.mixed)
        facts["meta/cosine"] = -cosine(self.phi, h.direct, h.mixed)  # of the two terms as they enter h_i
        facts["meta/radius"], facts["meta/change"] = radius, h.change
        if self.config.check_every and self.engine.step % self.config.check_every == 0:
            again, _ = mixed_product(self.train, self.theta, self.phi, h.direction, radius / 2)
            facts["meta/self_check"] = cosine(self.phi, h.mixed, again)
