"""The pre-norm Transformer layer as megatron module specs, with the modules that a variant routes by language.

Hidden states are (rows, length, width): megatron's layers never look at the order of the first two dimensions unless
they use sequence parallelism, and rows first spares every layer two transposed copies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from mlinterf_ds.runtime.parallel import replayed  # isort: skip  # first: it imports megatron without a compiler

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mlinterf_ds.model.routing import Router, routed
from mlinterf_ds.sections import ModelConfig, Variant, has_adapters, is_meta

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
}


class ColumnLinear(ColumnParallelLinear):
    """megatron's column-parallel linear layer, which adds its own bias; on one rank torch's fused one.

    torch's computes the gradients that are needed and no others, and is twice differentiable.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **(options | {"skip_bias_add": False}))
        _drop_extra_state(self)

    def forward(self, input_: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() == 1:
            return F.linear(input_, self.weight, self.bias), None
        return super().forward(input_)

    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state


class RowLinear(RowParallelLinear):
    """megatron's row-parallel linear layer; on one rank torch's fused one."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        _drop_extra_state(self)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tp_group.size() == 1:
            return F.linear(input_, self.weight, self.bias), None
        return super().forward(input_)

    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state


def _drop_extra_state(linear: nn.Module) -> None:
    """Keeps the empty `_extra_state` of megatron's linear layers out of state dicts, and so out of checkpoints."""
    linear._load_state_dict_pre_hooks.clear()


class CoreAttention(nn.Module):
    """softmax(q k' / sqrt(head width)) v on this rank's heads, with dropout on the probabilities."""

    def __init__(self, config: TransformerConfig, pg_collection: Any, **_: Any):
        super().__init__()
        self.dropout = config.attention_dropout
        self.group = pg_collection.tp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any) -> Tensor:
        """query, key, value: (rows, length, heads, head width); mask: (rows, 1, 1 or length, length) bool, True =
        attend, or None.

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
        hidden = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
        scores = scores + hidden  # a sum's backward pass, unlike masked_fill's, costs nothing
    return torch.matmul(F.dropout(scores.softmax(-1), dropout, dropout > 0), value)


class SelfAttention(MegatronSelfAttention):
    """megatron's self-attention, for rows first; its splitting of q, k and v fails without rows."""

    def get_query_key_value_tensors(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, length, width) to three of (rows, length, heads, head width); each head's q, k and v are neighbours."""
        joint, _bias = self.linear_qkv(hidden_states)
        heads, width = self.num_attention_heads_per_partition, self.hidden_size_per_attention_head
        query, key, value = joint.view(*joint.shape[:2], heads, 3 * width).split(width, dim=-1)
        return query, key, value


class Adapter(nn.Module):
    """The inner part of a residual adapter: down projection, activation, up projection (Houlsby et al., 2019)."""

    def __init__(self, config: TransformerConfig, bottleneck: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        shared = {"config": config, "init_method": config.init_method, "bias": True, "skip_bias_add": True}
        shared["tp_group"] = parallel_state.get_tensor_model_parallel_group()
        self.down = ColumnLinear(config.hidden_size, bottleneck, gather_output=False, **shared)
        self.up = RowLinear(bottleneck, config.hidden_size, input_is_parallel=True, **shared)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the adapter adds to hidden (rows, length, width), and a bias that the caller adds to it."""
        inner, _ = self.down(hidden)
        return self.up(self.activation(inner))


class AdaptedResidual(nn.Module):
    """megatron's bias-dropout-add with a residual adapter on the sublayer's output, before the residual sum."""

    def __init__(self, config: TransformerConfig, adapter: ModuleSpec):
        super().__init__()
        self.adapter = build_module(adapter, config=config)

    def forward(self, training: bool, _fused: bool) -> Callable[..., Tensor]:
        """The function that megatron then calls with ((output, bias), residual, dropout probability)."""
        return partial(self._add, training)

    def _add(self, training: bool, output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, p: float) -> Tensor:
        output, bias = output_and_bias
        output = F.dropout(output if bias is None else output + bias, p, training)
        change, bias = self.adapter(output)
        return residual + output + (change if bias is None else change + bias)


class Layer(TransformerLayer):
    """megatron's layer, which may be recomputed in the backward pass with the dropout and the route of the forward pass."""

    def __init__(self, *arguments: Any, router: Router, recompute: bool, **options: Any):
        super().__init__(*arguments, **options)
        self.router, self.recompute = router, recompute
        self.bias_dropout_add_exec_handler = contextlib.nullcontext  # megatron's builds a graph under no_grad too

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, attention_mask=attention_mask)
        route = self.router.route

        def with_route(hidden: Tensor, mask: Tensor | None) -> Tensor:
            with self.router.following(route):  # the backward pass runs this outside the forward pass's route
                return super(Layer, self).forward(hidden, attention_mask=mask)[0]

        return checkpoint(with_route, hidden_states, attention_mask, use_reentrant=False), None


def _uninitialised(_weight: Tensor) -> None:
    """The initialiser given to megatron: it does nothing, because the encoder initialises by name."""


def megatron_config(config: ModelConfig, tensor: int) -> TransformerConfig:
    """The model's shape in megatron's terms; features that need CUDA or megatron's extensions are off."""
    return TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.width,
        num_attention_heads=config.heads,
        kv_channels=config.kv_channels,
        ffn_hidden_size=config.ffn,
        activation_func=F.gelu,
        layernorm_epsilon=1e-5,
        hidden_dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        tensor_model_parallel_size=tensor,
        use_cpu_initialization=True,
        init_method=_uninitialised,
        output_layer_init_method=_uninitialised,
        embedding_init_method=_uninitialised,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],  # megatron's default prints a warning
    )


def block_spec(
    config: ModelConfig, shape: TransformerConfig, variant: str, router: Router
) -> TransformerBlockSubmodules:
    """The spec of all layers of a variant and of the LayerNorm after the last; shape: `config` in megatron's terms."""
    assert variant in get_args(Variant) and not is_meta(variant), f"{variant!r} is no architecture"
    attention = ModuleSpec(
        module=SelfAttention,
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnLinear, core_attention=CoreAttention, linear_proj=RowLinear
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        params={"ffn_hidden_size": config.ffn},
        submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear),
    )
    if variant == "ffn":
        mlp.params["tp_group"] = (
            parallel_state.get_tensor_model_parallel_group()
        )  # megatron gives it to its own modules alone
    adapter = ModuleSpec(
        module=Adapter, params={"bottleneck": config.adapter_width, "activation": config.adapter_activation}
    )
    if variant == "adpt":
        adapter = routed(router, adapter)
    residual: Any = get_bias_dropout_add
    if has_adapters(variant):
        residual = ModuleSpec(module=AdaptedResidual, params={"config": shape, "adapter": adapter})
    layer = ModuleSpec(
        module=Layer,
        params={"router": router, "recompute": config.recompute},
        submodules=TransformerLayerSubmodules(
            input_layernorm=WrappedTorchNorm,
            self_attention=routed(router, attention) if variant == "attn" else attention,
            self_attn_bda=residual,
            pre_mlp_layernorm=WrappedTorchNorm,
            mlp=routed(router, mlp) if variant == "ffn" else mlp,
            mlp_bda=residual,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * config.layers, layer_norm=WrappedTorchNorm)
