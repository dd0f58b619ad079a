"""Our encoder's parameters and those of transformers' XLM-RoBERTa-XL (pre-norm, tied): the same model in other names.

Ours has each head's query, key and value side by side in one projection, and no rows for positions 0 and 1 (theirs
count from after the padding index) nor for token types (theirs has one, part of every position).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

FIRST_POSITION = 2
WORDS, POSITIONS, TYPES = (
    f"roberta.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
)
TOP = {
    "embeddings.word": "roberta.embeddings.word_embeddings",
    "block.final_layernorm": "roberta.encoder.LayerNorm",
    "head": "lm_head",  # its bias
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
    """Their name of our parameter (of its query, for the joint projection); None if they have no such part."""
    module, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"block\.layers\.(\d+)\.(.+)", module):
        there = LAYER.get(found[2])
        return there and f"roberta.encoder.layer.{found[1]}.{there}.{kind}"
    if name == "embeddings.position.weight":
        return POSITIONS
    return f"{TOP[module]}.{kind}" if module in TOP else None


def from_stock(name: str, read: Callable[[str], Tensor], heads: int) -> Tensor:
    """Our parameter of this name, whole, made of theirs; read: their parameter by name."""
    there = stock_name(name)
    assert there, f"{name} is no part of an XLM-RoBERTa-XL"
    if there == POSITIONS:
        return read(POSITIONS)[FIRST_POSITION:] + read(TYPES)[0]
    if ".linear_qkv." in name:
        parts = [read(there.replace("query", part)).unflatten(0, (heads, -1)) for part in ("query", "key", "value")]
        return torch.stack(parts, dim=1).flatten(0, 2)
    return read(there)


def to_stock(weights: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Their parameters, made of all of ours."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        there = stock_name(name)
        assert there, f"{name} is no part of an XLM-RoBERTa-XL"
        if there == POSITIONS:
            found[POSITIONS] = torch.cat([weight.new_zeros(FIRST_POSITION, weight.shape[1]), weight])
            found[TYPES] = weight.new_zeros(1, weight.shape[1])
        elif ".linear_qkv." in name:
            for number, part in enumerate(("query", "key", "value")):
                found[there.replace("query", part)] = weight.unflatten(0, (heads, 3, -1))[:, number].flatten(0, 1)
        else:
            found[there] = weight
    return {name: weight.contiguous() for name, weight in found.items()}
