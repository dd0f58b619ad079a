"""One Transformer layer over megatron's tensor-parallel products, with the modules that a variant routes by language.

Hidden states are (rows, length, width) throughout. The modules call each other directly, without megatron's own layer
around them: a compiler can then take a layer as one region, and the last layer can compute the positions that are read
and no others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from mlinterf_ds.runtime.parallel import replayed  # isort: skip  # first: it imports megatron without a compiler

import torch
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mlinterf_ds.errors import UserError
from mlinterf_ds.model.routing import Routed, Router
from mlinterf_ds.sections import ModelConfig, Variant, has_adapters, is_meta

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh, "silu": F.silu}
ROTARY_BASE = 10_000.0  # of the wavelengths of rotary positions (Su et al., 2021)


def parallel_config() -> ModelParallelConfig:
    """megatron's settings of a product: parameters start uninitialised, since the encoder draws them by name."""
    return ModelParallelConfig(
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        use_cpu_initialization=True,
        perform_initialization=False,
    )


class OneOutput(nn.Module):
    """A linear layer of megatron's whose one output includes the bias; on one rank it is torch's fused one.

    torch's computes the gradients that are needed and no others, and is twice differentiable. megatron's layers also put an
    empty `_extra_state` into state dicts, and so into checkpoints; these do not.
    """

    ranks: int
    weight: Tensor
    bias: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        if self.ranks == 1:
            return F.linear(hidden, self.weight, self.bias)
        return super().forward(hidden)[0]

    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state


class ColumnLinear(OneOutput, ColumnParallelLinear):
    """(rows, length, inputs) to this rank's (rows, length, outputs / ranks)."""

    def __init__(self, inputs: int, outputs: int):
        group = parallel_state.get_tensor_model_parallel_group()
        super().__init__(
            inputs, outputs, config=parallel_config(), init_method=nn.init.zeros_, gather_output=False, tp_group=group
        )
        self.ranks = group.size()
        mark_split(self.weight, 0)
        mark_split(self.bias, 0)
        self._load_state_dict_pre_hooks.clear()  # they fill in a missing `_extra_state`


class RowLinear(OneOutput, RowParallelLinear):
    """This rank's (rows, length, inputs / ranks) to (rows, length, outputs), summed over the ranks."""

    def __init__(self, inputs: int, outputs: int):
        group = parallel_state.get_tensor_model_parallel_group()
        super().__init__(
            inputs, outputs, config=parallel_config(), init_method=nn.init.zeros_, bias=True, input_is_parallel=True,
            skip_bias_add=False, tp_group=group,
        )  # fmt: skip
        self.ranks = group.size()
        mark_split(self.weight, 1)
        self._load_state_dict_pre_hooks.clear()


def mark_split(parameter: Any, dimension: int) -> None:
    """Marks, as megatron does, that tensor-parallel ranks hold slices of a parameter along this dimension."""
    if not hasattr(parameter, "tensor_model_parallel"):  # megatron refuses to mark twice
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dimension, stride=1)


