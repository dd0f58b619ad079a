"""Masks of language-specific parameters: gates against multiplied weights, layouts, planted useless groups."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from mlinterf_ds.analysis.masks.learning import draws
from mlinterf_ds.analysis.masks.main import similarities
from tests.parity import prune_bodies as bodies
from tests.ranks import pool


@pytest.mark.parametrize("kind", bodies.ALL)
def test_a_gate_multiplies_its_groups_parameters(kind: str) -> None:
    assert pool(1).run(bodies.gated_equals_cut, kind)[0] < 1e-4


@pytest.mark.parametrize("variant", ["joint", "adpt"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_two_ranks_learn_the_masks_of_one(variant: str, tensor: int) -> None:
    """Data parallel (with micro-batches) and tensor parallel: pi and the reported losses."""
    (wanted,) = pool(1).run(bodies.masks, bodies.ALL, 1, variant)
    one, two = pool(2).run(bodies.masks, bodies.ALL, tensor, variant, 3)
    assert torch.equal(one, two)
    assert float(wanted.abs().max()) > 0.5
    torch.testing.assert_close(one, wanted, rtol=1e-3, atol=2e-3)


def test_draws_do_not_depend_on_the_slice() -> None:
    whole = draws(7, 3, 0, 8, 11)
    assert torch.equal(whole[2:5], draws(7, 3, 2, 5, 11))
    assert whole.unique().numel() == whole.numel() and not torch.equal(whole, draws(7, 4, 0, 8, 11))
    assert float(whole.mean()) == pytest.approx(0.5, abs=0.1)


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    return pool(1).run(bodies.planted)[0]


@pytest.mark.parametrize("language", bodies.CODES)
@pytest.mark.parametrize("kind", bodies.BOTH)
def test_planted_useless_groups_are_the_most_negative(planted: dict[str, Any], language: str, kind: str) -> None:
    """Of as many most negative groups as were planted, at least 90% are planted ones."""
    of_kind = [index for index, other in enumerate(planted["kinds"]) if other == kind]
    useless = {
        planted["names"].index(f"L{layer} {kind[:-1]} {number}") for layer in (0, 1) for number in bodies.PLANTED[kind]
    }
    lowest = sorted(of_kind, key=lambda index: float(planted["pi"][language][index]))[: len(useless)]
    assert len(useless & set(lowest)) >= 0.9 * len(useless)


@pytest.mark.parametrize("language", bodies.CODES)
def test_pruning_beats_random_pruning_of_as_many_groups(planted: dict[str, Any], language: str) -> None:
    scores = planted["scores"][language]
    kept = (planted["pi"][language] > math.log(0.1 / 1.1)).float().mean()  # gates above 0
    assert kept < 0.7
    assert scores["full"] < 40, "of 85 tokens: it has learnt something to lose"
    assert max(scores["pruned"], scores["kept_whole"]) < 1.1 * scores["full"] < 1.2 * scores["full"] < scores["random"]


def test_the_model_is_as_before(planted: dict[str, Any]) -> None:
    assert planted["unchanged"] and planted["hooks"] == 0 and 0 < planted["loss"] < 4


def test_the_same_seed_gives_the_same_masks(planted: dict[str, Any]) -> None:
    one, same, other = planted["again"]
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert similarities(torch.stack([one, same])[None].double().numpy())[0, 0] == pytest.approx(1.0, abs=1e-12)
    assert similarities(torch.stack([one, other])[None].double().numpy())[0, 0] < 0.999


def test_similarities_by_hand() -> None:
    pi = np.array([[[1.0, 0], [0, 2]], [[3, 0], [-1, 0]]])  # two languages, two seeds
    assert similarities(pi) == pytest.approx(np.array([[0, 0], [0, -1]]))  # between: 1, -1, 0, 0
    assert similarities(np.array([[[1.0, 0]], [[1, 1]]])) == pytest.approx(
        np.array([[np.nan, 0.5**0.5], [0.5**0.5, np.nan]]), nan_ok=True
    )


@pytest.mark.parametrize(
    "kinds, variant, answer",
    [
        (["heads", "neurons"], "attn", "neurons"),  # what is one language's own isn't gated
        (["heads", "rows"], "ffn", "heads rows"),
        (["heads"], "attn", "prune.groups=heads: in variant 'attn'"),
        (["neurons"], "ffn", "prune.groups=neurons: in variant 'ffn'"),
    ],
)
def test_routed_modules_are_not_gated(kinds: list[str], variant: str, answer: str) -> None:
    assert pool(1).run(bodies.refused, kinds, variant)[0].startswith(answer)


def test_a_diverged_model_is_refused() -> None:
    assert "not finite" in pool(1).run(bodies.diverged)[0]
