"""Gradient similarities equal plain autograd's at every layout, and measuring them leaves a training run as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity import conflict_bodies as bodies
from tests.parity.bodies import weights
from tests.ranks import pool

DIMENSION = 1024


@pytest.fixture(scope="module")
def oracle():
    known: dict[str, dict] = {}

    def get(variant: str) -> dict:
        if variant not in known:
            (known[variant],) = pool(1).run(bodies.plain, [f"variant={variant}"])
        return known[variant]

    return get


@pytest.mark.parametrize(
    "variant, json_name, ranks, tensor",
    [
        ("adpt", "zero0", 1, 1),
        ("share_adpt", "zero0", 2, 1),
        ("adpt", "zero1", 2, 1),
        ("adpt", "zero2", 2, 1),
        ("ffn", "zero3", 2, 1),
        ("adpt", "zero2_offload", 2, 1),
        ("adpt", "zero2", 2, 2),
        ("share_adpt", "zero3", 2, 2),
        ("share_adpt", "zero2", 4, 2),
    ],
)
def test_cosines_equal_plain_autograd(oracle, variant: str, json_name: str, ranks: int, tensor: int) -> None:
    wanted = oracle(variant)
    for by_scope in pool(ranks).run(bodies.similarities, [f"variant={variant}"], json_name, tensor, "exact"):
        assert by_scope.keys() <= wanted.keys() and len(by_scope) >= 9
        for scope, cosines in by_scope.items():
            np.testing.assert_allclose(cosines, wanted[scope], atol=1e-5, err_msg=str(scope))


@pytest.mark.parametrize(
    "ranks, json_name, tensor", [(2, "zero2", 1), (2, "zero3", 1), (2, "zero1", 2), (4, "zero2", 2)]
)
def test_the_projection_is_the_same_at_every_layout(ranks: int, json_name: str, tensor: int) -> None:
    settings = ["variant=share_adpt"]
    (wanted,) = pool(1).run(bodies.similarities, settings, "zero0", 1, DIMENSION)
    for by_scope in pool(ranks).run(bodies.similarities, settings, json_name, tensor, DIMENSION, 1):
        for scope, cosines in by_scope.items():
            np.testing.assert_allclose(cosines, wanted[scope], atol=1e-5, err_msg=str(scope))


def test_the_projection_is_within_its_bound(oracle) -> None:
    """Root mean square over seeds, pairs and scopes in units of the stated standard error: at most one."""
    wanted = oracle("adpt")
    errors = []
    for seed in range(6):
        (by_scope,) = pool(1).run(bodies.similarities, ["variant=adpt"], "zero0", 1, 64, 4, seed)
        for scope, cosines in by_scope.items():
            upper = np.triu_indices(len(cosines), 1)
            true = wanted[scope][upper]
            errors.append((cosines[upper] - true) / ((1 - true**2) / 8))
    scaled = np.concatenate(errors)
    assert 0.3 < np.sqrt(np.mean(scaled**2)) < 1.05, "and not far below: 64 dimensions are few"
    assert abs(scaled.mean()) < 0.3


def test_a_language_with_itself_is_one() -> None:
    (by_scope,) = pool(1).run(bodies.similarities, ["variant=adpt"], "zero1", 1, "exact", 2, 0, True)
    for cosines in by_scope.values():
        np.testing.assert_allclose(cosines[[0, 2, 4], [1, 3, 5]], 1.0, atol=1e-9)
        assert cosines[0, 2] < 0.99


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_are_close(oracle, precision: str) -> None:
    (by_scope,) = pool(1).run(
        bodies.similarities, ["variant=adpt", f"train.precision={precision}"], "zero2", 1, "exact"
    )
    difference = np.abs(by_scope["all", "all"] - oracle("adpt")["all", "all"])
    assert difference.max() < 0.02


@pytest.mark.parametrize(
    "variant, json_name, precision, ranks, tensor",
    [
        ("adpt", "zero0", "fp32", 1, 1),
        ("adpt", "zero1", "bf16", 2, 1),
        ("meta_adpt", "zero2", "fp32", 2, 1),
        ("share_adpt", "zero2", "fp16", 1, 1),
        ("adpt", "zero2_offload", "bf16", 2, 1),
        ("meta_ffn", "zero3", "fp32", 2, 1),
        ("meta_adpt", "zero2", "bf16", 2, 2),
    ],
)
def test_training_is_bit_identical_with_and_without(
    variant: str, json_name: str, precision: str, ranks: int, tensor: int, tmp_path: Path
) -> None:
    settings = [
        f"variant={variant}",
        f"train.precision={precision}",
        "model.dropout=0.1",
        "model.attention_dropout=0.1",
    ]
    settings += ["meta.check_every=0", "meta.radius=1e-3"]  # no search in the first step
    runs = {
        every: pool(ranks).run(bodies.trained, settings, json_name, tensor, str(tmp_path / str(every)), every)
        for every in (0, 1)
    }
    assert runs[0] == runs[1], "losses, norms, scales: every digit"
    for kind in ("master", "exp_avg_sq"):
        without, with_ = (weights(tmp_path / str(every) / "checkpoints" / "step-00000002", kind) for every in (0, 1))
        assert without.keys() == with_.keys()
        assert all(torch.equal(value, with_[name]) for name, value in without.items())
