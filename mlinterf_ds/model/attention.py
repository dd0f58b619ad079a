"""Bidirectional self-attention: megatron's projections around torch's scaled_dot_product_attention.

Hidden states are (rows, length, width): megatron's layers never look at the order of the first two dimensions unless
it uses sequence parallelism, and rows first spares every layer two transposed copies.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from mlinterf_ds.runtime.parallel import replayed


class CoreAttention(nn.Module):
    """softmax(q k' / sqrt(head width)) v on this rank's heads, with dropout on the probabilities."""

    def __init__(self, config: TransformerConfig, pg_collection: Any, **_: Any):
        super().__init__()
        self.dropout = config.attention_dropout
        self.group = pg_collection.tp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any) -> Tensor:
        """query, key, value: (rows, length, heads, head width); mask: (rows, 1, 1, length) bool, True = attend, or None.

        Returns (rows, length, heads * head width).
        """
        if not len(query):  # a language without rows here; torch's kernels need some
            return (query + key + value).flatten(2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        if dropout and self.group.size() > 1:
            # heads of different ranks drop different probabilities; every other dropout is the same on all of them
            seed = int(torch.randint(2**62, ())) + self.group.rank()
            with replayed(seed):
                mixed = attend(query, key, value, mask, dropout)
        else:
            mixed = attend(query, key, value, mask, dropout)
        return mixed.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k' / sqrt(head width)) v, (rows, heads, length, head width); torch's kernel except where it is slow.

    On a CPU its backward pass in 16 bits, and its dropout, take two to ten times as long as the products written out.
    """
    if query.device.type != "cpu" or (query.dtype is torch.float32 and not dropout) or query.dtype is torch.float64:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout)
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-2, -1))
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.matmul(F.dropout(scores.softmax(-1), dropout, dropout > 0), value)


class SelfAttention(MegatronSelfAttention):
    """megatron's self-attention, for rows first; its splitting of q, k and v fails without rows."""

    def get_query_key_value_tensors(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, length, width) to three of (rows, length, heads, head width); each head's q, k and v are neighbours."""
        joint, _bias = self.linear_qkv(hidden_states)
        heads, width = self.num_attention_heads_per_partition, self.hidden_size_per_attention_head
        query, key, value = joint.view(*joint.shape[:2], heads, 3 * width).split(width, dim=-1)
        return query, key, value
