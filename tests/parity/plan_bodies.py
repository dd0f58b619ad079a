"""Measures what a rank holds and sends in a step: tensors by their storage, collectives by the tensors that enter them."""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.model.encoder import SHARED
from tests.parity import bodies

Storages = dict[int, int]  # address -> bytes
GLANCES = 4


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
    """Counts the bytes that enter collectives, by group size and collective."""

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
            )  # of the whole tensor: a reduction's input, a gathering's output
            self.bytes[torch.distributed.ProcessGroup.unbox(group).size(), COLLECTIVES.get(name, name)] += size
        return function(*args, **(kwargs or {}))


@contextmanager
def unseen_leavings() -> Iterator[None]:
    """A context in which `tensors_alive` sees only what is made inside; looking at all other objects takes half a second."""
    leavings = tensors_alive()  # of earlier tests; this reference keeps their memory from being used again
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        del leavings


@unseen_leavings()
def measure(
    settings: list[str], json_name: str, tensor: int, languages: tuple[str, ...], bucket: int | None = None
) -> dict[str, Any]:
    """Observes the second step of an engine, as the first one still allocates buffers; returns bytes of this rank by kind.

    "vectors" is the most that is alive at the end of a pass beside weights, masters and moments: gradients, and the vectors
    of a meta step.
    """
    if json_name != "zero3":  # a process in which DeepSpeed's ZeRO 3 ran keeps its replacement
        torch.nn.functional.linear = torch._C._nn.linear
    engine, stream, config = bodies.make(settings, json_name, tensor, languages, bucket)
    meta = bodies.meta_step(engine, config, stream)

    bodies.advance(engine, stream, config, 1, meta)
    sizes = held(engine)
    inner, vectors, saved = engine.accumulate, [0], [0]

    def beside(tensors: Any) -> int:
        """Bytes of these tensors beside those held between steps, which a meta step replaces: ask for them at each call."""
        kept = storages(all_held(engine))
        return sum(size for at, size in storages(tensors).items() if at not in kept)

    def look() -> None:
        """Keeps the most that was alive at any look. The thread of a collective lets go of its tensor a moment after the wait for it
        has ended, on a busy machine some milliseconds: the least of several glances is what the step itself holds."""
        least = beside(tensors_alive())
        for _ in range(GLANCES):
            time.sleep(0.02)
            least = min(least, beside(tensors_alive()))
        vectors[0] = max(vectors[0], least)

    packed: list[weakref.ref[torch.Tensor]] = []

    def pack(item: torch.Tensor) -> torch.Tensor:
        if not isinstance(item, torch.nn.Parameter):
            packed.append(weakref.ref(item))  # under ZeRO 3 a parameter saves itself, not its gathered value
        return item

    def forward_ends(*_: Any) -> None:
        """Measures what the graph holds now; tensors of branches that lead nowhere are gone already."""
        saved[0] = max(saved[0], beside(reference() for reference in packed))
        packed.clear()

    engine.model.register_forward_hook(forward_ends)

    def watched(batches: Any, spaces: Any, **options: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item):
            sums = inner(batches, spaces, **options)
        look()
        return sums

    reduced = engine.reduced

    def reducing(*arguments: Any) -> Any:
        look()
        return reduced(*arguments)

    engine.accumulate, engine.reduced = watched, reducing  # type: ignore[method-assign]
    with Traffic() as traffic:
        bodies.advance(engine, stream, config, 2, meta)
    return sizes | {"activations": saved[0], "vectors": vectors[0], "traffic": dict(traffic.bytes)}


def all_held(engine: Engine) -> list[torch.Tensor]:
    """The tensors of weights, masters and moments."""
    tensors: list[torch.Tensor] = []
    for name, space in engine.spaces.items():
        for master in space.masters:
            tensors += [master, *engine.optimizers[name].state[master].values()]
        tensors += weights(space)
    return tensors


def weights(space: Any) -> list[torch.Tensor]:
    """The tensors of a space's weights, this rank's parts under ZeRO 3 included."""
    tensors = []
    for parameter in space.parameters.values():
        tensors += [parameter.data, parameter.ds_tensor.data] if hasattr(parameter, "ds_tensor") else [parameter.data]
    return tensors


def held(engine: Engine) -> dict[str, float]:
    """Bytes that this rank holds between steps, by kind."""
    own = [space for name, space in engine.spaces.items() if name != SHARED]
    shared = engine.spaces[SHARED]

    def states(name: str) -> list[torch.Tensor]:
        return [t for m in engine.spaces[name].masters for t in (m, *engine.optimizers[name].state[m].values())]

    own_states = [tensor for name in engine.spaces if name != SHARED for tensor in states(name)]
    return {
        "weights": sum(storages(weights(shared)).values()),
        "optimizer": sum(storages(states(SHARED)).values()),
        "own modules": sum(storages(t for space in own for t in weights(space)).values())
        + sum(storages(own_states).values()),
    }


def elements(settings: list[str], tensor: int, languages: tuple[str, ...]) -> tuple[int, int]:
    """The elements of this rank's encoder: of the shared parameters, and of one language's own."""
    engine, _, _ = bodies.make(settings, "zero0", tensor, languages)
    shared, *own = (sum(p.numel() for p in group.values()) for group in engine.model.parameter_groups().values())
    return shared, own[0] if own else 0


def _attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """FLOPs of the two products of attention, for the scores and for the mix of values.

    The shapes are (rows, heads, length, channels) and (rows, heads, channels, length).
    """
    rows, heads, length, channels = query
    return 2 * 2 * rows * heads * length * key[2] * channels


aten = torch.ops.aten
FUSED = {  # torch's table lacks these; a backward pass counts twice the forward one, without recomputation
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, *shapes, **kinds: 2 * _attention(*shapes),
}


def flops(settings: list[str], languages: tuple[str, ...]) -> float:
    """FLOPs of an average step, as torch counts dispatched operators; the first steps, which search a radius, do not count."""
    torch.nn.functional.linear = torch._C._nn.linear  # see `measure`
    engine, stream, config = bodies.make([*settings, "meta.check_every=0"], "zero0", 1, languages)
    meta = bodies.meta_step(engine, config, stream)

    every = config.meta.every
    bodies.advance(engine, stream, config, every, meta)
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counted:
        bodies.advance(engine, stream, config, 2 * every, meta)
    return counted.get_total_flops() / every
