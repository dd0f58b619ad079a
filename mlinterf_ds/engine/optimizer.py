"""AdamW on flat fp32 shards, XLM's learning-rate schedules, and the rules by which a step counts or is skipped.

A step is skipped if a gradient overflows (`LossScale` then lowers fp16's scale) or if a loss jumps (`Spikes`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlinterf_ds.sections import TrainConfig

FEWEST = 20  # steps with a language before a loss of it can be a spike
WINDOW = 100  # steps of a language over which its mean and variance are taken
LEAST = 1.0  # a loss less than this many nats above the mean is never a spike
LOSS_PREFIX = "loss/"  # the name of a language's loss in a step's facts begins so


def learning_rate(training: TrainConfig, update: int) -> float:
    """The rate of update number `update` (from 1): XLM's `adam_inverse_sqrt`, or constant `adam`.

    It rises linearly from 1e-7 to lr over the warm-up, then is lr * sqrt(warmup / update), or stays lr.
    """
    if update <= training.warmup:
        return 1e-7 + (training.lr - 1e-7) * update / training.warmup
    if training.schedule == "constant":
        return training.lr
    return training.lr * (max(training.warmup, 1) / update) ** 0.5


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """The factor that limits a gradient of this norm (a scalar) to at most `limit`; limit 0: never clipped."""
    return (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)


def adamw(masters: list[Tensor], training: TrainConfig, frozen: bool = False) -> torch.optim.AdamW:
    """torch's AdamW over one space's shards, with moments from step 0, so that every checkpoint has them.

    frozen: the shards are never updated; their moments are zeros that take no memory (see `kept`).
    """
    optimizer = torch.optim.AdamW(
        masters,
        lr=training.lr,
        betas=(training.beta1, training.beta2),
        eps=training.eps,
        weight_decay=training.weight_decay,
        fused=all(master.device.type in ("cpu", "cuda") for master in masters),
    )
    for master in masters:
        nothing = torch.zeros((), dtype=torch.float32, device=master.device)
        moments = [
            nothing.expand(master.shape) if frozen else torch.zeros_like(master, requires_grad=False) for _ in range(2)
        ]
        optimizer.state[master] = {"step": nothing.clone(), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
    return optimizer


def kept(moment: Tensor) -> bool:
    """Whether a moment has memory of its own; one of frozen parameters is a single zero that all elements share."""
    return moment.numel() <= 1 or moment.stride(0) != 0


def apply(
    optimizer: torch.optim.AdamW,
    masters: list[Tensor],
    gradient: list[Tensor],
    rate: float,
    divisor: Tensor,
    skip: Tensor,
) -> None:
    """Updates the shards once, by gradient / divisor at this learning rate; changes nothing, moments included, if `skip`.

    divisor, skip: scalars on any device; the device decides, so that the host need not wait. The gradient is overwritten.
    """
    group, device = optimizer.param_groups[0], masters[0].device
    group["lr"] = rate
    divisor, skip = divisor.to(device, torch.float32), skip.to(device, torch.float32)
    if not group["fused"]:  # torch's fused kernel would read divisor and skip itself, but this device has none
        if skip.item():
            return
        gradient = [shard.div_(divisor) for shard in gradient]
    optimizer.grad_scale, optimizer.found_inf = divisor, skip  # type: ignore[attr-defined]
    for master, shard in zip(masters, gradient, strict=True):
        master.grad = shard
    optimizer.step()
    for master in masters:
        master.grad = None


class LossScale:
    """The dynamic loss scale of fp16: halved on overflow, doubled after `window` steps without one; 1 in other precisions.

    Reads DeepSpeed's `fp16` section (`loss_scale`, `initial_scale_power`, `loss_scale_window`, `hysteresis`,
    `min_loss_scale`). The rule is that of DeepSpeed's DynamicLossScaler, which advances whenever DeepSpeed's optimizer steps; a
    meta step has several passes and must advance the scale once.
    """

    def __init__(self, enabled: bool, fp16: Mapping[str, Any], device: torch.device | str = "cpu"):
        fp16 = {key: value for key, value in fp16.items() if value != "auto"}
        static = float(fp16.get("loss_scale", 0))
        self.dynamic = enabled and static == 0
        # the device's scale, a step ahead of the host's
        self.tensor = torch.ones((), dtype=torch.float64, device=device)
        self.value = 1.0 if not enabled else static or 2.0 ** int(fp16.get("initial_scale_power", 16))
        self.window = int(fp16.get("loss_scale_window", 1000))
        self.hysteresis = int(fp16.get("hysteresis", 2))
        self.minimum = float(fp16.get("min_loss_scale", 1))
        self.patience, self.quiet = self.hysteresis, 0

    @property
    def value(self) -> float:
        """The scale of the next step by the steps whose facts the host has read."""
        return self._value

    @value.setter
    def value(self, value: float) -> None:
        self._value = value
        self.tensor.fill_(value)

    def _after(self, overflow: bool) -> tuple[float, int, int]:
        """(value, patience, quiet) after a step that overflowed or did not."""
        if overflow:
            spent = self.patience <= 1
            return max(self.minimum, self.value / 2) if spent else self.value, self.patience - (not spent), 0
        if self.quiet and self.quiet % self.window == 0:
            return self.value * 2, self.hysteresis, self.quiet + 1
        return self.value, self.patience, self.quiet + 1

    def foresee(self, overflow: Tensor, spiked: Tensor) -> None:
        """Adapts the device's scale after a step; the host follows with `update` when it reads the step's facts."""
        if self.dynamic:
            other = torch.where(overflow, self._after(True)[0], self._after(False)[0])
            self.tensor.copy_(torch.where(spiked, self.value, other))

    def update(self, overflow: bool) -> None:
        """Adapts the scale after each step to whether it overflowed."""
        if self.dynamic:
            self._value, self.patience, self.quiet = self._after(overflow)

    def state(self) -> dict[str, float]:
        """The values that a checkpoint stores."""
        return {"value": self.value, "patience": self.patience, "quiet": self.quiet}

    def load(self, state: Mapping[str, float]) -> None:
        """Goes on from a checkpoint's `state`."""
        self.value, self.patience, self.quiet = float(state["value"]), int(state["patience"]), int(state["quiet"])


