"""Tensor parallel 2 = tensor parallel 1, parameter by parameter, and what dropout may differ in."""

from typing import Any

import pytest
import torch

from tests.model_batches import VARIANTS
from tests.parity import tp_bodies
from tests.ranks import pool

CASES: list[tuple[int, dict[str, Any], list[int]]] = [
    (100, {}, [2, 0, 1, 0]),
    (100, {"language_embeddings": True, "recompute": True}, [1, 1]),  # languages 0 and 2 have no rows
    (100, {"position_kind": "rotary", "head_width": 10}, [2, 0, 2]),
    (30, {"heads": 6, "head_width": 8}, [0, 1]),  # the second rank's share of the vocabulary is all padding
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("vocabulary", "options", "languages"), CASES)
def test_equals_one_rank(variant: str, vocabulary: int, options: dict[str, Any], languages: list[int]) -> None:
    pool(2).run(tp_bodies.equals_one_rank, variant, vocabulary, options, languages)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_replicas_agree_under_dropout(variant: str, recompute: bool) -> None:
    pool(2).run(tp_bodies.replicas_agree_under_dropout, variant, recompute)


def test_attention_dropout_differs_between_ranks() -> None:
    (one, state), (two, other) = pool(2).run(tp_bodies.attention_drops_differently)
    assert not torch.allclose(one, two)
    assert torch.equal(state, other)
