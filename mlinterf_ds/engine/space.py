"""Parameter groups as flat fp32 shards: the step's mathematics works on these and sees neither ZeRO nor tensor parallelism.

A `Space` is one parameter group (the shared parameters, or one language's) seen as this rank's share of the fp32
master weights. DeepSpeed keeps the *shared* parameters (`engine/zero.py`). A *language's* parameters are kept here, sharded in
the same way, because DeepSpeed visits all of its groups in every step: with a group for each of 100 languages a step took
two to three times as long.

Legend: shard = 1-d fp32 tensor; Vector = list of shards, one for each of the space's masters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

Vector = list[Tensor]
BUCKET = 1 << 22  # elements reduced or gathered at once
ALIGNMENT = 64  # elements: parameters begin at multiples of it in a flat buffer, where products read them at full speed
MOST = 1 << 30  # elements of one dot product: CUDA's takes fewer than 2**31
LARGE = 1 << 26  # elements from which a CPU's fp32 gradient is handed over, not copied: its memory then counts for more


@dataclass(frozen=True)
class Segment:
    """`length` elements of parameter `name`, from element `start` on, lie at `offset` of master `shard`."""

    name: str
    shape: tuple[int, ...]  # the shape of this tensor-parallel rank's part of the parameter
    start: int
    length: int
    shard: int
    offset: int
    partition_dim: int | None  # dimension split over tensor-parallel ranks; None: every rank has a replica


class Placement(NamedTuple):
    """How this rank holds the parameters that are kept here."""

    dims: Mapping[str, int | None]  # the dimension along which tensor-parallel ranks split each parameter; None: none
    tensor_rank: int
    group: dist.ProcessGroup | None  # of the data-parallel ranks
    device: torch.device  # where the masters lie


class Space:
    """One parameter group as flat fp32 shards, hiding ZeRO and tensor parallelism (a `meta.bilevel.ParameterSpace`)."""

    counted: list[Segment]  # what this rank adds to sums over all ranks, so that replicas count once
    _counted: list[tuple[int, int, int]]  # `counted` as (shard, begin, end), neighbours joined

    def __init__(self, name: str, parameters: Mapping[str, nn.Parameter]):
        self.name = name  # the group's name: `SHARED`, a language's code, ...
        self.parameters = dict(parameters)
        self.masters: Vector = []
        self.segments: list[Segment] = []

    @property
    def parts(self) -> Sequence[Space]:
        """The groups that this one is made of."""
        return [self]

    def apart(self, vector: Vector) -> Iterator[tuple[Space, Vector]]:
        """Each of the parts with its part of a vector."""
        shards = iter(vector)
        for part in self.parts:
            yield part, [next(shards) for _ in part.masters]

    def gradient(self) -> Vector:
        """This rank's shards (fp32) of the gradients since the last call, averaged over the data-parallel ranks."""
        raise NotImplementedError

    def absorb(self) -> None:
        """Adds the gradients of one micro-batch, unless it is the last, to the sum that `gradient` returns."""

    def write(self, offset: Vector | None = None, scale: float | Tensor = 0.0) -> None:
        """Working weights := cast(master + scale * offset); the masters never move."""
        raise NotImplementedError

    @contextmanager
    def displaced(self, offset: Vector, scale: float | Tensor) -> Iterator[None]:
        """Working weights at master + scale * offset inside, at the master (exactly) after."""
        self.write(offset, scale)
        try:
            yield
        finally:
            self.write()

    def dot(self, left: Vector, right: Vector) -> Tensor:
        """<left, right> over all ranks, replicas counted once; a scalar on the device of the working weights, for which the
        host does not wait unless the masters are offloaded."""
        total = self.share_of_dot(left, right).to(self.device)
        if dist.get_world_size() > 1:
            total = total.to(torch.float64)
            dist.all_reduce(total)
        return total

    def weights_norm(self) -> Tensor:
        """Norm of the masters over all ranks, replicas counted once: a scalar."""
        with torch.no_grad():
            return self.dot(self.masters, self.masters).sqrt()

    @property
    def device(self) -> torch.device:
        """The device of the working weights. Masters may be offloaded to a device without collectives."""
        return next(iter(self.parameters.values())).device

    def share_of_dot(self, left: Vector, right: Vector) -> Tensor:
        """This rank's summand of <left, right> (fp32 or float64), on the masters' device."""
        if self._counted == [(0, 0, len(left[0]))] and len(left[0]) <= MOST:
            return torch.dot(left[0], right[0])
        parts = [
            torch.dot(left[shard][first : min(first + MOST, end)], right[shard][first : min(first + MOST, end)])
            for shard, begin, end in self._counted
            for first in range(begin, end, MOST)
        ]
        return torch.stack(parts or [torch.zeros((), device=left[0].device)]).sum(dtype=torch.float64)

    def _count(self, tensor_rank: int, whole: bool = True) -> None:
        """Decides which elements of the shards this rank contributes to a sum over all ranks."""
        runs: list[tuple[int, int, int]] = []
        self.counted = [s for s in self.segments if whole and (s.partition_dim is not None or tensor_rank == 0)]
        for segment in self.counted:
            end = segment.offset + segment.length
            if runs and runs[-1][0] == segment.shard and runs[-1][2] == segment.offset:
                runs[-1] = (segment.shard, runs[-1][1], end)
            else:
                runs.append((segment.shard, segment.offset, end))
        self._counted = runs

    def require_grad(self, flag: bool) -> None:
        """Switches the computation of this group's gradients on or off."""
        if next(iter(self.parameters.values())).requires_grad != flag:  # they change together
            for parameter in self.parameters.values():
                parameter.requires_grad_(flag)

    def _displaced_shard(self, index: int, offset: Vector | None, scale: float | Tensor) -> Tensor:
        master = self.masters[index]  # every caller runs without gradients
        if offset is None:
            return master
        if isinstance(scale, Tensor):
            return torch.addcmul(master, offset[index], scale.to(master))
        return torch.add(master, offset[index], alpha=scale)


