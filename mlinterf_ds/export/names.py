"""Conversion between our encoder's parameters and those of transformers' XLM-RoBERTa-XL (pre-norm, tied), the same model.

Our encoder keeps each head's query, key and value side by side in one projection. XLM-RoBERTa-XL has three projections,
two more position embeddings (its positions count from after the padding index), and an embedding of the token type, which
it adds at every position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

FIRST_POSITION = 2  # XLM-RoBERTa-XL's index of a row's first position
WORDS, POSITIONS, TYPES = (
    f"roberta.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
)
TOP = {
    "embeddings.word": "roberta.embeddings.word_embeddings",
    "block.final_layernorm": "roberta.encoder.LayerNorm",
    "head": "lm_head",  # the bias of the output
    "head.dense": "lm_head.dense",
    "head.norm": "lm_head.layer_norm",
}
LAYER = {
    "input_layernorm": "attention.self_attn_layer_norm",
    "self_attention.linear_qkv": "attention.self.query",  # and key and value
    "self_attention.linear_proj": "attention.output.dense",
    "pre_mlp_layernorm": "LayerNorm",
    "mlp.linear_fc1": "intermediate.dense",
    "mlp.linear_fc2": "output.dense",
}


def stock_name(name: str) -> str | None:
    """XLM-RoBERTa-XL's name of our parameter (the query's, for the joint projection); None if it has no such part."""
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"block\.layers\.(\d+)\.(.+)", module):
        part = LAYER.get(match[2])
        return part and f"roberta.encoder.layer.{match[1]}.{part}.{kind}"
    if name == "embeddings.position.weight":
        return POSITIONS
    return f"{TOP[module]}.{kind}" if module in TOP else None


def from_stock(name: str, read: Callable[[str], Tensor], heads: int) -> Tensor:
    """Our parameter of this name in its full shape; read: returns XLM-RoBERTa-XL's parameter of a name."""
    stock = stock_name(name)
    assert stock, f"{name} is no part of an XLM-RoBERTa-XL"
    if stock == POSITIONS:
        return read(POSITIONS)[FIRST_POSITION:] + read(TYPES)[0]
    if ".linear_qkv." in name:
        parts = [read(stock.replace("query", part)).unflatten(0, (heads, -1)) for part in ("query", "key", "value")]
        return torch.stack(parts, dim=1).flatten(0, 2)
    return read(stock)


def to_stock(weights: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """XLM-RoBERTa-XL's parameters, converted from all of ours."""
    converted: dict[str, Tensor] = {}
    for name, weight in weights.items():
        stock = stock_name(name)
        assert stock, f"{name} is no part of an XLM-RoBERTa-XL"
        if stock == POSITIONS:
            converted[POSITIONS] = torch.cat([weight.new_zeros(FIRST_POSITION, weight.shape[1]), weight])
            converted[TYPES] = weight.new_zeros(1, weight.shape[1])
        elif ".linear_qkv." in name:
            for number, part in enumerate(("query", "key", "value")):
                converted[stock.replace("query", part)] = weight.unflatten(0, (heads, 3, -1))[:, number].flatten(0, 1)
        else:
            converted[stock] = weight
    return {name: weight.contiguous() for name, weight in converted.items()}
