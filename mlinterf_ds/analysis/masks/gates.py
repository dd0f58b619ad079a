"""Gates on groups of a frozen encoder's parameters, at any tensor-parallel layout.

A group is an attention head (the gate multiplies the head's part of the core attention's output), a feed-forward neuron (it
multiplies the activation), or a row of a shared matrix (it multiplies the row's product, but not the bias). A gate of zero has the
effect of setting the group's parameters to zero. Only parameters that languages share are gated: the routed modules of variants
`attn` and `ffn` serve one language each and say nothing about sharing. Adapters, norms and embeddings are not gated.

The groups of a model lie end to end in one vector, the same on every rank, of which each rank's modules use slices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlinterf_ds.analysis.masks import hard_concrete
from mlinterf_ds.errors import UserError
from mlinterf_ds.model.encoder import Encoder
from mlinterf_ds.model.routing import Routed

COMPONENTS = ("attention", "ffn")


@dataclass(frozen=True)
class Site:
    """The groups of one module: `size` of them, from `start` in the vector of all groups."""

    kind: str  # heads, neurons or rows
    layer: int
    component: str  # attention or ffn
    matrix: str  # the matrix whose rows these are; '' for heads and neurons
    start: int
    size: int
    parameters: int  # parameters in one group
    split: bool  # whether tensor-parallel ranks share the groups out; else every rank has all
    module: nn.Module

    def local(self, rank: int, ranks: int) -> slice:
        """The slice of the vector of all groups that a tensor-parallel rank has."""
        if not self.split:
            return slice(self.start, self.start + self.size)
        part = self.size // ranks
        return slice(self.start + rank * part, self.start + (rank + 1) * part)

    @property
    def names(self) -> list[str]:
        """The names of the groups, such as 'L1 head 3', 'L0 neuron 17' or 'L0 qkv row 5'."""
        group = {"heads": "head", "neurons": "neuron"}.get(self.kind, f"{self.matrix} row")
        return [f"L{self.layer} {group} {index}" for index in range(self.size)]


class Gates:
    """The gated groups of an encoder. Inside `applied`, gates act on it."""

    def __init__(self, encoder: Encoder, kinds: Sequence[str], tensor_rank: int, tensor: int):
        """kinds: some of heads, neurons and rows. UserError if languages share no group of these kinds."""
        self.sites: list[Site] = []
        self._rank, self._ranks = tensor_rank, tensor
        for number, layer in enumerate(encoder.block.layers):
            self.sites += _sites(encoder, number, layer, kinds, self.count)
        if not self.count:
            raise UserError(
                f"prune.groups={','.join(kinds)}: in variant {encoder.variant!r} these belong to one language each; choose "
                "groups that languages share (attn routes heads, ffn routes neurons)"
            )

    @property
    def count(self) -> int:
        """The number of groups."""
        return self.sites[-1].start + self.sites[-1].size if self.sites else 0

    @property
    def names(self) -> list[str]:
        """The name of each group."""
        return [name for site in self.sites for name in site.names]

    def per_group(self, field: str) -> list[Any]:
        """The value of a `Site` field for each group."""
        return [getattr(site, field) for site in self.sites for _ in range(site.size)]

    def weights(self) -> Tensor:
        """(groups,) float32: each group's share of all gated parameters."""
        counts = torch.tensor(self.per_group("parameters"), dtype=torch.float32)
        return counts / counts.sum()

    def replicas(self) -> Tensor:
        """(groups,) float32: the number of tensor-parallel ranks on which a group acts."""
        return torch.tensor([1.0 if split else float(self._ranks) for split in self.per_group("split")])

    def kept(self, pi: Tensor) -> dict[str, float]:
        """The shares that a model pruned by log-odds pi (groups,) keeps: of all gated parameters, and of each kind of group."""
        is_open, kinds = (hard_concrete.gate(pi) > 0).float(), np.array(self.per_group("kind"))
        shares = {f"kept_{kind}": float(is_open[kinds == kind].mean()) for kind in dict.fromkeys(kinds)}
        return {"kept": float((is_open * self.weights()).sum()), **shares}

    @contextlib.contextmanager
    def applied(self, gates: Tensor) -> Iterator[None]:
        """Inside, forward passes are those of the gated model. gates: (rows or 1, groups), on the model's device."""
        with contextlib.ExitStack() as hooks:
            for site in self.sites:
                local = gates[:, site.local(self._rank, self._ranks)]
                if site.kind == "neurons":
                    handle = site.module.register_forward_pre_hook(partial(_gate_inputs, local))
                else:
                    hook = _gate_heads if site.kind == "heads" else _gate_rows
                    handle = site.module.register_forward_hook(partial(hook, local))
                hooks.callback(handle.remove)
            yield


def _sites(encoder: Encoder, number: int, layer: Any, kinds: Sequence[str], start: int) -> list[Site]:
    """The sites in the shared modules of layer `number`; the first group is number `start` of the model."""
    shape = encoder.config
    width, head = shape.width, shape.kv_channels
    inner = shape.heads * head
    attention, mlp = layer.self_attention, layer.mlp
    sites: list[Site] = []

    def add(kind: str, component: str, matrix: str, size: int, parameters: int, split: bool, module: nn.Module) -> None:
        first = sites[-1].start + sites[-1].size if sites else start
        if kind in kinds:
            sites.append(Site(kind, number, component, matrix, first, size, parameters, split, module))

    if not isinstance(attention, Routed):
        size = head * (3 * (width + 1) + width)  # three rows with bias a channel, and its column of the projection
        add("heads", "attention", "", shape.heads, size, True, attention.core_attention)
        add("rows", "attention", "qkv", 3 * inner, width, True, attention.linear_qkv)
        add("rows", "attention", "proj", width, inner, False, attention.linear_proj)
    if not isinstance(mlp, Routed):
        add("neurons", "ffn", "", shape.ffn, 2 * width + 1, True, mlp.linear_fc2)  # a row with bias, and a column
        add("rows", "ffn", "fc1", shape.ffn, width, True, mlp.linear_fc1)
        add("rows", "ffn", "fc2", width, shape.ffn, False, mlp.linear_fc2)
    return sites


def _gate_heads(gates: Tensor, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """gates: (rows, heads); output: (rows, length, heads * head width)."""
    by_head = output.unflatten(2, (gates.shape[1], -1))
    return (by_head * gates[:, None, :, None].to(output.dtype)).flatten(2)


def _gate_inputs(gates: Tensor, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """gates: (rows, neurons); inputs[0]: (rows, length, neurons)."""
    return (inputs[0] * gates[:, None].to(inputs[0].dtype), *inputs[1:])


def _gate_rows(gates: Tensor, module: Any, _inputs: Any, output: Any) -> Any:
    """gates: (rows, outputs); output: (rows, length, outputs), or three of them by head (queries, keys and values)."""
    if isinstance(output, tuple):
        by_head = gates.view(len(gates), module.heads, 3 * module.head_width).split(module.head_width, dim=-1)
        biases = module.bias.view(module.heads, 3 * module.head_width).split(module.head_width, dim=-1)
        return tuple(_gated(part, gate, bias) for part, gate, bias in zip(output, by_head, biases, strict=True))
    return _gated(output, gates, module.bias)


def _gated(output: Tensor, gates: Tensor, bias: Tensor) -> Tensor:
    """The product's part of output (rows, length, ...) times gates (rows, ...), and the bias as it is."""
    by_row = gates[:, None].to(output.dtype)
    return output * by_row + bias * (1 - by_row)