class Spikes:
    """Tells which losses are spikes by a running mean and variance of each language's loss; the same on all ranks.

    A language's losses can be spikes after FEWEST of its own steps, so that warm-up, few observations and rare languages
    raise no alarm; while the loss still falls steeply, its variance is large. A skipped step does not enter the statistics.
    They are part of a checkpoint, so that a resumed run decides as the uninterrupted one.

    limit: standard deviations above the mean from which a loss is a spike; None switches the check off.
    """

    def __init__(self, limit: float | None):
        self.limit = limit
        self.seen: dict[str, list[float]] = {}  # language -> [observations, mean, variance]

    def bound(self, language: str) -> float:
        """The loss above which this language's next loss is a spike; infinite where no loss can be one."""
        count, mean, variance = self.seen.get(language, [0, 0.0, 0.0])
        if self.limit is None or count < FEWEST:
            return math.inf
        return mean + max(LEAST, self.limit * math.sqrt(variance))

    def spike(self, facts: Mapping[str, float]) -> str:
        """The first spike among a step's losses, in words; '' if there is none.

        A loss that is not finite is no spike but an overflow (see `LossScale`).
        """
        for language, loss in _losses(facts).items():
            if math.isfinite(loss) and loss > self.bound(language):
                _, mean, variance = self.seen[language]
                return f"loss {loss:.4g} in {language}, where {mean:.4g} +- {math.sqrt(variance):.2g} is usual"
        return ""

    def add(self, facts: Mapping[str, float]) -> None:
        """Enters the losses of a step that counted: moments are exact up to WINDOW steps, then exponentially weighted."""
        for language, loss in _losses(facts).items():
            if math.isfinite(loss):
                count, mean, variance = self.seen.get(language, [0, 0.0, 0.0])
                weight = 1 / min(count + 1, WINDOW)
                change = loss - mean
                variance = (1 - weight) * (variance + weight * change**2)
                self.seen[language] = [count + 1, mean + weight * change, variance]


def _losses(facts: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(LOSS_PREFIX): loss for name, loss in facts.items() if name.startswith(LOSS_PREFIX)}
