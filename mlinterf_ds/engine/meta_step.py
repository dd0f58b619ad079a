"""Algorithm 1 on the engine, one step at a time: phase 1 updates phi_i by the hypergradient, phase 2 theta at the new phi_i.

`meta/bilevel.py` has the mathematics. This file has the passes over micro-batches that it calls, the AdamW updates, and the
handling of overflows: after one in any pass, phi_i, theta and all moments stay as they were before the step, and only the
loss scale and the count of skipped steps change. The device decides that; the host reads a step's facts when the next step
begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.optimizer import clip_factor
from mlinterf_ds.engine.space import JoinedSpace, Space, Vector
from mlinterf_ds.engine.transfers import StepFacts
from mlinterf_ds.meta.bilevel import (
    GradientDescent,
    Gradients,
    Hypergradient,
    Lookahead,
    cosine,
    hypergradient,
    mixed_product,
    norm,
)
from mlinterf_ds.meta.lookahead import AdamLookahead
from mlinterf_ds.meta.radius import RadiusControl
from mlinterf_ds.model.encoder import SHARED, Rows
from mlinterf_ds.sections import MetaConfig

SEARCH = 12  # radii that a run's first step may try; later steps start from the last of them
AGREEMENT = 0.8  # below this cosine of two radii's estimates, the difference is called noise
# The relative change of phi's gradient that the radius is set for: large against the round-off of the precision, and small
# enough that curvature does not matter (it enters a one-sided difference in the first order, hence smaller numbers there).
TARGETS = {
    "central": {"fp32": 0.01, "bf16": 0.15, "fp16": 0.1},
    "one_sided": {"fp32": 0.005, "bf16": 0.08, "fp16": 0.02},
}


class MetaStep:
    """Steps of a `meta_*` variant. Holds the radius of the finite difference, which is part of a checkpoint.

    together: where a step mixes languages (`data.mixed`), the languages that are trained. The modules of those that have rows
    in a step, validation rows included, are then one phi, which is updated as a whole.
    """

    def __init__(self, engine: Engine, config: MetaConfig, together: Collection[int] = ()):
        self.engine, self.config, self.together = engine, config, frozenset(together)
        fixed = config.radius != "auto"
        start = float(config.radius) if fixed else 1e-3
        self.radius = RadiusControl(start, TARGETS[config.difference][engine.precision], fixed=fixed)

    def step(self, batches: Sequence[Rows], validation: Sequence[Rows]) -> Mapping[str, float]:
        """One step; returns its facts, which the device may still be computing.

        batches: this rank's micro-batches of the step's language, or languages if it mixes them. validation: those of L^val
        (none between meta steps).
        """
        engine, config = self.engine, self.config
        if engine.step % config.every:
            return engine.train_step(batches, groups=[SHARED] if config.between == "freeze" else [])
        engine.settle()  # the schedule's rate and the radius depend on the step before
        phases = Phases(self, batches, validation)
        if config.order == "simultaneous":
            phases.update_both()
        elif engine.frozen:  # theta moves in the lookahead alone
            phases.update_phi()
        elif config.order == "phi_first":
            phases.in_turn(phases.phi, phases.update_phi, phases.update_theta)
        else:  # the order of the authors' released code
            phases.in_turn(phases.theta, phases.update_theta, phases.update_phi)
        return phases.finish()


class Phases:
    """The two updates of one step over one language i (Algorithm 1, lines 6 and 7), and the facts that they gather.

    In a mixed step phi_i stands for the modules of all its languages, and L_i^train for the mean loss of its rows.

    A phase does nothing from the first pass on whose gradient is not finite, the same on all ranks.
    """

    def __init__(self, meta: MetaStep, batches: Sequence[Rows], validation: Sequence[Rows]):
        self.meta, self.engine, self.config = meta, meta.engine, meta.config
        languages = {*batches[0].step_languages, *meta.together.intersection(validation[0].step_languages)}
        own = [self.engine.spaces[self.engine.languages[language]] for language in sorted(languages)]
        self.theta = self.engine.spaces[SHARED]
        self.phi = own[0] if len(own) == 1 else JoinedSpace(own)
        self.rate, self.radius = self.engine.learning_rate, meta.radius.radius
        self.known = {"lr": self.rate, "loss_scale": self.engine.scale.value}
        self.computed: dict[str, Tensor] = {}
        # the sum of all norms so far, which is finite if each of them is
        self.norms = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        self.spiked = torch.zeros_like(self.norms, dtype=torch.bool)
        self._finite = (self.norms, ~self.spiked)  # the sum that was last tested, and whether it is finite
        self.engine.idle.fetch(self.phi.parts)
        self.train = self._gradients_of(batches, "loss")
        self.validation = self._gradients_of(validation, "meta/validation")

    def update_phi(self) -> None:
        """phi_i <- AdamW(phi_i, h_i) (Algorithm 1, line 6)."""
        h = self._hypergradient()
        self.engine.idle.wait()
        self._update(self.phi, h.total, "meta/gradient_norm", h.total_norm)

    def update_theta(self) -> None:
        """theta <- AdamW(theta, grad_theta L_i^train(theta, phi_i)), with the new phi_i (Algorithm 1, line 7; Eq. 5)."""
        (gradient,) = self.train([self.theta])
        self._update(self.theta, gradient, "gradient_norm", self._counted(norm(self.theta, gradient)))

    def update_both(self) -> None:
        """Updates theta and phi_i from gradients that phase 1's passes computed at both.

        With `meta.reuse` no row is wasted: theta steps along the mean of its gradients on the training rows and, at the
        lookahead's theta', on the validation rows; phi_i steps along h_i plus its ordinary gradient.
        """
        h = self._hypergradient(keep_passes=True)
        self.engine.idle.wait()
        assert h.passes is not None
        theta, phi = h.passes.descent, h.total
        if self.config.reuse:
            phi = [first + second for first, second in zip(phi, h.passes.own, strict=True)]
        of_phi = norm(self.phi, phi)
        if self.engine.frozen:  # theta moves in the lookahead alone
            return self._update(self.phi, phi, "meta/gradient_norm", self._counted(of_phi))
        if self.config.reuse:
            for first, second in zip(theta, h.passes.value, strict=True):
                first.add_(second).div_(2)
        of_theta = norm(self.theta, theta)
        self._counted(of_theta + of_phi)  # before the updates, so that either tests both
        self._update(self.phi, phi, "meta/gradient_norm", of_phi)
        self._update(self.theta, theta, "gradient_norm", of_theta)

    def in_turn(self, space: Space, first: Callable[[], None], second: Callable[[], None]) -> None:
        """Makes two updates, the second with the first one's result; the first, of `space`, is undone if the second fails."""
        self.engine.idle.wait()
        states = [self.engine.optimizers[part.name].state for part in space.parts]
        tensors = [t.detach() for state in states for master in state for t in (master, *state[master].values())]
        saved = [tensor.clone() for tensor in tensors]
        first()
        second()
        undo = self.skip.to(tensors[0].device)
        for tensor, before in zip(tensors, saved, strict=True):
            tensor.copy_(torch.where(undo, before, tensor))
        space.write()

    @property
    def skip(self) -> Tensor:
        """Whether the step does not count, by the passes so far (a bool scalar)."""
        return ~self.finite | self.spiked

    @property
    def finite(self) -> Tensor:
        """Whether all passes so far were finite (a bool scalar)."""
        if self._finite[0] is not self.norms:
            self._finite = self.norms, torch.isfinite(self.norms)
        return self._finite[1]

    def finish(self) -> StepFacts:
        """The step's facts. The radius of the next difference is set when they are read."""
        self.engine.idle.release(self.phi.parts)
        return self.engine.finish_step(self.known, self.computed, self.finite, self.spiked, self._settle)

    def _settle(self, facts: Mapping[str, float]) -> None:
        """Moves the radius of the next difference, if the step counted."""
        self.meta.radius.update(facts.get("meta/change", math.nan))

    def _hypergradient(self, keep_passes: bool = False) -> Hypergradient:
        """Computes h_i and notes it in the facts. A run's first step tries radii until the change is near the target."""
        config, radius = self.config, self.meta.radius
        beta = self.rate if config.beta is None else config.beta
        for tries_left in reversed(range(SEARCH if self.engine.updates == 0 and not radius.fixed else 1)):
            h = hypergradient(
                self.train, self.validation, self.theta, self.phi, lookahead=self._lookahead(), beta=beta,
                radius=radius.radius, difference=config.difference, second_order=config.terms == "both",
                keep_passes=keep_passes,
            )  # fmt: skip
            self.radius = radius.radius
            if not tries_left or radius.near(change := h.change.item()):
                break
            radius.update(change)
        self._counted(h.total_norm)
        self._note(h, beta)
        return h

    def _counted(self, length: Tensor) -> Tensor:
        """The norm, which `finite` tests from now on."""
        self.norms = self.norms + length
        return length

    def _update(self, space: Space, gradient: Vector, name: str, length: Tensor) -> None:
        """One update of a space by a gradient of this norm, unless the step is to be skipped."""
        if space is self.theta and self.engine.new_rows:
            gradient = self.engine.new_rows.only(gradient)
            length = norm(space, gradient)
        self.computed[name] = length
        divisor = 1.0 / clip_factor(length, self.engine.training.clip)
        for part, own in space.apart(gradient):
            self.engine.update(part, own, divisor, self.rate, self.skip)

    def _gradients_of(self, batches: Sequence[Rows], name: str) -> Gradients:
        """The function that runs passes over these micro-batches; the first pass's losses become facts under `name`."""

        def gradients(spaces: Sequence[Space]) -> list[Vector]:
            engine = self.engine
            noted = name in self.computed
            parts = [part for space in spaces for part in space.parts]
            sums = engine.accumulate(batches, parts, losses=not noted)
            vectors = [space.gradient() for space in spaces]
            if engine.precision == "fp16":
                for shard in (shard for vector in vectors for shard in vector):
                    shard.div_(engine.scale.tensor.to(shard.device))
            if not noted:
                _, sums = engine.reduced(sums.new_empty(0), sums)
                self.computed |= engine.loss_facts(batches[0].step_languages, sums, name)
                if name == "loss":
                    self.spiked = engine.spiking(self.computed)
            return vectors

        return gradients

    def _lookahead(self) -> Lookahead:
        if self.config.lookahead == "sgd":
            return GradientDescent()
        training = self.engine.training
        states = [self.engine.optimizers[SHARED].state[master] for master in self.theta.masters]
        first, second = ([state[moment] for state in states] for moment in ("exp_avg", "exp_avg_sq"))
        return AdamLookahead(first, second, states[0]["step"] + 1, training.beta1, training.beta2, training.eps)

    def _note(self, h: Hypergradient, beta: float) -> None:
        """The sizes of h_i's terms as facts, so that a user sees whether the second-order one matters."""
        facts = self.computed
        self.known["meta/beta"], facts["meta/descent_norm"] = beta, h.descent_norm
        facts["meta/direct_norm"] = h.direct_norm
        if h.mixed is None or h.mixed_norm is None or h.direction is None:
            return
        facts["meta/second_order_norm"] = beta * h.mixed_norm
        # the cosine of the two terms as they enter h_i
        facts["meta/cosine"] = -cosine(self.phi, h.direct, h.mixed, h.direct_norm * h.mixed_norm)
        self.known["meta/radius"], facts["meta/change"] = self.radius, h.change
        if self.config.check_every and self.engine.step % self.config.check_every == 0:
            again, _ = mixed_product(self.train, self.theta, self.phi, h.direction, self.radius / 2)
            facts["meta/self_check"] = cosine(self.phi, h.mixed, again, h.mixed_norm * norm(self.phi, again))
