"""One pass: forward and backward of one micro-batch, run by Python or replayed as a CUDA graph; how many rows of it fit.

A graph replays kernels without Python, on the same memory as when it was captured. So the batch, the weights of the one
language whose modules the rows go through, and that language's gradient are copied to and from fixed buffers, and one
graph serves all languages. Dropout is replayed by its seed. DeepSpeed's hooks are Python, so that passes over parameters
which it partitions are never captured.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mlinterf_ds.engine.space import FlatSpace, Space
from mlinterf_ds.errors import UserError, warn
from mlinterf_ds.model.encoder import SHARED, Rows
from mlinterf_ds.model.routing import Compiled, regions
from mlinterf_ds.runtime.parallel import replayed

if TYPE_CHECKING:
    from mlinterf_ds.engine.engine import Engine

WARM = 2  # passes of a kind before it is captured: by then compilers and allocators have done their work
MOST_GRAPHS = 64
MOST_KINDS = 1000  # kinds of passes whose number is remembered at a time
MOST_LANGUAGES = 16  # languages up to which passes over several of them are captured; each language has its own graph
LEAST = 4  # rows of a micro-batch; where fewer would fit, activations are recomputed first
UNTRIED = 16  # rows of a micro-batch under ZeRO 3 and tensor parallelism, where no rank can run a pass alone
ROOM = 0.9  # share of the memory that may be used; the rest is left to fragmentation and the libraries


def make_fast(engine: Engine, compiled: bool | Literal["auto"], graphs: bool | Literal["auto"], first: bool) -> None:
    """Compiles the regions of an engine's model and captures its passes, as far as device and layout allow.

    The first rank warns where the configuration says `true`, not `auto`, and it cannot be done.
    """
    reason = ""
    if engine.layout.tensor > 1 or engine.stage == 3:
        reason = "tensor parallelism and ZeRO 3 run the model uncompiled"
    else:
        engine.model.router.regions = _regions_of_all_ranks(engine, regions(compiled, engine.device, first), first)
    if reason and compiled is True and first:
        warn(f"model.compile=true: {reason}")
    if (reason := engine.passes.capture(graphs)) and graphs is True and first:
        warn(f"train.graphs=true: {reason}")


def _regions_of_all_ranks(engine: Engine, own: Compiled | None, first: bool) -> Compiled | None:
    """What compiles the regions on this rank: nothing, where a rank cannot compile.

    ZeRO 2, and our own groups of languages under any stage (`ShardedSpace`), sum up gradients in the order in which they arrive, and
    take that order to be the same on all ranks. A compiled region's gradients arrive in another order than those of its operators,
    so the ranks have to do alike. In passes over several languages
    they would not: whether one is compiled depends on the rank's own rows (`Compiled`).
    """
    able = torch.tensor(float(own is not None), device=engine.device)
    dist.all_reduce(able, op=dist.ReduceOp.MIN)
    if own and not able.item():
        if first:
            warn("model.compile: on another rank nothing can be compiled (its log says why); the model runs uncompiled")
        return None
    if own and engine.partitioned and engine.layout.data > 1:
        own.several = False
    return own


class Passes:
    """Runs the passes of an engine's model."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.graphs = False  # whether passes are captured; see `capture`
        self._seen: dict[Hashable, int] = {}
        self.captured: dict[Hashable, Captured] = {}
        # graphs share the memory of their activations, which an allocator gives again to the same stream alone
        self._pool: Any = None
        self._stream: Any = None
        self._slot: Slot | None = None  # the buffers of the language whose modules a pass uses

    def capture(self, wanted: bool | str) -> str:
        """Captures passes from now on where that is possible; returns the reason where it is not, else ''.

        wanted: False switches captures off.
        """
        engine, reason = self.engine, ""
        if engine.device.type != "cuda":
            reason = f"a {engine.device.type} device has no CUDA graphs"
        elif engine.partitioned or engine.layout.tensor > 1:
            reason = "passes over partitioned parameters and under tensor parallelism run uncaptured"
        elif engine.model.embeddings.language is not None:
            reason = "language embeddings run uncaptured"
        elif any(getattr(module, "recompute", False) for module in engine.model.modules()):
            reason = "passes that recompute activations run uncaptured, since they read the state of the random numbers"
        self.graphs = wanted is not False and not reason
        return reason

    def run(self, batch: Any, spaces: Sequence[Space], last: bool) -> Tensor:
        """Adds the gradients of a micro-batch to those of `spaces`; returns its nll (rows, masked).

        last: whether it is the last micro-batch of the step, after which DeepSpeed reduces what it partitions. Where the memory
        does not hold a capture, or the graphs beside a pass that is not captured, graphs are given up, and the pass runs again.
        """
        try:
            return self._run(batch, spaces, last)
        except RuntimeError as error:
            if not ((self.graphs or self.captured) and out_of_memory(error)):
                raise
        self._give_up_graphs(spaces)  # after the `except`, in which the error still holds the pass's tensors
        return self._run(batch, spaces, last)

    def scored(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss and nll of a batch on the device, in a pass that is not trained on; graphs are given up where it has no room
        beside them."""
        try:
            return cast(tuple[Tensor, Tensor], self.engine.model(batch))
        except RuntimeError as error:
            if not ((self.graphs or self.captured) and out_of_memory(error)):
                raise
        self._give_up_graphs([])
        return cast(tuple[Tensor, Tensor], self.engine.model(batch))

    def _run(self, batch: Any, spaces: Sequence[Space], last: bool) -> Tensor:
        engine = self.engine
        if self.graphs and (key := self._kind(batch, spaces)) is not None:
            return self._replay(key, batch, spaces)
        self.require(spaces)
        batch = batch.to(engine.device)
        factor = engine.scale.tensor * engine.layout.data
        if engine.partitioned and engine.spaces[SHARED] in spaces:
            engine.deepspeed.set_gradient_accumulation_boundary(last)
            loss, nll = engine.deepspeed(batch)
            engine.deepspeed.backward(loss * factor.to(loss.dtype), scale_wrt_gas=False)
        else:
            loss, nll = engine.model(batch)
            (loss * factor.to(loss.dtype)).backward()
        return nll

    def require(self, spaces: Sequence[Space]) -> None:
        """Has the gradients of these groups computed, and no others."""
        for space in self.engine.spaces.values():
            space.require_grad(space in spaces)

    def _kind(self, batch: Any, spaces: Sequence[Space]) -> Hashable | None:
        """A key that two passes share if one graph can serve both; None for a pass that is not captured."""
        engine, languages = self.engine, batch.step_languages
        own = [space.name for space in spaces if space.name != SHARED]
        if len(own) > 1 or not self._grouped(batch):
            return None
        if len(languages) == 1 or not engine.model.router.members:
            route: Hashable = len(own)  # any language: its weights are copied to the slot
        elif len(engine.languages) > MOST_LANGUAGES:
            return None
        else:
            route = tuple(batch.languages.tolist()), tuple(own)
        shapes = tuple((name, tuple(value.shape)) for name, value in tensors(batch).items())
        key = (shapes, route, engine.spaces[SHARED] in spaces)
        if key in self.captured:
            return key
        if len(self._seen) > MOST_KINDS:  # mixed batches may differ in every step
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        return key if self._seen[key] > WARM and len(self.captured) < MOST_GRAPHS else None

    @staticmethod
    def _grouped(batch: Any) -> bool:
        """Whether the rows are in the order of the step's languages already."""
        if len(batch.step_languages) == 1:
            return True
        rows = batch.languages.tolist()
        return bool(rows == sorted(rows, key=batch.step_languages.index))

    def _replay(self, key: Hashable, batch: Any, spaces: Sequence[Space]) -> Tensor:
        own = next((space for space in spaces if space.name != SHARED), None)
        passing = self.engine.spaces.get(self.engine.languages[batch.step_languages[0]])
        single = passing if len(batch.step_languages) == 1 else None
        if passing is not None and self._slot is None:
            self._slot = Slot(*(torch.zeros_like(passing.working) for _ in Slot._fields))  # type: ignore[attr-defined]
        if single is not None and self._slot is not None:
            self._slot.working.copy_(single.working)  # type: ignore[attr-defined]
        if key not in self.captured:
            self.captured[key] = self._capture(batch, spaces, single)
        captured = self.captured[key]
        for name, value in tensors(batch).items():
            tensors(captured.batch)[name].copy_(value, non_blocking=True)
        with replayed(batch.dropout_seed):
            captured.graph.replay()
        if own is not None and self._slot is not None:
            own.borrow(self._slot.arriving)  # type: ignore[attr-defined]
        return captured.nll

    def _capture(self, batch: Any, spaces: Sequence[Space], single: Any) -> Captured:
        """Records the kernels of this pass; gradients stay as they are."""
        engine, slot = self.engine, self._slot
        self.require(spaces)
        own = [space for space in spaces if isinstance(space, FlatSpace) and space.name != SHARED]
        static = replace(batch, **{name: value.to(engine.device).clone() for name, value in tensors(batch).items()})
        if single is not None and slot is not None:
            single.read_from(slot.working)
        for space in own:
            assert slot is not None
            space.receive_in(slot.arriving)

        def forward_and_backward() -> Tensor:
            loss, nll = engine.model.loss(static)
            factor = engine.scale.tensor * engine.layout.data  # read by the graph, since the scale moves
            (loss * factor.to(loss.dtype)).backward()
            return nll

        stream = self._stream = self._stream or torch.cuda.Stream()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), replayed(batch.dropout_seed):
                forward_and_backward()
            torch.cuda.current_stream().wait_stream(stream)
            self._clear(spaces)
            graph = torch.cuda.CUDAGraph()
            with replayed(batch.dropout_seed), torch.cuda.graph(graph, self._pool, stream, "thread_local"):
                nll = forward_and_backward()
        finally:
            if single is not None:
                single.read_from(single.working)
            for space in own:
                space.receive_in(None)
        self._pool = self._pool or graph.pool()
        return Captured(graph, static, nll)

    @staticmethod
    def _clear(spaces: Sequence[Space]) -> None:
        """Removes the gradients of a pass that does not count."""
        for space in spaces:
            if isinstance(space, FlatSpace) and space.arriving is not None:
                space.arriving.zero_()

    def _give_up_graphs(self, spaces: Sequence[Space]) -> None:
        """Runs all later passes uncaptured, in the memory that the graphs held; the pass over `spaces` that failed is undone."""
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize()  # what was launched of the pass may be on the stream of captures
        self.graphs, self._pool, self._slot = False, None, None
        self.captured.clear()
        self._clear(spaces)
        _release(self.engine.device)
        if self.engine.layout.rank == 0:
            warn(
                "train.graphs: the memory does not hold CUDA graphs beside other passes; passes run uncaptured from now on"
            )


