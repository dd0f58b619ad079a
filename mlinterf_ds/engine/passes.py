"""One pass: forward and backward of one micro-batch, run by Python or replayed as a CUDA graph.

A graph replays kernels without Python, on the same memory as when it was captured. So the batch, the weights of the one
language whose modules the rows go through, and that language's gradient are copied to and from fixed buffers, and one
graph serves all languages. Dropout is replayed by its seed. DeepSpeed's hooks are Python, so that passes over parameters
which it partitions are never captured.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mlinterf_ds.engine.fitting import out_of_memory, release
from mlinterf_ds.engine.space import FlatSpace, Space
from mlinterf_ds.errors import warn
from mlinterf_ds.model.encoder import SHARED
from mlinterf_ds.model.routing import Compiled, regions
from mlinterf_ds.runtime.parallel import replayed

if TYPE_CHECKING:
    from mlinterf_ds.engine.engine import Engine

WARM = 2  # passes of a kind before it is captured: by then compilers and allocators have done their work
MOST_GRAPHS = 64
MOST_KINDS = 1000  # kinds of passes whose number is remembered at a time
MOST_LANGUAGES = 16  # languages up to which passes over several of them are captured; each language has its own graph


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
        ambient = torch.cuda.current_stream()
        # a node of an earlier pass may still name the default stream, which torch 2.13 refuses in a capture
        override = getattr(torch.autograd.graph, "set_override_stale_capture_stream", lambda enabled: None)
        override(True)
        try:
            stream.wait_stream(ambient)
            with torch.cuda.stream(stream), replayed(batch.dropout_seed):
                forward_and_backward()
            ambient.wait_stream(stream)
            self._clear(spaces)
            graph = torch.cuda.CUDAGraph()
            with replayed(batch.dropout_seed), torch.cuda.graph(graph, self._pool, stream, "thread_local"):
                nll = forward_and_backward()
        finally:
            override(False)
            torch.cuda.set_stream(ambient)  # a capture that fails at its end leaves its own in place
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
        release(self.engine.device)
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
