"""Parameters as DeepSpeed keeps them (ZeRO 1 to 3, offload): the one file that touches DeepSpeed's internals.

DeepSpeed partitions the shared parameters, gathers weights and reduces gradients; a `Space` (`engine/space.py`) shows this
rank's share. Under ZeRO 3 it partitions the languages' own parameters too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlinterf_ds.engine.space import Segment, ShardedSpace, Space, Vector
from mlinterf_ds.model.encoder import SHARED

Extent = tuple[tuple[int, ...], int, int, int, int]  # shape, start, length, shard and offset of a Segment


class SharedSpace(Space):
    """The shared parameters, of which DeepSpeed's ZeRO optimizer holds this rank's masters and gradients."""

    def __init__(self, engine: Any, parameters: Mapping[str, nn.Parameter], dims: Mapping[str, Any], tensor_rank: int):
        super().__init__(SHARED, parameters)
        self.zero = engine.optimizer
        names = {id(parameter): name for name, parameter in parameters.items()}
        for parameter, extent in self._adopt():
            name = names[id(parameter)]
            self.segments.append(Segment(name, *extent, dims[name]))
        self._count(tensor_rank)

    def _adopt(self) -> Iterator[tuple[nn.Parameter, Extent]]:
        """Makes DeepSpeed's shards the masters; yields every parameter of which a part lies there, and where."""
        raise NotImplementedError


class Zero12Space(SharedSpace):
    """ZeRO 1 and 2: one flat group, partitioned over data-parallel ranks."""

    def _adopt(self) -> Iterator[tuple[nn.Parameter, Extent]]:
        members, self._flat, self._partitions, master = self._parts()
        assert len(members) == 1, "one group: languages are kept elsewhere"
        self.masters = [master.detach().requires_grad_()]  # DeepSpeed's `.grad` stays its own (offload's buffer)
        self.index = dist.get_rank(self.zero.real_dp_process_group[0])
        low, high, position = self.index * master.numel(), (self.index + 1) * master.numel(), 0
        for parameter in members[0]:
            begin, end = max(position, low), min(position + parameter.numel(), high)
            if begin < end:
                yield parameter, (tuple(parameter.shape), begin - position, end - begin, 0, begin - low)
            position += parameter.numel()

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
    def write(self, offset: Vector | None = None, scale: float | Tensor = 0.0) -> None:
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


class Zero3Space(SharedSpace):
    """ZeRO 3: sub-groups of per-parameter partitions."""

    def _adopt(self) -> Iterator[tuple[nn.Parameter, Extent]]:
        zero = self.zero
        self.offloaded, index = bool(zero.offload_optimizer), dist.get_rank(zero.dp_process_group)
        for shard, members in enumerate(zero.fp16_groups):
            master = zero.fp32_partitioned_groups_flat[shard].detach()
            if master.data_ptr() == zero.fp16_partitioned_groups_flat[shard].data_ptr():
                master = master.clone()  # fp32: the working copy must be able to move alone
            self.masters.append(master.requires_grad_())
            offset = 0
            for parameter in members:
                width, numel = parameter.partition_numel(), parameter.ds_numel
                start = min(numel, index * width)
                yield parameter, (tuple(parameter.ds_shape), start, min(width, numel - start), shard, offset)
                offset += width

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
        for number, segment in enumerate(self.segments):  # DeepSpeed leaves the padding after a parameter unset
            following = self.segments[number + 1 : number + 2]
            last = following[0].offset if following and following[0].shard == segment.shard else None
            gradient[segment.shard][segment.offset + segment.length : last].zero_()
        zero.averaged_gradients = {}
        zero.zero_grad(set_to_none=True)
        if self.offloaded:
            zero.reset_cpu_buffers()
        zero._pre_step()  # the next backward starts a new sum
        return gradient

    @torch.no_grad()
    def write(self, offset: Vector | None = None, scale: float | Tensor = 0.0) -> None:
        zero = self.zero
        zero._partition_all_parameters()
        for shard in range(len(self.masters)):
            zero.fp16_partitioned_groups_flat[shard].data.copy_(self._displaced_shard(shard, offset, scale))
            zero._unflatten_partitioned_parameters(shard)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


class Zero3ShardedSpace(ShardedSpace):
    """A language's parameters under ZeRO 3: the slices are DeepSpeed's own, which it gathers in the forward pass."""

    def _cut(self, parameter: Any) -> tuple[tuple[int, ...], int]:
        return tuple(parameter.ds_shape), parameter.ds_tensor.numel()

    def _local_slice(self, name: str) -> Tensor:
        parameter: Any = self.parameters[name]
        return parameter.ds_tensor.data.to(self.masters[0].device, torch.float32)

    @torch.no_grad()
    def write(self, offset: Vector | None = None, scale: float | Tensor = 0.0) -> None:
        from deepspeed.accelerator import get_accelerator

        shard, parameters = self._displaced_shard(0, offset, scale), dict[str, Any](self.parameters)
        for name, parameter in parameters.items():
            parameter.ds_tensor.data.copy_(self._slice(name, shard))
        accelerator = get_accelerator()
        if not accelerator.resolves_data_dependency():  # DeepSpeed gathers on a stream that waits for no other
            accelerator.current_stream().synchronize()


def release_small_parameters(engine: Any, groups: Mapping[str, Mapping[str, Any]]) -> None:
    """Under ZeRO 3, lets DeepSpeed release small language-specific parameters like large ones.

    It keeps small ('persistent') parameters whole on every rank and gathers all of them in every step, which would cost more
    with every language, though the step does not train it.
    """
    shared = {id(parameter) for parameter in groups[SHARED].values()}
    persistent = engine.optimizer.persistent_parameters
    for parameter in persistent:
        parameter.ds_persist = id(parameter) in shared
    persistent[:] = [parameter for parameter in persistent if parameter.ds_persist]


def shared_space(engine: Any, *arguments: Any) -> SharedSpace:
    """The space of the shared parameters (see `SharedSpace`) that fits the ZeRO optimizer that DeepSpeed chose."""
    kinds = {"DeepSpeedZeroOptimizer_Stage3": Zero3Space, "BF16_Optimizer": Zero1Bf16Space}
    return kinds.get(type(engine.optimizer).__name__, Zero12Space)(engine, *arguments)