class Slot(NamedTuple):
    """Fixed buffers for the working weights and the gradient of the one language whose modules a pass uses."""

    working: Tensor
    arriving: Tensor


class Captured(NamedTuple):
    """A captured pass: its graph, the batch that the graph reads and the nll that it writes."""

    graph: torch.cuda.CUDAGraph
    batch: Any
    nll: Tensor


def tensors(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch that lie on the device; `languages` stay on the host."""
    return {name: value for name, value in vars(batch).items() if torch.is_tensor(value) and name != "languages"}


# --- the largest micro-batch that fits --------------------------------------------------------------------------------
# An attempt runs the forward and backward passes of one micro-batch while it holds as much memory as the vectors of a step
# take. It uses neither DeepSpeed nor collectives, so that a size that does not fit leaves nothing behind, and no rank waits
# for one that ran out of memory. The ranks then agree on a size that fits all of them.


def fit_micro_batch(engine: Engine, most: int, batches: Callable[[int], Sequence[Rows]], vectors: int) -> str:
    """Sets the engine's micro-batch to the largest power of two up to `most` rows that fits; returns a note for the user.

    batches: makes the batches, of a given number of rows, whose passes are tried. vectors: the number of fp32 vectors as
    long as the shared parameters that a step holds beside masters and moments. On a CPU a rank takes all its rows at once,
    and the note is empty. Raises UserError if not even one row fits.
    """
    if engine.device.type == "cpu":
        return ""
    if engine.stage == 3 or engine.layout.tensor > 1:
        engine.micro = min(most, UNTRIED)
        return (
            f"micro-batches of {engine.micro} rows (auto tries nothing under ZeRO 3 and tensor parallelism: "
            "train.micro_batch=N sets another size)"
        )

    def attempt(rows: int) -> None:
        _pass_over(engine, batches(rows), vectors)

    layers = [module for module in engine.model.modules() if hasattr(module, "recompute")]
    size, recompute = largest(most, LEAST, attempt, engine.device), ""
    if not size:
        for layer in layers:
            layer.recompute = True
        size, recompute = largest(most, 1, attempt, engine.device), ", activations recomputed"
    if not size:
        raise UserError(
            f"train.micro_batch=auto: not even one row fits this {engine.device.type}, activations recomputed: use a "
            "higher ZeRO stage, offload the optimizer (ds_configs/zero2_offload.json), or set parallel.tensor"
        )
    engine.micro = size
    return f"micro-batches of {size} rows (auto{recompute})"


def largest(most: int, least: int, attempt: Callable[[int], None], device: torch.device) -> int:
    """The largest power of two from `least` to `most` whose attempt raises torch.OutOfMemoryError on no rank; 0 if none."""
    size = 1 << (most.bit_length() - 1)
    least = min(least, size)
    while size >= least:
        fits = True
        try:
            attempt(size)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            fits = False
        _release(device)  # after the `except`, in which the error still holds the attempt's tensors
        agreed = torch.tensor(float(fits), device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        if agreed.item():
            return size
        size //= 2
    return 0


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has no memory left; CUDA and its libraries, which allocate too, say so in words.

    So does an error that came of such a one: a capture that cannot go on ends with an error of its own.
    """
    words = "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    if isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in words):
        return True
    return error.__context__ is not None and out_of_memory(error.__context__)


def _pass_over(engine: Engine, batches: Sequence[Rows], vectors: int) -> None:
    """Runs forward and backward over each batch, and changes nothing.

    Raises torch.OutOfMemoryError if less than a tenth of the memory is left.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.reset_peak_memory_stats()
    length = vectors * sum(master.numel() for master in engine.spaces[SHARED].masters)
    held = torch.empty(length, dtype=torch.float32, device=engine.device)
    engine.model.train()
    spaces = [engine.spaces[name] for name in engine.groups_of(batches[0].step_languages)]
    engine.passes.require(spaces)
    for batch in batches:
        parameters = [parameter for space in spaces for parameter in space.parameters.values()]
        loss, _ = engine.model(batch.to(engine.device))
        torch.autograd.grad(loss, parameters, allow_unused=True)  # runs no hooks of the parameters
    del held
    if accelerator.max_memory_allocated() > ROOM * accelerator.total_memory():
        raise torch.OutOfMemoryError


def _release(device: torch.device) -> None:
    if device.type != "cpu":
        from deepspeed.accelerator import get_accelerator

        gc.collect()
        get_accelerator().empty_cache()
