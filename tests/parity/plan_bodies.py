"""What a rank really holds and sends in a step: tensors counted by storage, collectives by what enters them."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.meta_step import MetaStep
from mlinterf_ds.model.encoder import SHARED
from tests.parity import bodies

Storages = dict[int, int]  # address -> bytes


def storages(tensors: Any) -> Storages:
    """The distinct storages of these tensors."""
    sizes: Storages = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if storage.nbytes():
                sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


def tensors_alive() -> list[torch.Tensor]:
    gc.collect()
    return [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]


COLLECTIVES = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}


class Traffic(TorchDispatchMode):
    """Bytes that enter collectives, by (group size, collective)."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[int, str]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.partition("::")[2]
            flat = [x for a in args for x in (a if isinstance(a, list) else [a]) if isinstance(x, torch.Tensor)]
            group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type()))
            size = max(
                tensor.nbytes for tensor in flat
            )  # the whole tensor: input of a reduction, output of a gathering
            self.bytes[torch.distributed.ProcessGroup.unbox(group).size(), COLLECTIVES.get(name, name)] += size
        return function(*args, **(kwargs or {}))


def measure(
    settings: list[str], json_name: str, tensor: int, languages: tuple[str, ...], bucket: int | None = None
) -> dict[str, Any]:
    """A second step (a first one makes lazily made buffers) under observation; this rank's figures.

    "vectors": what is alive beside weights, masters and moments at the end of a pass, at most: gradients, the meta step's.
    """
    if json_name != "zero3":  # DeepSpeed's ZeRO 3 replaces it for good in a process where it ran
        torch.nn.functional.linear = torch._C._nn.linear
    leavings = tensors_alive()  # of other tests: held here, so that their memory is not used again meanwhile
    engine, stream, config = bodies.make(settings, json_name, tensor, languages, bucket)
    meta = MetaStep(engine, config.meta) if config.variant.startswith("meta_") else None

    def step(until: int) -> None:
        if meta:
            bodies.advance_meta(engine, stream, config, meta, until)
        else:
            bodies.advance(engine, stream, config, until)

    step(1)
    between_steps = held(engine)
    inner, vectors, saved = engine.accumulate, [0], [0]

    def beside(tensors: Any) -> int:
        """Bytes of these beside what is held between steps; asked now, as a meta step renews what is held."""
        kept = storages(leavings) | storages(all_held(engine))
        return sum(size for at, size in storages(tensors).items() if at not in kept)

    packed: list[weakref.ref[torch.Tensor]] = []

    def pack(item: torch.Tensor) -> torch.Tensor:
        if not isinstance(item, torch.nn.Parameter):
            packed.append(weakref.ref(item))  # a parameter under ZeRO 3 saves itself, not what is gathered for it
        return item

    def forward_ends(*_: Any) -> None:
        """What the graph holds now: what ended with a branch that leads nowhere does not count."""
        saved[0] = max(saved[0], beside(reference() for reference in packed))
        packed.clear()

    engine.model.register_forward_hook(forward_ends)

    def watched(batches: Any, spaces: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item):
            sums = inner(batches, spaces)
        vectors[0] = max(vectors[0], beside(tensors_alive()))
        return sums

    reduced = engine._reduce

    def reducing(*arguments: Any) -> Any:
        vectors[0] = max(vectors[0], beside(tensors_alive()))
        return reduced(*arguments)

    engine.accumulate, engine._reduce = watched, reducing  # type: ignore[method-assign]
    with Traffic() as traffic:
        step(2)
    return between_steps | {"activations": saved[0], "vectors": vectors[0], "traffic": dict(traffic.bytes)}


def all_held(engine: Engine) -> list[torch.Tensor]:
    """Weights, masters and moments."""
    tensors: list[torch.Tensor] = []
    for name, space in engine.spaces.items():
        for master in space.masters:
            tensors += [master, *engine.optimizers[name].state[master].values()]
        tensors += weights(space)
    return tensors


def weights(space: Any) -> list[torch.Tensor]:
    tensors = []
    for parameter in space.parameters.values():
        tensors += [parameter.data, parameter.ds_tensor.data] if hasattr(parameter, "ds_tensor") else [parameter.data]
    return tensors


def held(engine: Engine) -> dict[str, float]:
    """Bytes by kind between steps."""
    sizes: dict[str, float] = {}
    own = [space for name, space in engine.spaces.items() if name != SHARED]
    shared = engine.spaces[SHARED]

    def states(name: str) -> list[torch.Tensor]:
        return [t for m in engine.spaces[name].masters for t in (m, *engine.optimizers[name].state[m].values())]

    sizes["weights"] = sum(storages(weights(shared)).values())
    sizes["optimizer"] = sum(storages(states(SHARED)).values())
    sizes["adapters"] = sum(storages(t for s in own for t in weights(s)).values())
    sizes["adapters"] += sum(storages(t for n in engine.spaces if n != SHARED for t in states(n)).values())
    return sizes


def elements(settings: list[str], tensor: int, languages: tuple[str, ...]) -> tuple[int, int]:
    """(shared, one language's) elements of this rank's encoder."""
    engine, _, _ = bodies.make(settings, "zero0", tensor, languages)
    shared, own, *_ = engine.model.parameter_groups().values()
    return sum(p.numel() for p in shared.values()), sum(p.numel() for p in own.values())


def _attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Two products (rows, heads, length, channels) x (rows, heads, channels, length): scores, and the mix of values."""
    rows, heads, length, channels = query
    return 2 * 2 * rows * heads * length * key[2] * channels


aten = torch.ops.aten
FUSED = {  # torch's own table lacks the CPU's; a backward pass is twice the forward one, what is computed again not counted
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, *shapes, **kinds: 2 * _attention(*shapes),
}


def flops(settings: list[str], languages: tuple[str, ...]) -> float:
    """Counted by torch as they are dispatched, of an average step after the first ones (a meta run's first seeks a radius)."""
    torch.nn.functional.linear = torch._C._nn.linear  # see `measure`
    engine, stream, config = bodies.make([*settings, "meta.check_every=0"], "zero0", 1, languages)
    meta = MetaStep(engine, config.meta) if config.variant.startswith("meta_") else None

    def advance(until: int) -> None:
        if meta:
            bodies.advance_meta(engine, stream, config, meta, until)
        else:
            bodies.advance(engine, stream, config, until)

    every = config.meta.every
    advance(every)
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counted:
        advance(2 * every)
    return counted.get_total_flops() / every
