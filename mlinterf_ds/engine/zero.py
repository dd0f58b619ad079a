"""Parameters as DeepSpeed keeps them (ZeRO 1 to 3, offload): the one file that touches DeepSpeed's internals.

DeepSpeed partitions the shared parameters, gathers weights and reduces gradients; a `Space` (`engine/space.py`) shows this
rank's share. Under ZeRO 3 it partitions the languages' own parameters too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlinterf_ds.engine.space import FlatSpace, Segment, Space, Vector


class Zero12Space(Space):
    """The shared parameters under DeepSpeed's ZeRO 1 and 2: one flat group, partitioned over data-parallel ranks."""

    def __init__(
        self,
        name: str,
        engine: Any,
        parameters: Mapping[str, nn.Parameter],
        dims: Mapping[str, int | None],
        tensor_rank: int,
    ):
        self.zero = engine.optimizer
        self.name, self.parameters = name, dict(parameters)
        members, self._flat, self._partitions, master = self._parts()
        assert len(members) == 1, "one group: languages are kept elsewhere"
        self.masters = [master.detach().requires_grad_()]  # DeepSpeed's `.grad` stays its own (offload's buffer)
        self.index = dist.get_rank(self.zero.real_dp_process_group[0])
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        low, high, position = self.index * master.numel(), (self.index + 1) * master.numel(), 0
        self.segments = []
        for parameter in members[0]:
            begin, end = max(position, low), min(position + parameter.numel(), high)
            if begin < end:
                name = names[id(parameter)]
                self.segments.append(
                    Segment(name, tuple(parameter.shape), begin - position, end - begin, 0, begin - low, dims[name])
                )
            position += parameter.numel()
        self._count(tensor_rank)

    def _parts(self) -> tuple[Any, Any, Any, Tensor]:
        """DeepSpeed's parameters by group, flat working weights, their partitions, and this rank's master."""
        zero = self.zero
        assert not zero.round_robin_gradients
        return (
            zero.bit16_groups,
            zero.bit16_groups_flat,
            zero.parallel_partitioned_bit16_groups,
            zero.single_partition_of_fp32_groups[0],
        )

    def gradient(self) -> Vector:
        zero = self.zero
        if zero.cpu_offload:
            zero._wait_for_offload_copies()
            buffer = zero.single_partition_of_fp32_groups[0].grad
            gradient = buffer.detach().clone().float()
            buffer.zero_()
            zero._offload_accumulated_param_ids = set()
            zero.reset_cpu_buffers()
        else:
            flat = zero._get_preflattened_grad_partition(0)
            if flat is None:
                flat = torch.cat([piece.reshape(-1) for piece in zero.averaged_gradients[0]])
            gradient = torch.zeros_like(self.masters[0], requires_grad=False)
            gradient[: flat.numel()].copy_(flat[: gradient.numel()])
            zero._release_preflattened_grad_buffers()
        zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
        zero.all_grad_tensors = dict.fromkeys(zero.all_grad_tensors)
        zero.zero_grad(set_to_none=True)
        zero.micro_step_id = -1  # the next backward starts a new sum
        return [gradient]

    @torch.no_grad()
    def write(self, offset: Vector | None = None, scale: float = 0.0) -> None:
        from deepspeed.runtime.utils import all_gather_dp_groups

        zero = self.zero
        self._partitions[0][self.index].data.copy_(self._displaced_shard(0, offset, scale))
        all_gather_dp_groups(
            groups_flat=self._flat,
            partitioned_param_groups=self._partitions,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )


class Zero1Bf16Space(Zero12Space):
    """ZeRO 1 in bf16 without offload, for which DeepSpeed has another optimizer, BF16_Optimizer."""

    def _parts(self) -> tuple[Any, Any, Any, Tensor]:
        zero = self.zero
        return zero.bf16_groups, zero.bf16_groups_flat, zero.bf16_partitioned_groups, zero.fp32_groups_flat_partition[0]

    def gradient(self) -> Vector:
        gradient = self.zero.fp32_groups_gradient_flat_partition[0].clone()
        self.zero.zero_grad(set_to_none=True)
        return [gradient]


