"""The job's process group: data parallel x tensor parallel, in megatron's layout, over DeepSpeed's accelerator.

Ranks that share a copy of the model (tensor parallel) are neighbours; data-parallel ranks are `tensor` apart.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mlinterf_ds.errors import UserError
from mlinterf_ds.runtime.launchers import local_world, meet, rendezvous
from mlinterf_ds.runtime.output import hushed

# DeepSpeed's autotuner, which no run uses, loads MLflow: most of what importing DeepSpeed costs.
_without_mlflow = "mlflow" not in sys.modules
if _without_mlflow:
    sys.modules["mlflow"] = None  # type: ignore[assignment]
try:
    with hushed():
        import deepspeed.ops
        from deepspeed.accelerator import get_accelerator
finally:
    if _without_mlflow:
        del sys.modules["mlflow"]

# As it is imported, megatron asks for fused functions that the encoder never calls to be compiled; that loads torch's
# compiler, which is most of what this import costs.
_compile = torch.compile
torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)  # type: ignore[assignment]
try:
    from megatron.core import parallel_state
finally:
    torch.compile = _compile

ARRIVAL = datetime.timedelta(minutes=10)  # how long the first rank waits for the last to start


@dataclass(frozen=True)
class Layout:
    """The position of this rank among the ranks of the job."""

    rank: int
    world: int
    tensor: int  # ranks of a tensor-parallel group

    def __post_init__(self) -> None:
        if self.world % self.tensor:
            raise UserError(
                f"{self.world} ranks cannot be divided into tensor-parallel groups of parallel.tensor={self.tensor}: "
                f"start a multiple of {self.tensor} ranks (deepspeed --num_gpus) or change parallel.tensor"
            )

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


def is_up(network: str) -> bool:
    """Whether this network of the host is up, as Linux tells it (SIOCGIFFLAGS, IFF_UP)."""
    with socket.socket() as probe:
        told = fcntl.ioctl(probe, 0x8913, struct.pack("16s16x", network.encode()))
    return bool(struct.unpack("16xH14x", told)[0] & 1)


def use_loopback(backend: str) -> None:
    """Has ranks of one host talk over its own loopback network, so that they need not listen to others.

    UserError if gloo needs it, also of one rank, and it is down.
    """
    if not Path("/sys/class/net/lo").exists():
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if backend == "gloo" and os.environ["GLOO_SOCKET_IFNAME"] == "lo" and not is_up("lo"):
        raise UserError(
            "the loopback network, over which the ranks of one host talk, is down, as in a container without a network: "
            "`ip link set lo up` as its root"
        )


class Group:
    """All ranks of the job; this process joins them here, and `leave`s. A process without a launcher is a job of one rank.

    Several runs may share a group, one after the other, each with a tensor-parallel size of its own.
    """

    def __init__(self, tensor: int = 1, address: str | None = None, timeout: float = 10.0):
        """tensor: size of the first layout. timeout: minutes that a rank waits for the others before it gives up the job."""
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        Layout(self.rank, self.world, tensor)  # a size that does not divide the ranks is refused before they wait
        _prepare_device()
        accelerator = get_accelerator()
        backend = "gloo" if accelerator.device_name() == "cpu" else accelerator.communication_backend_name()
        if local_world() == self.world:
            use_loopback(backend)
        store = dist.PrefixStore("group", meet(address or rendezvous(), self.rank, self.world, ARRIVAL))
        limit = datetime.timedelta(minutes=timeout)
        dist.init_process_group(backend, store=store, timeout=limit, rank=self.rank, world_size=self.world)
        self._timeout = timeout  # megatron's groups have their own timeout, 30 minutes by default
        self._bare = {name: copy.copy(value) for name, value in _megatron_state().items()}  # before any group exists
        self._laid_out: dict[int, dict[str, Any]] = {}  # megatron's state by tensor-parallel size
        self._tensor = 0  # the tensor-parallel size of megatron's present state
        everyone = tuple(range(self.world))
        self._groups: dict[tuple[int, ...], Any] = {everyone: dist.group.WORLD}  # by their ranks, for all layouts
        self.layout(tensor)

    def layout(self, tensor: int) -> Layout:
        """Make megatron's groups those of this tensor-parallel size.

        The groups of other sizes are kept rather than destroyed, since each has threads that would outlive it.
        """
        layout = Layout(self.rank, self.world, tensor)
        if tensor != self._tensor:
            if self._tensor:
                self._laid_out[self._tensor] = _megatron_state()
            if tensor in self._laid_out:
                vars(parallel_state).update(self._laid_out[tensor])
            else:
                vars(parallel_state).update({name: copy.copy(value) for name, value in self._bare.items()})
                with self._one_group_for_the_same_ranks():
                    parallel_state.initialize_model_parallel(
                        tensor_model_parallel_size=tensor,
                        distributed_timeout_minutes=self._timeout,
                        create_gloo_process_groups=False,
                    )
            self._tensor = tensor
        return layout

    @contextlib.contextmanager
    def _one_group_for_the_same_ranks(self) -> Iterator[None]:
        """A context in which megatron shares groups: of the twenty that it makes, most have the same ranks.

        Every group of gloo has a thread that wakes a hundred times a second, and every one of NCCL takes memory of the device.
        """
        made = parallel_state.create_group

        def shared(ranks: list[int], **options: Any) -> Any:
            key = tuple(ranks)
            if key not in self._groups:  # all ranks ask for the same groups in the same order
                self._groups[key] = made(ranks, **options)
            return self._groups[key]

        parallel_state.create_group = shared
        try:
            yield
        finally:
            parallel_state.create_group = made

    @property
    def waits_to_leave(self) -> bool:
        """Whether `leave` waits for the other ranks: NCCL does, for those that are inside a collective too."""
        return "nccl" in str(dist.get_backend())

    def leave(self) -> None:
        """End the groups; the file at which the ranks met is removed by the last of them."""
        parallel_state.destroy_model_parallel()
        vars(parallel_state).update(self._bare)  # megatron leaves some groups behind, and the process may join anew
        dist.destroy_process_group()


def _megatron_state() -> dict[str, Any]:
    """The variables of megatron's module in which it keeps its groups."""
    return {name: value for name, value in vars(parallel_state).items() if name.startswith("_") and name.isupper()}


def _prepare_device() -> None:
    """Choose this rank's accelerator, or on a CPU its share of the cores."""
    accelerator, neighbours = get_accelerator(), local_world()
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if accelerator.device_name() == "cpu":
        wanted = os.environ.get("OMP_NUM_THREADS", "")  # set by a user or scheduler; else ranks share the cores
        cores = int(wanted) if wanted.isdigit() else len(os.sched_getaffinity(0)) // max(1, neighbours)
        torch.set_num_threads(max(1, cores))
    else:
        if local_rank >= accelerator.device_count():
            raise UserError(f"{neighbours} ranks on a host with {accelerator.device_count()} accelerators: --num_gpus")
        accelerator.set_device(local_rank)
    # DeepSpeed compiles this op at start-up, for inference alone, behind a lock file that a killed rank leaves for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class ModelParallelUnit:
    """The names under which DeepSpeed asks for megatron's groups (`deepspeed.initialize(mpu=...)`)."""

    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)


@contextlib.contextmanager
def replayed(seed: int) -> Iterator[None]:
    """Random numbers (dropout) inside are a function of `seed`; the ambient state outside is untouched."""
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
