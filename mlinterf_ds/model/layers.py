"""The pre-norm Transformer layer as megatron module specs, and the places where a variant puts its routed modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
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

from mlinterf_ds.model.attention import CoreAttention, SelfAttention
from mlinterf_ds.model.routing import Router, routed
from mlinterf_ds.sections import ModelConfig

VARIANTS = ("mono", "joint", "ffn", "attn", "adpt", "share_adpt")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "silu": F.silu,
}


class ColumnLinear(ColumnParallelLinear):
    """megatron's column-parallel linear layer, adding its own bias; on one rank torch's fused one.

    torch's computes gradients of what needs them only, and is twice differentiable.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **(options | {"skip_bias_add": False}))
        _drop_extra_state(self)

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        if self.allreduce_dgrad:
            return super()._forward_impl(input=input, weight=weight, bias=bias, **options)
        return F.linear(input, weight, bias)

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
    """megatron's linears add an empty `_extra_state` to every state dict; checkpoints are better without."""
    linear._load_state_dict_pre_hooks.clear()


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
        """(rows, length, width) to what the adapter adds to it, and a bias yet to add."""
        inner, _ = self.down(hidden)
        return self.up(self.activation(inner))


class AdaptedResidual(nn.Module):
    """megatron's bias-dropout-add with a residual adapter on the sublayer's output, before the residual sum."""

    def __init__(self, config: TransformerConfig, adapter: ModuleSpec):
        super().__init__()
        self.adapter = build_module(adapter, config=config)

    def forward(self, training: bool, _fused: bool) -> Callable[..., Tensor]:
        """megatron first asks for the function, then calls it with ((output, bias), residual, probability)."""
        return partial(self._add, training)

    def _add(self, training: bool, output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, p: float) -> Tensor:
        output, bias = output_and_bias
        output = F.dropout(output if bias is None else output + bias, p, training)
        change, bias = self.adapter(output)
        return residual + output + (change if bias is None else change + bias)


class Layer(TransformerLayer):
    """megatron's layer; optionally recomputed in the backward pass, with the dropout and the route of the forward."""

    def __init__(self, *arguments: Any, router: Router, recompute: bool, **options: Any):
        super().__init__(*arguments, **options)
        self.router, self.recompute = router, recompute
        self.bias_dropout_add_exec_handler = contextlib.nullcontext  # megatron's builds a graph under no_grad too

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return super().forward(hidden_states, attention_mask=attention_mask)
        route = self.router.route

        def once_more(hidden: Tensor, mask: Tensor | None) -> Tensor:
            with self.router.following(route):  # the forward pass is over when this runs again
                return super(Layer, self).forward(hidden, attention_mask=mask)[0]

        return checkpoint(once_more, hidden_states, attention_mask, use_reentrant=False), None


def _leave(_weight: Tensor) -> None:
    """megatron's initialiser here: the encoder initialises by name."""


def megatron_config(config: ModelConfig, tensor: int) -> TransformerConfig:
    """Our shape in megatron's terms, with what needs CUDA or megatron's extensions switched off."""
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
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],  # its default warns
    )


def block_spec(
    config: ModelConfig, shape: TransformerConfig, variant: str, router: Router
) -> TransformerBlockSubmodules:
    """All layers of a variant, and the LayerNorm after the last; shape: config in megatron's terms."""
    assert variant in VARIANTS, f"variant {variant!r}: expected one of {VARIANTS}"
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
        mlp.params["tp_group"] = parallel_state.get_tensor_model_parallel_group()  # megatron gives it to its own alone
    adapter = ModuleSpec(
        module=Adapter, params={"bottleneck": config.adapter_width, "activation": config.adapter_activation}
    )
    if variant == "adpt":
        adapter = routed(router, adapter)
    residual: Any = get_bias_dropout_add
    if variant in ("adpt", "share_adpt"):
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