class Zero3Space(Space):
    """The shared parameters under DeepSpeed's ZeRO 3: sub-groups of per-parameter partitions."""

    def __init__(
        self,
        name: str,
        engine: Any,
        parameters: Mapping[str, nn.Parameter],
        dims: Mapping[str, int | None],
        tensor_rank: int,
    ):
        self.zero = engine.optimizer
        self.name, self.parameters = name, dict(parameters)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        zero = self.zero
        self.offloaded = bool(zero.offload_optimizer)
        self.index = dist.get_rank(zero.dp_process_group)
        self.segments, self.masters = [], []
        for shard, members in enumerate(zero.fp16_groups):
            master = zero.fp32_partitioned_groups_flat[shard].detach()
            if master.data_ptr() == zero.fp16_partitioned_groups_flat[shard].data_ptr():
                master = master.clone()  # fp32: the working copy must be able to move alone
            self.masters.append(master.requires_grad_())
            offset = 0
            for parameter in members:
                width, numel, name = parameter.partition_numel(), parameter.ds_numel, names[id(parameter)]
                start = min(numel, self.index * width)
                length = min(width, numel - start)
                self.segments.append(Segment(name, tuple(parameter.ds_shape), start, length, shard, offset, dims[name]))
                offset += width
        self._count(tensor_rank)

    def gradient(self) -> Vector:
        zero = self.zero
        zero._partition_all_parameters()
        if self.offloaded:
            gradient = [flat.grad.detach().clone().float() for flat in zero.fp32_partitioned_groups_flat]
        else:
            gradient = [
                torch.cat([piece.reshape(-1) for piece in zero.averaged_gradients[shard]]).float()
                for shard in range(len(self.masters))
            ]
        for segment in self.segments:  # what lies beyond a parameter's end is padding: DeepSpeed leaves it unset
            last = self._padding_end(segment)
            gradient[segment.shard][segment.offset + segment.length : last].zero_()
        zero.averaged_gradients = {}
        zero.zero_grad(set_to_none=True)
        if self.offloaded:
            zero.reset_cpu_buffers()
        zero._pre_step()  # the next backward starts a new sum
        return gradient

    def _padding_end(self, segment: Segment) -> int:
        following = [s.offset for s in self.segments if s.shard == segment.shard and s.offset > segment.offset]
        return min(following) if following else self.masters[segment.shard].numel()

    @torch.no_grad()
    def write(self, offset: Vector | None = None, scale: float = 0.0) -> None:
        zero = self.zero
        zero._partition_all_parameters()
        for shard in range(len(self.masters)):
            zero.fp16_partitioned_groups_flat[shard].data.copy_(self._displaced_shard(shard, offset, scale))
            zero._unflatten_partitioned_parameters(shard)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


class Zero3FlatSpace(FlatSpace):
    """A language's parameters under ZeRO 3: the slices are DeepSpeed's own, which it gathers in the forward pass."""

    def _cut(self, parameter: Any) -> tuple[tuple[int, ...], int]:
        return tuple(parameter.ds_shape), parameter.ds_tensor.numel()

    def _local_slice(self, name: str) -> Tensor:
        parameter: Any = self.parameters[name]
        return parameter.ds_tensor.data.to(self.masters[0].device, torch.float32)

    @torch.no_grad()
    def write(self, offset: Vector | None = None, scale: float = 0.0) -> None:
        shard, parameters = self._displaced_shard(0, offset, scale), dict[str, Any](self.parameters)
        for name, parameter in parameters.items():
            parameter.ds_tensor.data.copy_(self._slice(name, shard))


def release_small_parameters(engine: Any, parameters: Any) -> None:
    """Under ZeRO 3, lets DeepSpeed release small language-specific parameters like large ones.

    It keeps small ('persistent') parameters whole on every rank and gathers all of them in every step: a cost that would grow
    with the number of languages that the step does not train.
    """
    own = {id(parameter) for parameter in parameters}
    persistent = engine.optimizer.persistent_parameters
    for parameter in persistent:
        if id(parameter) in own:
            parameter.ds_persist = False
    persistent[:] = [parameter for parameter in persistent if id(parameter) not in own]


def shared_space(name: str, engine: Any, parameters: Mapping[str, nn.Parameter], dims: Any, tensor_rank: int) -> Space:
    """Returns the space of the shared parameters that fits the ZeRO optimizer that DeepSpeed chose."""
    kind = type(engine.optimizer).__name__
    kinds = {"DeepSpeedZeroOptimizer_Stage3": Zero3Space, "BF16_Optimizer": Zero1Bf16Space}
    return kinds.get(kind, Zero12Space)(name, engine, parameters, dims, tensor_rank)
