"""Rotary positions against an independent implementation, which multiplies complex numbers in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlinterf_ds.config import load_config
from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrain.config import RunConfig
from tests.model_batches import LENGTH, batch, encoder, hidden

pytestmark = pytest.mark.usefixtures("one_rank")
HEADS, HEAD_WIDTH = 4, 8  # of the tests' encoder


def turned(heads: NDArray[Any], positions: NDArray[Any]) -> NDArray[Any]:
    """heads (rows, length, heads, head width) as complex numbers times e^(i p 10000^(-2 k / head width))."""
    pairs = heads.shape[-1] // 2
    numbers = heads[..., :pairs] + 1j * heads[..., pairs:]
    waves = np.array([10_000.0 ** (-2 * pair / heads.shape[-1]) for pair in range(pairs)])
    numbers = numbers * np.exp(1j * positions[:, :, None, None] * waves)
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def attention(attention: Any, states: NDArray[Any], positions: NDArray[Any], see: NDArray[Any]) -> NDArray[Any]:
    """Self-attention with rotary positions in NumPy; see: (rows, length, length), which pairs attend."""
    weights = {name: value.detach().double().numpy() for name, value in attention.named_parameters()}
    joint = states @ weights["linear_qkv.weight"].T + weights["linear_qkv.bias"]
    query, key, value = np.split(joint.reshape(*states.shape[:2], HEADS, 3 * HEAD_WIDTH), 3, axis=-1)
    query, key = turned(query, positions), turned(key, positions)
    scores = np.einsum("rqhc,rkhc->rhqk", query, key) / HEAD_WIDTH**0.5
    scores = np.where(see[:, None], scores, -np.inf)
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    mixed = np.einsum("rhqk,rkhc->rqhc", chances, value).reshape(*states.shape[:2], -1)
    wanted: NDArray[Any] = mixed @ weights["linear_proj.weight"].T + weights["linear_proj.bias"]
    return wanted


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("some", [False, True])
def test_attention_equals_the_product_of_complex_numbers(dtype: torch.dtype, bar: float, some: bool) -> None:
    """For all columns and for a few, whose queries alone are computed; positions begin anew at a boundary."""
    model, rows = encoder("joint", position_kind="rotary").to(dtype), batch([0, 1, 0])
    assert rows.segment_ids is not None and rows.position_ids is not None
    layer, turns = model.block.layers[0].self_attention, model.embeddings.turns(rows.tokens, rows.position_ids)
    states = torch.randn(3, LENGTH, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    read = rows.positions if some else torch.arange(LENGTH).expand(3, -1)
    see = rows.segment_ids[:, :, None] == rows.segment_ids[:, None]
    mask = see.take_along_dim(read[:, :, None], 1)[:, None]
    ours = layer(states.to(dtype), mask, read if some else None, turns)  # type: ignore[operator]
    wanted = attention(layer, states.numpy(), rows.position_ids.numpy(), see.numpy())
    wanted = np.take_along_axis(wanted, read[:, :, None].numpy(), 1)
    np.testing.assert_allclose(ours.detach().double().numpy(), wanted, rtol=bar, atol=bar)
    assert np.abs(wanted).max() > 0.1


@pytest.mark.parametrize("variant", ["joint", "attn"])
def test_only_distances_matter_and_they_do(variant: str) -> None:
    model, rows = encoder(variant, position_kind="rotary").double(), batch([2, 0])
    assert rows.position_ids is not None and not any("position" in name for name, _ in model.named_parameters())
    here = hidden(model, rows)
    torch.testing.assert_close(hidden(model, replace(rows, position_ids=rows.position_ids + 1000)), here)
    assert not torch.allclose(hidden(model, replace(rows, position_ids=2 * rows.position_ids)), here)
    whole, columns = replace(rows, segment_ids=None), torch.arange(LENGTH).expand(2, -1)
    assert torch.equal(
        hidden(model, replace(whole, position_ids=None)), hidden(model, replace(whole, position_ids=columns))
    )


def test_angles_are_exact_in_16_bits() -> None:
    """Cosines are rounded once, however far the position: the angles themselves are computed in fp32."""
    ids = torch.tensor([[0, 1, 500]])
    model = encoder("joint", position_kind="rotary")
    exact = model.double().embeddings.turns(torch.zeros(1, 3), ids)
    rounded: Tensor | None = model.bfloat16().embeddings.turns(torch.zeros(1, 3), ids)
    assert exact is not None and rounded is not None and rounded.dtype is torch.bfloat16
    assert (rounded.double() - exact).abs().max() < 2**-8


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.width=36", "model.heads=4"], ["model.position_kind=rotary", "a head has 9", "model.head_width"]),
        (["model.position_offset=2"], ["model.position_offset=2", "model.position_kind=rotary"]),
        (["model.position_kind=sinusoidal"], ["model.position_kind", "sinusoidal", "rotary"]),
    ],
)
def test_what_cannot_be_rotated_is_refused(settings: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        load_config(RunConfig, [], ["model.position_kind=rotary", *settings])
    for word in words:
        assert word in str(refusal.value)
