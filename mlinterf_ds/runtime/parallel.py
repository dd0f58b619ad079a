"""Process groups: data parallel x tensor parallel, in megatron's layout, over DeepSpeed's accelerator.

Ranks that share a copy of the model (tensor parallel) are neighbours; data-parallel ranks are `tensor` apart.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mlinterf_ds.errors import UserError
from mlinterf_ds.runtime.launchers import local_world, rendezvous

# megatron's module state before any group exists
_untouched = {n: copy.copy(v) for n, v in vars(parallel_state).items() if n.startswith("_") and n.isupper()}


ARRIVAL = datetime.timedelta(minutes=10)  # that the first rank waits for the last to start


@dataclass(frozen=True)
class Layout:
    """Where this rank stands."""

    rank: int
    world: int
    tensor: int  # ranks of a tensor-parallel group

    @property
    def data(self) -> int:
        """Number of data-parallel ranks."""
        return self.world // self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor


def start(tensor: int = 1, address: str | None = None, timeout: float = 10.0) -> Layout:
    """Join the job's process group (a single process is a job of one rank) and lay out the ranks.

    timeout: minutes after which a rank that waits for the others declares the job lost.
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world % tensor:
        raise UserError(
            f"{world} ranks cannot be divided into tensor-parallel groups of parallel.tensor={tensor}: "
            f"start a multiple of {tensor} ranks (deepspeed --num_gpus) or change parallel.tensor"
        )
    neighbours = local_world()
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        wanted = os.environ.get("OMP_NUM_THREADS", "")  # a user's or scheduler's word; else ranks share the cores
        cores = int(wanted) if wanted.isdigit() else len(os.sched_getaffinity(0)) // max(1, neighbours)
        torch.set_num_threads(max(1, cores))
    else:
        if local_rank >= accelerator.device_count():
            raise UserError(f"{neighbours} ranks on a host with {accelerator.device_count()} accelerators: --num_gpus")
        accelerator.set_device(local_rank)
    # DeepSpeed compiles this op at start-up, for inference alone, behind a lock file that a killed rank leaves for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if parallel_state.model_parallel_is_initialized():  # this process has joined before
        return relayout(tensor)
    if neighbours == world and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks of one host need not listen to others
    if not dist.is_initialized():
        backend = "gloo" if accelerator.device_name() == "cpu" else accelerator.communication_backend_name()
        address = address or rendezvous()
        store = _meet(address, rank, world)
        limit = datetime.timedelta(minutes=timeout)
        dist.init_process_group(backend, store=store, timeout=limit, rank=rank, world_size=world)
        _limits["distributed_timeout_minutes"] = timeout
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, **_limits)
    return Layout(rank, world, tensor)


def _meet(address: str, rank: int, world: int) -> dist.Store:
    """The ranks' common store, when all have come: on slow storage some start minutes later than others."""
    store, _, _ = next(iter(dist.rendezvous(address, rank, world, timeout=ARRIVAL)))
    store.set(f"arrived/{rank}", "")
    store.wait([f"arrived/{other}" for other in range(world)], ARRIVAL)
    return dist.PrefixStore("group", store)


def current(tensor: int) -> Layout:
    """The layout of the running job."""
    return Layout(dist.get_rank(), dist.get_world_size(), tensor)


_limits: dict[str, Any] = {}  # megatron's groups have a timeout of their own, by default 30 minutes
_layouts: dict[int, dict[str, Any]] = {}  # megatron's groups by tensor-parallel size


def relayout(tensor: int) -> Layout:
    """Other tensor-parallel groups over the same ranks (one process serves several models, in tests).

    Groups are kept, not destroyed: each has threads that would outlive it.
    """
    now = parallel_state.get_tensor_model_parallel_world_size()
    if now != tensor:
        known = [name for name in vars(parallel_state) if name.startswith("_") and name.isupper()]
        _layouts[now] = {name: getattr(parallel_state, name) for name in known}
        if tensor in _layouts:
            for name, value in _layouts[tensor].items():
                setattr(parallel_state, name, value)
        else:
            for name in known:
                setattr(parallel_state, name, _untouched[name])
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, **_limits)
    return current(tensor)


_staying = False  # inside `together`


@contextlib.contextmanager
def together(tensor: int = 1) -> Iterator[Layout]:
    """Several runs inside share one process group: starting one costs no rendezvous, and none ends the group."""
    global _staying
    layout = start(tensor)
    _staying = True
    try:
        yield layout
    finally:
        _staying = False
        stop()


def stop() -> None:
    """Leave the groups; the file at which the ranks met is removed by its last user."""
    if _staying:
        return
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class ModelParallelUnit:
    """The names under which DeepSpeed asks for megatron's groups (`deepspeed.initialize(mpu=...)`)."""

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    def get_data_parallel_world_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group()


@contextlib.contextmanager
def replayed(seed: int) -> Iterator[None]:
    """Random numbers (dropout) inside are a function of `seed`; the ambient state outside is untouched."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    on_device = accelerator.device_name() != "cpu"
    ambient = torch.get_rng_state(), accelerator.get_rng_state() if on_device else None
    torch.default_generator.manual_seed(seed)
    if on_device:
        accelerator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(ambient[0])
        if on_device:
            accelerator.set_rng_state(ambient[1])
