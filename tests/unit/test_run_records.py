"""What a run logs of its steps."""

from types import SimpleNamespace
from typing import Any

import torch

from mlinterf_ds.pretrain.job import LOG_STEPS, PretrainingRun


def test_facts_of_meta_steps_are_logged_where_plain_steps_stand_between_them() -> None:
    """With meta.every=2 no step whose facts are due is a meta step itself."""
    logged: list[dict[str, float]] = []
    run: Any = SimpleNamespace(
        first=True,
        _meta_facts={},
        _mfu=lambda rate: 0.0,
        _warn=lambda facts, step: None,
        seen=dict,
        engine=SimpleNamespace(device=torch.device("cpu")),
        records=SimpleNamespace(
            add_losses=lambda facts, step: None,
            tracker=SimpleNamespace(log=lambda metrics, step: logged.append(metrics)),
        ),
    )
    for step in range(2 * LOG_STEPS):
        facts = {"loss": float(step)} | ({"meta/radius": float(step)} if step % 2 == 0 else {})
        PretrainingRun._record(run, facts, step + 1)
        if (step + 1) % LOG_STEPS == 0:
            PretrainingRun._log_step(run, facts, step + 1, 5.0)
    found = [(metrics["train/loss"], metrics["train/meta/radius"]) for metrics in logged]
    assert found == [(LOG_STEPS - 1, LOG_STEPS - 2), (2 * LOG_STEPS - 1, 2 * LOG_STEPS - 2)]
    PretrainingRun._log_step(run, {"loss": 0.0}, 30, 5.0)
    assert "train/meta/radius" not in logged[-1], "a value is logged once"
