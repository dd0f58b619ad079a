"""AdamW on flat fp32 shards, XLM's learning-rate schedules, and the dynamic loss scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlinterf_ds.sections import TrainConfig


def learning_rate(config: TrainConfig, update: int) -> float:
    """The rate of update number `update` (from 1), XLM's `adam_inverse_sqrt` or constant `adam`.

    Linear warm-up from 1e-7 to lr, then lr * sqrt(warmup / update) or lr.
    """
    if update <= config.warmup:
        return 1e-7 + (config.lr - 1e-7) * update / config.warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * (max(config.warmup, 1) / update) ** 0.5


def adamw(masters: list[Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """torch's AdamW over one space's shards, with moments from step 0 (so that every checkpoint has them)."""
    optimizer = torch.optim.AdamW(
        masters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=all(master.device.type in ("cpu", "cuda") for master in masters),
    )
    for master in masters:
        optimizer.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
        }
    return optimizer


def apply(optimizer: torch.optim.AdamW, masters: list[Tensor], gradient: list[Tensor], lr: float) -> None:
    """One update of the shards by this gradient; touches nothing else."""
    optimizer.param_groups[0]["lr"] = lr
    for master, piece in zip(masters, gradient, strict=True):
        master.grad = piece
    optimizer.step()
    for master in masters:
        master.grad = None


class LossScale:
    """Dynamic loss scale of fp16 (1, for ever, in other precisions): halved on overflow, doubled after a quiet window.

    Reads DeepSpeed's `fp16` section (`loss_scale`, `initial_scale_power`, `loss_scale_window`, `hysteresis`,
    `min_loss_scale`); the rule is that of DeepSpeed's own DynamicLossScaler, kept here because a meta step has several
    passes and must advance the scale once.
    """

    def __init__(self, enabled: bool, fp16: Mapping[str, Any]):
        fp16 = {key: value for key, value in fp16.items() if value != "auto"}
        static = float(fp16.get("loss_scale", 0))
        self.dynamic = enabled and static == 0
        self.value = 1.0 if not enabled else static or 2.0 ** int(fp16.get("initial_scale_power", 16))
        self.window = int(fp16.get("loss_scale_window", 1000))
        self.hysteresis = int(fp16.get("hysteresis", 2))
        self.minimum = float(fp16.get("min_loss_scale", 1))
        self.patience, self.quiet = self.hysteresis, 0

    def update(self, overflow: bool) -> None:
        """After each step."""
        if not self.dynamic:
            return
        if overflow:
            self.quiet = 0
            if self.patience > 1:
                self.patience -= 1
            else:
                self.value = max(self.minimum, self.value / 2)
        else:
            if self.quiet and self.quiet % self.window == 0:
                self.value *= 2
                self.patience = self.hysteresis
            self.quiet += 1

    def state(self) -> dict[str, float]:
        return {"value": self.value, "patience": self.patience, "quiet": self.quiet}

    def load(self, state: Mapping[str, float]) -> None:
        self.value, self.patience, self.quiet = float(state["value"]), int(state["patience"]), int(state["quiet"])