class JoinedSpace(Space):
    """Several groups as one that a step moves as a whole: its vectors are theirs, one after the other."""

    def __init__(self, parts: Sequence[Space]):
        super().__init__(", ".join(part.name for part in parts), {})
        self._parts = parts
        self.masters = [master for part in parts for master in part.masters]

    @property
    def parts(self) -> Sequence[Space]:
        return self._parts

    @property
    def device(self) -> torch.device:
        return self._parts[0].device

    def share_of_dot(self, left: Vector, right: Vector) -> Tensor:
        pairs = zip(self.apart(left), self.apart(right), strict=True)
        return torch.stack([part.share_of_dot(own, other) for (part, own), (_, other) in pairs]).sum()

    def gradient(self) -> Vector:
        return [shard for part in self._parts for shard in part.gradient()]

    def write(self, offset: Vector | None = None, scale: float | Tensor = 0.0) -> None:
        assert offset is None, "only the shared parameters are displaced"
        for part in self._parts:
            part.write()


class FlatSpace(Space):
    """A group that every data-parallel rank holds whole (ZeRO 0), in one flat buffer each for working weights, gradients
    and masters, so that the number of launches in a step does not grow with the number of parameters."""

    partitions = 1

    def __init__(self, name: str, parameters: Mapping[str, nn.Parameter], at: Placement):
        super().__init__(name, parameters)
        self.group, self.ranks = at.group, dist.get_world_size(at.group)
        position = 0
        for key, parameter in self.parameters.items():
            shape = tuple(parameter.shape)
            self.segments.append(Segment(key, shape, 0, parameter.numel(), 0, position, at.dims[key]))
            position += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        some = next(iter(self.parameters.values()))
        self.working = torch.zeros(position, dtype=some.dtype, device=some.device)
        for parameter, view in self._views(self.working):
            view.copy_(parameter.detach())
        self.read_from(self.working)
        self.masters = [self.working.to(at.device, torch.float32, copy=True).requires_grad_()]
        whole = dist.get_rank(at.group) == 0
        self._count(at.tensor_rank, whole)
        if whole and len(self.counted) == len(self.segments):
            self._counted = [(0, 0, position)]  # the padding between parameters is zero
        # whether `gradient` gives away the buffer itself, into which all micro-batches added theirs
        self.hands_over = (
            position >= LARGE and some.dtype is torch.float32 and some.device.type == at.device.type == "cpu"
        )
        self.arriving: Tensor | None = None  # the flat buffer into which a backward pass adds its gradients
        self.lasting = False  # whether the buffer is kept during passes that do not train the group
        self._borrowed = False
        self._sum: Tensor | None = None  # the gradients of the micro-batches before, fp32

    def _views(self, flat: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every parameter with its part of a flat buffer."""
        for segment in self.segments:
            part = flat[segment.offset : segment.offset + segment.length]
            yield self.parameters[segment.name], part.view(segment.shape)

    def read_from(self, flat: Tensor) -> None:
        """Makes the model read this group's weights from a flat buffer."""
        for parameter, view in self._views(flat):
            parameter.data = view

    def require_grad(self, flag: bool) -> None:
        super().require_grad(flag)
        if flag and self.arriving is None:
            self.receive_in(torch.zeros_like(self.working))
        elif not flag and not self.lasting:
            self.receive_in(None)

    def receive_in(self, arriving: Tensor | None) -> None:
        """Makes backward passes add this group's gradients into this flat buffer of zeros; None takes the buffer away."""
        if arriving is None and self.arriving is None:
            return
        self.arriving = arriving
        if arriving is None:
            for parameter in self.parameters.values():
                parameter.grad = None
        else:
            for parameter, view in self._views(arriving):
                parameter.grad = view
                parameter.collects = self.hands_over  # type: ignore[attr-defined]  # see `model.encoder.collects`

    def borrow(self, arriving: Tensor) -> None:
        """Takes the gradient of one pass from a flat buffer of a graph, into which its replay has added it."""
        self.receive_in(None)  # else the parameters would keep the buffer of an eager pass
        self.arriving, self._borrowed = arriving, True

    def absorb(self) -> None:
        assert self.arriving is not None
        if self.hands_over:
            return
        if self._sum is None:
            self._sum = self.arriving.to(torch.float32, copy=True)
        else:
            self._sum.add_(self.arriving)
        self.arriving.zero_()
        if self._borrowed:
            self.arriving, self._borrowed = None, False

    def gradient(self) -> Vector:
        if self.arriving is not None:
            self.absorb()
        gradient, self._sum = self._sum, None
        if self.hands_over:
            gradient = self.arriving
            self.receive_in(None)
        if gradient is None:
            return [torch.zeros_like(self.masters[0], requires_grad=False)]
        if self.ranks > 1:
            dist.all_reduce(gradient, group=self.group)
            gradient.div_(self.ranks)
        return [gradient.to(self.masters[0].device)]

    @torch.no_grad()
    def write(self, offset: Vector | None = None, scale: float | Tensor = 0.0) -> None:
        master = self.masters[0]
        if offset is None:
            self.working.copy_(master)
        elif isinstance(scale, Tensor):
            torch.addcmul(master, offset[0], scale.to(master), out=self.working)
        else:
            torch.add(master, offset[0], alpha=scale, out=self.working)


class ShardedSpace(Space):
    """A group sharded here: every parameter is cut into equal slices (padded), one for each data-parallel rank.

    Gradients are reduced bucket by bucket as they arrive, and dropped.
    """

    def __init__(self, name: str, parameters: Mapping[str, nn.Parameter], at: Placement):
        super().__init__(name, parameters)
        self.group = at.group
        self.partitions, self.index = dist.get_world_size(at.group), dist.get_rank(at.group)
        self._slots: dict[str, tuple[int, int, int]] = {}  # name -> (position in the shard, width of a slice, elements)
        self._buckets: list[list[str]] = [[]]
        position = filled = 0
        for key, parameter in reversed(self.parameters.items()):  # gradients arrive from the top of the model down
            shape, width = self._cut(parameter)
            numel = math.prod(shape)
            start = min(numel, self.index * width)
            self.segments.append(Segment(key, shape, start, min(width, numel - start), 0, position, at.dims[key]))
            self._slots[key] = (position, width, numel)
            if filled and filled + numel > BUCKET:
                self._buckets.append([])
                filled = 0
            self._buckets[-1].append(key)
            filled += numel
            position += width
        self.masters = [torch.zeros(position, dtype=torch.float32, device=at.device).requires_grad_()]
        self._count(at.tensor_rank)
        self._gradient: Tensor | None = None
        self._arrived: list[dict[str, Tensor]] = [{} for _ in self._buckets]
        for number, bucket in enumerate(self._buckets):
            for key in bucket:
                self.parameters[key].requires_grad_(True)
                self.parameters[key].register_post_accumulate_grad_hook(partial(self._receive, number, key))
                self._slice(key, self.masters[0].detach()).copy_(self._local_slice(key))

    def _cut(self, parameter: nn.Parameter) -> tuple[tuple[int, ...], int]:
        """(shape of the whole parameter, elements of a rank's slice)."""
        return tuple(parameter.shape), -(-parameter.numel() // self.partitions)

    def _slice(self, name: str, flat: Tensor) -> Tensor:
        position, width, _ = self._slots[name]
        return flat[position : position + width]

    def _extent(self, bucket: list[str]) -> tuple[int, int]:
        """(the first element, the number of elements) of a bucket in the shard."""
        return self._slots[bucket[0]][0], sum(self._slots[name][1] for name in bucket)

    def _local_slice(self, name: str) -> Tensor:
        """This rank's slice of a parameter's working weights, fp32."""
        _, width, numel = self._slots[name]
        padded = nn.functional.pad(self.parameters[name].detach().reshape(-1), (0, width * self.partitions - numel))
        return padded[self.index * width : (self.index + 1) * width].float()

    def _receive(self, number: int, name: str, parameter: Tensor) -> None:
        """Takes over the gradient of a parameter of bucket `number`."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self._arrived[number][name] = gradient
        if len(self._arrived[number]) == len(self._buckets[number]):
            self._reduce(number)

    def _reduce(self, number: int) -> None:
        """Averages a bucket over the data-parallel ranks, keeps this rank's slices and drops the rest."""
        arrived, self._arrived[number] = self._arrived[number], {}
        first, width = self._extent(self._buckets[number])
        full = torch.zeros(self.partitions, width, dtype=torch.float32, device=self.device)
        for name, gradient in arrived.items():
            position, step, numel = self._slots[name]
            flat = gradient.reshape(-1).to(torch.float32)
            if step * self.partitions != numel:
                flat = nn.functional.pad(flat, (0, step * self.partitions - numel))
            full[:, position - first : position - first + step] = flat.view(self.partitions, step)
        local = torch.empty(width, dtype=torch.float32, device=self.device)
        dist.reduce_scatter_tensor(local, full.view(-1), group=self.group)
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.masters[0], requires_grad=False)
        self._gradient[first : first + width] += local.div_(self.partitions).to(self._gradient.device)

    def gradient(self) -> Vector:
        for number, arrived in enumerate(self._arrived):
            if arrived:  # a parameter without a gradient kept its bucket open
                self._reduce(number)
        gradient, self._gradient = self._gradient, None
        return [torch.zeros_like(self.masters[0], requires_grad=False) if gradient is None else gradient]

    @torch.no_grad()
    def write(self, offset: Vector | None = None, scale: float | Tensor = 0.0) -> None:
        shard = self._displaced_shard(0, offset, scale)
        some = next(iter(self.parameters.values()))
        for names in self._buckets:
            first, width = self._extent(names)
            local = shard[first : first + width].to(some.device, some.dtype)
            full = torch.empty(self.partitions, width, dtype=some.dtype, device=some.device)
            dist.all_gather_into_tensor(full.view(-1), local, group=self.group)
            for name in names:
                position, step, numel = self._slots[name]
                whole = full[:, position - first : position - first + step].reshape(-1)[:numel]
                self.parameters[name].data.copy_(whole.view(self.parameters[name].shape))


class NewRows:
    """This rank's elements of the shared space that belong to the vocabulary's pieces from number `old` on.

    They are trained even where the shared parameters are frozen, because no model has trained them before.
    """

    ROWS = ("embeddings.word.weight", "head.bias")  # parameters with a row for each piece

    def __init__(self, space: Space, old: int, tensor_rank: int):
        self.masks = [torch.zeros_like(master, dtype=torch.bool) for master in space.masters]
        for segment in space.segments:
            if segment.name in self.ROWS:
                rows = segment.shape[0]
                element = torch.arange(segment.start, segment.start + segment.length)
                piece = tensor_rank * rows + element // (math.prod(segment.shape) // rows)
                mask = self.masks[segment.shard]
                mask[segment.offset : segment.offset + segment.length] = (piece >= old).to(mask.device)

    def only(self, gradient: Vector) -> Vector:
        """The gradient of the new rows, 0 elsewhere."""
        return [shard * mask for shard, mask in zip(gradient, self.masks, strict=True)]

    @contextmanager
    def alone_change(self, masters: Vector) -> Iterator[None]:
        """A context after which all other rows are restored, bit for bit: weight decay also moves rows without a gradient."""
        before = [master.detach().clone() for master in masters]
        yield
        with torch.no_grad():
            for master, old, mask in zip(masters, before, self.masks, strict=True):
                master.copy_(torch.where(mask, master, old))
