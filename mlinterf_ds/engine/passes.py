"""One pass: forward and backward of one micro-batch, run by Python or replayed as a CUDA graph.

A graph replays kernels without Python, on the same memory as when it was captured. So the batch, the weights of the one
language whose modules the rows go through, and that language's gradient are copied to and from fixed buffers, and one
graph serves all languages. Dropout is replayed by its seed. DeepSpeed's hooks are Python, so that passes over parameters
which it partitions are never captured.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mlinterf_ds.engine.space import FlatSpace, Space
from mlinterf_ds.errors import warn
from mlinterf_ds.model.encoder import SHARED
from mlinterf_ds.model.regions import regions
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
        engine.model.router.regions = regions(compiled, engine.device, first)
    if reason and compiled is True and first:
        warn(f"model.compile=true: {reason}")
    if (reason := engine.passes.capture(graphs)) and graphs is True and first:
        warn(f"train.graphs=true: {reason}")


class Passes:
    """Runs the passes of an engine's model."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.graphs = False  # whether passes are captured; see `capture`
        self._seen: dict[Hashable, int] = {}
        self.captured: dict[Hashable, Captured] = {}
        self._pool: Any = None
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
        self.graphs = wanted is not False and not reason
        return reason

    def run(self, batch: Any, spaces: Sequence[Space], last: bool) -> Tensor:
        """Adds the gradients of a micro-batch to those of `spaces`; returns its nll (rows, masked).

        last: whether it is the last micro-batch of the step, after which DeepSpeed reduces what it partitions.
        """
        engine = self.engine
        if self.graphs and (key := self._kind(batch, spaces)) is not None:
            return self._replay(key, batch, spaces)
        self._require(spaces)
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

    def _require(self, spaces: Sequence[Space]) -> None:
        for space in self.engine.spaces.values():
            space.require_grad(space in spaces)

    def _kind(self, batch: Any, spaces: Sequence[Space]) -> Hashable | None:
        """A key that two passes share if one graph can serve both; None for a pass that is not captured."""
        languages = batch.step_languages
        own = [space.name for space in spaces if space.name != SHARED]
        if len(own) > 1 or not self._grouped(batch):
            return None
        if len(languages) == 1:
            route: Hashable = len(own)  # any language: its weights are copied to the slot
        elif len(self.engine.languages) > MOST_LANGUAGES:
            return None
        else:
            route = tuple(batch.languages.tolist()), tuple(own)
        shapes = tuple((name, tuple(value.shape)) for name, value in tensors(batch).items())
        key = (shapes, route, self.engine.spaces[SHARED] in spaces)
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
            self._slot = Slot(passing)
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
        self._require(spaces)
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

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), replayed(batch.dropout_seed):
            forward_and_backward()
        torch.cuda.current_stream().wait_stream(stream)
        for flat in (space for space in spaces if isinstance(space, FlatSpace)):
            assert flat.arriving is not None
            flat.arriving.zero_()
        graph = torch.cuda.CUDAGraph()
        with replayed(batch.dropout_seed), torch.cuda.graph(graph, self._pool, stream, "thread_local"):
            nll = forward_and_backward()
        self._pool = self._pool or graph.pool()
        if single is not None:
            single.read_from(single.working)
        for space in own:
            space.receive_in(None)
        return Captured(graph, static, nll)


class Slot:
    """Fixed buffers for the working weights and the gradient of the one language whose modules a pass uses."""

    def __init__(self, language: Any):
        self.working = torch.zeros_like(language.working)
        self.arriving = torch.zeros_like(language.working)


class Captured:
    """A captured pass: its graph, the batch that the graph reads and the nll that it writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, batch: Any, nll: Tensor):
        self.graph, self.batch, self.nll = graph, batch, nll


def tensors(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch that lie on the device; `languages` stay on the host."""
    return {name: value for name, value in vars(batch).items() if torch.is_tensor(value) and name != "languages"}
