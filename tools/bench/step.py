"""`bench.py step`: our training step beside transformers' XLM-RoBERTa and beside the step's matrix products alone."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from mlinterf_ds.engine.passes import WARM
from tools.bench.engines import build, plain_step, shapes
from tools.bench.timing import busy_shares, interleaved, ratio


def measure(options: argparse.Namespace) -> dict[str, Any]:
    engine, _, train, _ = build(
        options, ["l0"], "paper_8heads", [f"variant={options.variant}", *shapes(options)], "zero0", fast=True
    )
    (batch,) = train(0)
    work = {
        "ours": plain_step(engine, [batch]),
        "transformers": transformers_step(options, engine, batch),
        "products": products(options, engine, batch.positions.numel()),
    }
    if options.profile:
        profile(work["ours"])
    for _ in range(WARM + 1):  # compiled, and captured as graphs where there are some
        work["ours"]()
    seconds = interleaved(work, options.rounds)
    tokens = options.rows * options.length
    return {
        "tokens_per_second": {name: tokens / statistics.median(times) for name, times in seconds.items()},
        "times_transformers": ratio(seconds["transformers"], seconds["ours"]),
        "times_products": ratio(seconds["ours"], seconds["products"]),
    } | busy_shares(work, seconds)


def transformers_step(options: argparse.Namespace, engine: Any, batch: Any) -> Callable[[], None]:
    """A training step of transformers' masked language model with the same shapes, on the same rows."""
    try:
        from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM
    except ImportError:
        sys.exit("error: this comparison needs transformers: pip install transformers")
    shape, dtype = engine.model.config, next(engine.model.parameters()).dtype
    config = XLMRobertaConfig(
        vocab_size=options.vocabulary, hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.ffn, max_position_embeddings=options.length + 2,
        hidden_dropout_prob=options.dropout, attention_probs_dropout_prob=options.dropout, type_vocab_size=1,
    )  # fmt: skip
    model = XLMRobertaForMaskedLM(config).to(engine.device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = batch.to(engine.device)
    labels = torch.full_like(batch.tokens, -100).scatter(1, batch.positions, batch.labels)

    def step() -> None:
        model(input_ids=batch.tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def products(options: argparse.Namespace, engine: Any, masked: int) -> Callable[[], None]:
    """The matrix products of a step alone: each forward product and the two products of its backward pass."""
    shape, dtype = engine.model.config, next(engine.model.parameters()).dtype
    tokens, inner = options.rows * options.length, shape.heads * shape.kv_channels
    linear = [(tokens, shape.width, 3 * inner), (tokens, inner, shape.width)] * shape.layers
    linear += [(tokens, shape.width, shape.ffn), (tokens, shape.ffn, shape.width)] * shape.layers
    linear += [(masked, shape.width, shape.width), (masked, shape.width, options.vocabulary)]

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=engine.device).to(dtype)

    operands = {size: (random(*size[:2]), random(*size[1:])) for size in set(linear)}
    heads = options.rows * shape.heads
    scores, values = (random(heads, options.length, last) for last in (options.length, shape.kv_channels))

    def run() -> None:
        for size in linear:
            left, right = operands[size]
            out = left @ right
            _ = out @ right.T, left.T @ out
        for _ in range(3 * shape.layers):
            _ = scores @ values, values @ values.transpose(1, 2)

    return run


def profile(step: Callable[[], Any]) -> None:
    """Prints the operators of a step, those that take most time of their own first."""
    from torch import profiler

    step()
    with profiler.profile() as events:
        step()
    print(events.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))