class QueryKeyValue(ColumnLinear):
    """The projection of hidden states to queries, keys and values; a head's three are neighbours among its outputs."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.width, 3 * config.heads * config.kv_channels)
        self.heads, self.head_width = config.heads // self.ranks, config.kv_channels

    def forward(self, hidden: Tensor, read: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """(rows, length, width) to three of (rows, length, this rank's heads, head width).

        read: (rows, read) columns; the queries are those of these columns alone, (rows, read, heads, head width).
        """
        if read is not None and self.ranks == 1:
            weight = self.weight.view(self.heads, 3, self.head_width, -1)
            bias = self.bias.view(self.heads, 3, self.head_width)
            query = F.linear(at_positions(hidden, read), weight[:, 0].flatten(0, 1), bias[:, 0].flatten())
            both = F.linear(hidden, weight[:, 1:].flatten(0, 2), bias[:, 1:].flatten())
            key, value = self._by_head(both, 2).split(self.head_width, dim=-1)
            return self._by_head(query, 1), key, value
        query, key, value = self._by_head(super().forward(hidden), 3).split(self.head_width, dim=-1)
        if read is not None:
            query = self._by_head(at_positions(query.flatten(2), read), 1)
        return query, key, value

    def _by_head(self, outputs: Tensor, parts: int) -> Tensor:
        return outputs.view(*outputs.shape[:2], self.heads, parts * self.head_width)


class CoreAttention(nn.Module):
    """softmax(q k' / sqrt(head width)) v on this rank's heads, with dropout on the probabilities."""

    def __init__(self, dropout: float):
        super().__init__()
        self.dropout = dropout
        group = parallel_state.get_tensor_model_parallel_group()
        self.rank, self.ranks = group.rank(), group.size()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query: (rows, read, heads, head width); key, value: (rows, length, heads, head width); mask: (rows, 1,
        1 or read, length) bool, True = attend, or None.

        Returns (rows, read, heads * head width).
        """
        if not len(query):  # a language without rows here; torch's kernels need some
            return (query + (key + value).sum(1, keepdim=True)).flatten(2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        if dropout and self.ranks > 1:
            # heads of different ranks drop different probabilities; every other dropout is the same on all of them
            with replayed(int(torch.randint(2**62, ())) + self.rank):
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
        hidden = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
        scores = scores + hidden  # a sum's backward pass, unlike masked_fill's, costs nothing
    return torch.matmul(F.dropout(scores.softmax(-1), dropout, dropout > 0), value)


class SelfAttention(nn.Module):
    """Multi-head self-attention on this rank's heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.core_attention = CoreAttention(config.attention_dropout)
        self.linear_proj = RowLinear(config.heads * config.kv_channels, config.width)
        self.linear_qkv = QueryKeyValue(config)

    def forward(
        self, hidden: Tensor, mask: Tensor | None = None, read: Tensor | None = None, turns: Tensor | None = None
    ) -> Tensor:
        """(rows, length, width) to (rows, length, width), or with `read` (rows, read) to those columns' (rows, read, width).

        turns: see `rotary_turns`; None: queries and keys are not rotated.
        """
        query, key, value = self.linear_qkv(hidden, read)
        if turns is not None:
            query = rotated(query, turns if read is None else at_positions(turns, read))
            key = rotated(key, turns)
        return self.linear_proj(self.core_attention(query, key, value, mask))


def rotary_turns(position_ids: Tensor, head_width: int, dtype: torch.dtype) -> Tensor:
    """By which angles rotary positions turn a head's pairs of channels: (rows, length, head width), cosines, then sines.

    position_ids: (rows, length). Pair k is channel k with channel k + head width / 2; at position p it turns by
    p * 10000^(-2 k / head width).
    """
    pairs = head_width // 2
    precise = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(pairs, device=position_ids.device, dtype=precise) / -pairs
    angles = position_ids[:, :, None] * ROTARY_BASE**exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def rotated(heads: Tensor, turns: Tensor) -> Tensor:
    """Queries or keys (rows, length, heads, head width), each pair of channels turned; turns: see `rotary_turns`."""
    cosine, sine = turns[:, :, None].chunk(2, dim=-1)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class FeedForward(nn.Module):
    """Two products with a GELU between them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.linear_fc1 = ColumnLinear(config.width, config.ffn)
        self.linear_fc2 = RowLinear(config.ffn, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(hidden)))


class Adapter(nn.Module):
    """The inner part of a residual adapter: down projection, activation, up projection (Houlsby et al., 2019)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.adapter_activation]
        self.down = ColumnLinear(config.width, config.adapter_width)
        self.up = RowLinear(config.adapter_width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """What the adapter adds to hidden (rows, length, width)."""
        return self.up(self.activation(self.down(hidden)))


def layer_norm(config: ModelConfig) -> nn.LayerNorm:
    """A LayerNorm over the width of hidden states."""
    return nn.LayerNorm(config.width, eps=config.epsilon)


class Residual(nn.Module):
    """The residual sum around a sublayer: dropout on its output, then the sum, and its adapter, if it has one.

    The adapter adds to the output before the sum, or to the sum (`model.adapter_on`), of which it may read a normed form.
    """

    def __init__(self, config: ModelConfig, adapter: nn.Module | None):
        super().__init__()
        self.dropout, self.adapter = config.dropout, adapter
        self.on_sum, self.normed = config.adapter_on == "sum", config.adapter_norm != "none"
        self.skips_norm = config.adapter_skip == "sum"
        own = adapter is not None and config.adapter_norm == "own"
        self.adapter_norm = layer_norm(config) if own else None

    def forward(self, output: Tensor, residual: Tensor, norm: nn.Module) -> Tensor:
        """output, residual: (rows, length, width); norm: the LayerNorm of the sublayer."""
        output = F.dropout(output, self.dropout, self.training)
        if self.adapter is None:
            return residual + output
        if not self.on_sum:
            return residual + output + self.adapter(output)
        hidden = read = residual + output
        if self.normed:
            read = norm(hidden) if self.adapter_norm is None else self.adapter_norm(hidden)
        return (hidden if self.skips_norm else read) + F.dropout(self.adapter(read), self.dropout, self.training)


class Layer(nn.Module):
    """Self-attention and feed-forward, each with its LayerNorm before it (pre-norm) or after its sum (post-norm).

    Its activations may be recomputed in the backward pass, with the dropout and the route of the forward pass.
    """

    def __init__(self, config: ModelConfig, variant: str, router: Router):
        super().__init__()

        def by_language(build: Callable[[], nn.Module], own: bool) -> nn.Module:
            return Routed(router, build) if own else build()

        def residual(adapted: bool) -> Residual:
            return Residual(config, by_language(lambda: Adapter(config), variant == "adpt") if adapted else None)

        self.router, self.recompute, self.pre_norm = router, config.recompute, config.norm == "pre"
        self.self_attention = by_language(lambda: SelfAttention(config), variant == "attn")
        self.self_attn_bda = residual(has_adapters(variant) and config.adapter_after == "both")
        self.mlp = by_language(lambda: FeedForward(config), variant == "ffn")
        self.mlp_bda = residual(has_adapters(variant))
        if self.pre_norm:
            self.input_layernorm, self.pre_mlp_layernorm = layer_norm(config), layer_norm(config)
        else:
            self.post_attention_layernorm, self.post_mlp_layernorm = layer_norm(config), layer_norm(config)

    def forward(
        self, hidden: Tensor, mask: Tensor | None = None, read: Tensor | None = None, turns: Tensor | None = None
    ) -> Tensor:
        """hidden: (rows, length, width); mask: (rows, 1, 1 or read, length) bool, True = attend, or None.

        read: (rows, read) columns; the result is that of these columns alone, (rows, read, width); None: of all.
        turns: see `rotary_turns`; None: the model has learned positions.
        """
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return self.router.run(run_layer, self, hidden, mask, read, turns)
        route = self.router.route

        def with_route(hidden: Tensor) -> Tensor:
            with self.router.following(route):  # the backward pass runs this outside the forward pass's route
                return self.router.run(run_layer, self, hidden, mask, read, turns)

        return checkpoint(with_route, hidden, use_reentrant=False)


def run_layer(layer: Layer, hidden: Tensor, mask: Tensor | None, read: Tensor | None, turns: Tensor | None) -> Tensor:
    """A layer's arithmetic, one region for a compiler; the arguments are those of `Layer.forward`."""
    reading = {"mask": mask, "read": read, "turns": turns}
    residual = hidden if read is None else at_positions(hidden, read)
    if layer.pre_norm:
        first, second = layer.input_layernorm, layer.pre_mlp_layernorm
        attended = layer.self_attention(first(hidden), **reading)
        residual = layer.self_attn_bda(attended, residual, first)
        return layer.mlp_bda(layer.mlp(second(residual)), residual, second)
    first, second = layer.post_attention_layernorm, layer.post_mlp_layernorm
    residual = first(layer.self_attn_bda(layer.self_attention(hidden, **reading), residual, first))
    return second(layer.mlp_bda(layer.mlp(residual), residual, second))


class Block(nn.Module):
    """All layers; in a pre-norm model, the LayerNorm after the last."""

    def __init__(self, config: ModelConfig, variant: str, router: Router):
        super().__init__()
        assert variant in get_args(Variant) and not is_meta(variant), f"{variant!r} is no architecture"
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        for key in ("heads", "ffn", *(["adapter_width"] if has_adapters(variant) else [])):
            if getattr(config, key) % ranks:
                raise UserError(
                    f"parallel.tensor={ranks} does not divide model.{key.removesuffix('_width')}={getattr(config, key)}"
                )
        self.layers = nn.ModuleList(Layer(config, variant, router) for _ in range(config.layers))
        self.final_layernorm = layer_norm(config) if config.norm == "pre" else None

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        read: Tensor | None = None,
        read_mask: Tensor | None = None,
        turns: Tensor | None = None,
    ) -> Tensor:
        """(rows, length, width) to (rows, length, width), or to (rows, read, width) where `read` (rows, read) names columns.

        The last layer then computes these columns alone; read_mask is the mask of their queries. turns: see `rotary_turns`.
        """
        for layer in self.layers[:-1]:
            hidden = layer(hidden, mask, None, turns)
        hidden = self.layers[-1](hidden, mask if read is None else read_mask, read, turns)
        return hidden if self.final_layernorm is None else self.final_layernorm(hidden)


def at_positions(hidden: Tensor, positions: Tensor) -> Tensor:
    """hidden (rows, length, width) at positions (rows, read): (rows, read, width)."""
    starts = torch.arange(len(hidden), device=hidden.device)[:, None] * hidden.shape[1]
    picked = hidden.flatten(0, 1).index_select(0, (positions + starts).flatten())
    return picked.view(*positions.shape, hidden.shape[2])
