"""AdamW by language, XLM's schedules, the loss scale, and spikes of the loss against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlinterf_ds.engine.optimizer import FEWEST, LEAST, WINDOW, LossScale, Spikes, adamw, apply, learning_rate
from mlinterf_ds.sections import TrainConfig


def test_gated_groups_equal_adamw_run_per_language() -> None:
    """Languages stepped now and then equal torch's AdamW seeing only their own steps; the others don't move."""
    config = TrainConfig(lr=0.01, beta2=0.98, weight_decay=0.1)  # type: ignore[call-arg]
    torch.manual_seed(0)
    start = {language: torch.randn(7) for language in ("as", "te", "en")}
    ours = {language: [value.clone().requires_grad_()] for language, value in start.items()}
    optimizers = {language: adamw(masters, config) for language, masters in ours.items()}
    reference = {language: value.clone().requires_grad_() for language, value in start.items()}
    separate = {
        language: torch.optim.AdamW([value], lr=0.01, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
        for language, value in reference.items()
    }
    for step in range(30):
        language = ("as", "te")[step % 3 == 0]
        gradient, lr = torch.randn(7), 0.01 / (step + 1)
        idle = {other: ours[other][0].detach().clone() for other in ours if other != language}
        apply(optimizers[language], ours[language], [4 * gradient], lr, torch.tensor(4.0), torch.tensor(False))
        separate[language].param_groups[0]["lr"] = lr
        reference[language].grad = gradient
        separate[language].step()
        for other, before in idle.items():
            assert torch.equal(before, ours[other][0])
    for language in start:
        torch.testing.assert_close(ours[language][0], reference[language], rtol=1e-6, atol=1e-7)
    assert torch.equal(ours["en"][0], start["en"]) and optimizers["en"].state[ours["en"][0]]["step"] == 0


def test_a_skipped_update_changes_nothing_whatever_the_gradient() -> None:
    config = TrainConfig(lr=0.01)  # type: ignore[call-arg]
    masters = [torch.randn(7).requires_grad_()]
    optimizer = adamw(masters, config)
    divisor = torch.tensor(2.0, dtype=torch.float64)
    apply(optimizer, masters, [torch.randn(7)], 0.01, divisor, torch.tensor(False))
    state = [masters[0], *optimizer.state[masters[0]].values()]
    before = [tensor.detach().clone() for tensor in state]
    apply(optimizer, masters, [torch.full((7,), math.nan)], 0.01, divisor, torch.tensor(True))
    assert all(torch.equal(old, new) for old, new in zip(before, state, strict=True))
    apply(optimizer, masters, [torch.randn(7)], 0.01, divisor, torch.tensor(False))
    assert not any(torch.equal(old, new) for old, new in zip(before, state, strict=True))


def test_schedules() -> None:
    config = TrainConfig(lr=1e-4, warmup=4000)  # type: ignore[call-arg]
    assert learning_rate(config, 4000) == pytest.approx(1e-4)
    assert learning_rate(config, 2000) == pytest.approx(1e-7 + (1e-4 - 1e-7) / 2)
    assert learning_rate(config, 16000) == pytest.approx(5e-5)
    constant = TrainConfig(lr=1e-4, warmup=0, schedule="constant")  # type: ignore[call-arg]
    assert {learning_rate(constant, step) for step in (1, 10, 10**6)} == {1e-4}


def test_loss_scale_follows_deepspeeds(monkeypatch) -> None:
    """Step by step the same as DeepSpeed's DynamicLossScaler over a random history of overflows."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    monkeypatch.setattr("deepspeed.comm.get_rank", lambda *_: 1)  # it reports overflows on rank 0, with a job running

    torch.manual_seed(1)
    ours = LossScale(True, {"initial_scale_power": 8, "loss_scale_window": 5, "hysteresis": 2, "min_loss_scale": 1})
    reference = DynamicLossScaler(
        init_scale=2**8, scale_window=5, min_scale=1, delayed_shift=2, consecutive_hysteresis=False,
        raise_error_at_min_scale=False, dtype=torch.float16,
    )  # fmt: skip
    for overflow in (torch.rand(400) < 0.2).tolist():
        ours.foresee(torch.tensor(overflow), torch.tensor(False))
        ours.update(overflow)
        reference.update_scale(overflow)
        assert ours.value == reference.cur_scale == ours.tensor.item(), "the device knows it a step before the host"
    before = ours.value
    ours.foresee(torch.tensor(True), torch.tensor(True))
    assert ours.tensor.item() == before, "a spike explains an overflow"
    assert LossScale(False, {}).value == 1.0
    fixed = LossScale(True, {"loss_scale": 128})
    fixed.update(True)
    assert fixed.value == 128


def taught(losses: np.ndarray, limit: float | None = 10.0) -> Spikes:
    spikes = Spikes(limit)
    for loss in losses.tolist():
        assert not spikes.spike({"loss": loss, "loss/en": loss})
        spikes.add({"loss": loss, "loss/en": loss, "loss_scale": 1e9, "lr": 1e9})
    return spikes


def test_the_first_steps_moments_are_exact_and_later_ones_weighted() -> None:
    losses = np.random.default_rng(0).normal(3, 0.2, 3 * WINDOW)
    count, mean, variance = taught(losses[:WINDOW]).seen["en"]
    assert count == WINDOW
    assert math.isclose(mean, losses[:WINDOW].mean(), rel_tol=1e-12)
    assert math.isclose(variance, losses[:WINDOW].var(), rel_tol=1e-9)
    # from then on: weights 1/WINDOW (1 - 1/WINDOW)^age over what came before
    weights = np.full(3 * WINDOW, 1 / WINDOW)
    weights[WINDOW:] = 1.0
    for number in range(WINDOW, 3 * WINDOW):
        weights[:number] *= 1 - 1 / WINDOW
        weights[number] = 1 / WINDOW
    _, mean, variance = taught(losses).seen["en"]
    assert math.isclose(mean, weights @ losses, rel_tol=1e-12)
    assert math.isclose(variance, weights @ (losses - weights @ losses) ** 2, rel_tol=1e-9)


def test_what_is_a_spike() -> None:
    losses = np.random.default_rng(1).normal(3, 0.2, 200)
    spikes = taught(losses)
    _, mean, variance = spikes.seen["en"]
    edge = mean + 10 * math.sqrt(variance)
    assert not spikes.spike({"loss/en": edge - 1e-6})
    assert "in en, where 2.98" in spikes.spike({"loss/en": edge + 1e-6})
    assert not spikes.spike({"loss/sw": 1e6}), "a language that was never seen"
    assert not any(spikes.spike({"loss/en": bad}) for bad in (math.nan, math.inf)), "the loss scale's affair"
    quiet = taught(np.full(50, 0.01))
    assert not quiet.spike({"loss/en": 0.01 + LEAST - 1e-6}) and quiet.spike({"loss/en": 0.01 + LEAST + 1e-6})
    assert not taught(losses, None).spike({"loss/en": 1e6}), "switched off"


def test_warm_up_and_rare_languages_raise_no_alarm() -> None:
    """A falling loss, one that rises for a while, few observations."""
    steps = np.arange(400)
    noise = np.random.default_rng(2).normal(0, 0.3, 400)
    taught(10 * np.exp(-steps / 60) + 2 + noise)
    taught(4 + 2 * np.sin(steps / 30) + noise)
    few = taught(np.full(FEWEST - 1, 2.0))
    assert not few.spike({"loss/en": 50.0})
    few.add({"loss/en": 2.0})
    assert few.spike({"loss/en": 50.0})
