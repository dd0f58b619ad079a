"""What each of two ranks runs: the tensor-parallel model against the whole one, which each rank also holds."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlinterf_ds.model.encoder import Encoder, partition_dim
from mlinterf_ds.model.layers import CoreAttention
from mlinterf_ds.runtime import parallel
from mlinterf_ds.sections import ModelConfig
from tests.model_batches import CODES, LENGTH, SHAPE, batch
from tests.model_batches import hidden as hidden_states
from tests.ranks import laid_out

RANKS = 2


def build(variant: str, vocabulary: int, **options: Any) -> Encoder:
    config = ModelConfig(**(SHAPE | {"dropout": 0, "attention_dropout": 0} | options))
    return Encoder(config, variant=variant, languages=CODES, vocabulary=vocabulary, positions=LENGTH, seed=3)


def cut(whole: Tensor, parameter: nn.Parameter, rank: int) -> Tensor:
    """This rank's slice of a tensor shaped like the whole parameter."""
    dimension = partition_dim(parameter)
    return whole if dimension is None else whole.chunk(RANKS, dimension)[rank]


def run(model: Encoder, vocabulary: int, languages: list[int]) -> dict[str, Tensor]:
    rows = batch(languages, step_languages=(0, 1, 2), vocabulary=vocabulary)
    hidden = hidden_states(model, rows)
    loss, nll = model(rows)
    loss.backward()
    return {"hidden": hidden.detach(), "loss": loss.detach(), "nll": nll, "logits": model.logits(hidden).detach()}


def equals_one_rank(variant: str, vocabulary: int, options: dict[str, Any], languages: list[int]) -> None:
    """Initial weights, hidden states, logits, loss and every gradient."""
    laid_out(1)
    whole = build(variant, vocabulary, **options)
    fresh = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in whole.parameters():  # biases and norms too: all far from their defaults
            centre, spread = (parameter, 0.3) if parameter.ndim == 1 else (0.2 * parameter / parameter.std(), 0.1)
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=source))
    expected = run(whole, vocabulary, languages)

    rank = laid_out(RANKS).tensor_rank
    sliced = build(variant, vocabulary, **options)
    parameters = dict(sliced.named_parameters())
    for name, original in whole.named_parameters():
        torch.testing.assert_close(parameters[name].detach(), cut(fresh[name], parameters[name], rank), rtol=0, atol=0)
        with torch.no_grad():
            parameters[name].copy_(cut(original, parameters[name], rank))
    results = run(sliced, vocabulary, languages)
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=1e-5, atol=1e-5)
    for name, original in whole.named_parameters():
        assert original.grad is not None and parameters[name].grad is not None, name
        own = cut(original.grad, parameters[name], rank)
        torch.testing.assert_close(
            parameters[name].grad, own, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def replicas_agree_under_dropout(variant: str, recompute: bool) -> None:
    """With dropout, what ranks hold in common stays common: the loss and the gradients of whole parameters, bit for bit."""
    laid_out(RANKS)
    model = build(variant, 100, dropout=0.2, attention_dropout=0.2, recompute=recompute)
    rows = batch([1, 0, 1], step_languages=(0, 1, 2))
    first, _ = model(rows)
    first.backward()
    once = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    second, _ = model(rows)
    second.backward()
    assert torch.equal(first, second)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(once[name], parameter.grad), name
        if partition_dim(parameter) is None:
            assert same_everywhere(parameter.grad), name
    assert same_everywhere(first.detach())


def attention_drops_differently() -> tuple[Tensor, Tensor]:
    """The same heads on both ranks: (output with dropout, the ambient random state after it)."""
    laid_out(RANKS)
    core = build("joint", 100, attention_dropout=0.5).block.layers[0].self_attention.core_attention
    assert isinstance(core, CoreAttention)
    heads = torch.randn(2, LENGTH, 2, 8, generator=torch.Generator().manual_seed(0))
    with parallel.replayed(11):
        output = core(heads, heads, heads, None)
        state = torch.get_rng_state()
    with parallel.replayed(11):
        assert torch.equal(output, core(heads, heads, heads, None))
    return output, state


def same_everywhere(value: Tensor) -> bool:
    others = [torch.empty_like(value) for _ in range(RANKS)]
    dist.all_gather(others, value.contiguous())
    return all(torch.equal(others[0], other) for other in others)
