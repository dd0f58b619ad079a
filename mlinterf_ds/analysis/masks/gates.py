"""Gates on a frozen encoder: where they act, for which groups of parameters, at any tensor-parallel layout.

A group is an attention head (its part of the core attention's output is multiplied by the gate), a feed-forward neuron (its
activation is), or a row of a shared matrix (the row's product is; the bias stays). A gate of zero equals setting the
group's parameters to zero. Only what languages share is gated: a routed module (variants `attn` and `ffn`) serves one
language and says nothing about sharing; adapters, norms and embeddings aren't gated either.

All groups of a model lie end to end in one vector, the same on every rank; a rank's modules use their own slices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mlinterf_ds.errors import UserError
from mlinterf_ds.model.encoder import Encoder
from mlinterf_ds.model.routing import Routed

ROWS = {"qkv": "attention", "proj": "attention", "fc1": "ffn", "fc2": "ffn"}  # a layer's matrices and their components


@dataclass(frozen=True)
class Site:
    """One module's groups: `size` of them from `start` of the vector of all."""

    kind: str  # heads, neurons or rows
    layer: int
    component: str  # attention or ffn
    matrix: str  # of rows; else ''
    start: int
    size: int
    parameters: int  # in one group
    split: bool  # over tensor-parallel ranks (else every rank has all of them)
    module: nn.Module

    def local(self, rank: int, ranks: int) -> slice:
        """This rank's groups in the vector of all."""
        if not self.split:
            return slice(self.start, self.start + self.size)
        part = self.size // ranks
        return slice(self.start + rank * part, self.start + (rank + 1) * part)

    @property
    def names(self) -> list[str]:
        """Of its groups: 'L1 head 3', 'L0 neuron 17', 'L0 qkv row 5'."""
        what = {"heads": "head", "neurons": "neuron"}.get(self.kind, f"{self.matrix} row")
        return [f"L{self.layer} {what} {index}" for index in range(self.size)]


class Gates:
    """The gated groups of an encoder; `applied` lets gates act."""

    def __init__(self, encoder: Encoder, kinds: Sequence[str], tensor_rank: int, tensor: int):
        """kinds: some of heads, neurons, rows. UserError if the encoder shares none of them."""
        self.sites: list[Site] = []
        self._place = tensor_rank, tensor
        start = 0
        for number, layer in enumerate(encoder.block.layers):
            for kind, component, matrix, size, parameters, split, module in _found(encoder, layer, kinds):
                self.sites.append(Site(kind, number, component, matrix, start, size, parameters, split, module))
                start += size
        self.count = start
        if not start:
            raise UserError(
                f"prune.groups={','.join(kinds)}: in variant {encoder.variant!r} these belong to one language each; choose "
                "groups that languages share (attn routes heads, ffn routes neurons)"
            )

    @property
    def names(self) -> list[str]:
        return [name for site in self.sites for name in site.names]

    def per_group(self, field: str) -> list[Any]:
        """A site's attribute for each group of the vector."""
        return [getattr(site, field) for site in self.sites for _ in range(site.size)]

    def weights(self) -> Tensor:
        """(groups,) float32: each group's share of all gated parameters."""
        counts = torch.tensor(self.per_group("parameters"), dtype=torch.float32)
        return counts / counts.sum()

    def replicas(self) -> Tensor:
        """(groups,) float32: on how many tensor-parallel ranks a group acts."""
        rank_count = float(self._place[1])
        return torch.tensor([1.0 if split else rank_count for split in self.per_group("split")])

    @contextlib.contextmanager
    def applied(self, gates: Tensor) -> Iterator[None]:
        """Forward passes inside are those of the gated model; gates: (rows or 1, groups), on the model's device."""
        handles = []
        try:
            for site in self.sites:
                mine = gates[:, site.local(*self._place)]
                if site.kind == "heads":
                    handles.append(site.module.register_forward_hook(partial(_gate_heads, mine)))
                elif site.kind == "neurons":
                    handles.append(site.module.register_forward_pre_hook(partial(_gate_inputs, mine)))
                else:
                    handles.append(site.module.register_forward_hook(partial(_gate_rows, mine)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _found(encoder: Encoder, layer: Any, kinds: Sequence[str]) -> Iterator[tuple[str, str, str, int, int, bool, Any]]:
    """(kind, component, matrix, groups, parameters of one, split over ranks, module) of a layer's shared modules."""
    shape = encoder.config
    width, head = shape.width, shape.kv_channels
    inner = shape.heads * head
    attention, mlp = layer.self_attention, layer.mlp
    if not isinstance(attention, Routed):
        if "heads" in kinds:  # three rows of width and bias for each channel, and its column of the projection
            size = head * (3 * (width + 1) + width)
            yield "heads", "attention", "", shape.heads, size, True, attention.core_attention
        if "rows" in kinds:
            yield "rows", "attention", "qkv", 3 * inner, width, True, attention.linear_qkv
            yield "rows", "attention", "proj", width, inner, False, attention.linear_proj
    if not isinstance(mlp, Routed):
        if "neurons" in kinds:  # a row and its bias, and a column
            yield "neurons", "ffn", "", shape.ffn, 2 * width + 1, True, mlp.linear_fc2
        if "rows" in kinds:
            yield "rows", "ffn", "fc1", shape.ffn, width, True, mlp.linear_fc1
            yield "rows", "ffn", "fc2", width, shape.ffn, False, mlp.linear_fc2


def _gate_heads(gates: Tensor, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """gates: (rows, heads); output: (rows, length, heads * head width)."""
    by_head = output.unflatten(2, (gates.shape[1], -1))
    return (by_head * gates[:, None, :, None].to(output.dtype)).flatten(2)


def _gate_inputs(gates: Tensor, _module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """gates: (rows, neurons); inputs[0]: (rows, length, neurons)."""
    return (inputs[0] * gates[:, None].to(inputs[0].dtype), *inputs[1:])


def _gate_rows(gates: Tensor, module: Any, _inputs: Any, result: tuple[Tensor, Tensor | None]) -> Any:
    """gates: (rows, outputs); result: (rows, length, outputs) and a bias yet to add, or None if it holds the bias."""
    output, bias = result
    by_row = gates[:, None].to(output.dtype)
    if bias is not None or module.bias is None:
        return output * by_row, bias
    return output * by_row + module.bias * (1 - by_row), None
