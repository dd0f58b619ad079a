"""What a GPU alone runs, as far as stand-ins show it: captures of passes, memory that runs out, copies that a step waits for."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from mlinterf_ds.engine import passes
from mlinterf_ds.engine.meta_step import MetaStep
from mlinterf_ds.model.encoder import SHARED
from tests.parity import bodies
from tests.ranks import pool


def reasons(settings: list[str]) -> tuple[str, bool]:
    """Why the passes of such a model would not be captured on a GPU, and whether they are (in a rank of a pool)."""
    engine, _, _ = bodies.make(settings, "zero0")
    engine.device = torch.device("cuda")
    return engine.passes.capture("auto"), engine.passes.graphs


def test_passes_that_recompute_activations_are_not_captured() -> None:
    """A capture may not read the state of the random numbers, which recomputation does."""
    assert pool(1).run(reasons, ["variant=adpt"]) == [("", True)]
    ((reason, captured),) = pool(1).run(reasons, ["variant=adpt", "model.recompute=true"])
    assert "recompute" in reason and not captured


def streams_of_captures(settings: list[str]) -> tuple[int, int, bool]:
    """How many kinds of passes were captured, on how many streams, and whether each capture gave the ambient stream back, with
    stand-ins for CUDA's (in a rank of a pool)."""
    engine, stream, config = bodies.make(settings, "zero0")
    engine.passes.graphs, used, restored = True, [], []
    ambient = SimpleNamespace(wait_stream=lambda _: None)

    @contextlib.contextmanager
    def graph(_graph: Any, _pool: Any, stream: Any, _mode: str) -> Any:
        used.append(stream)
        yield

    made = SimpleNamespace(
        Stream=lambda: SimpleNamespace(wait_stream=lambda _: None),
        current_stream=lambda: ambient,
        set_stream=restored.append,
        stream=lambda _: contextlib.nullcontext(),
        CUDAGraph=lambda: SimpleNamespace(pool=lambda: 1, replay=lambda: None),
        graph=graph,
    )
    with mock.patch.object(passes.torch, "cuda", made):
        bodies.advance(engine, stream, config, 5, bodies.meta_step(engine, config, stream))
    back = len(restored) == len(used) and all(stream is ambient for stream in restored)
    return len(engine.passes.captured), len({id(stream) for stream in used}), back


def test_all_captures_share_one_stream() -> None:
    """The allocator gives memory of a pool to the stream alone that had it: else each graph would hold activations of its own."""
    ((kinds, streams, back),) = pool(1).run(streams_of_captures, ["variant=meta_adpt", "languages=te,as"])
    assert kinds > 1 and streams == 1 and back


def kinds_of_mixed_passes(variant: str) -> int:
    """How many kinds of passes a graph would be captured for, of eight steps that mix languages anew (in a rank of a pool)."""
    engine, stream, _ = bodies.make([f"variant={variant}", "data.mixed=true"], "zero0")
    for step in range(8):
        engine.passes._kind(stream.batch(step), [engine.spaces[SHARED]])
    return len(engine.passes._seen)


def test_mixed_passes_of_a_model_without_routed_modules_are_of_one_kind() -> None:
    assert pool(1).run(kinds_of_mixed_passes, "joint") == [1]
    assert pool(1).run(kinds_of_mixed_passes, "adpt")[0] > 1


def crowded(error: RuntimeError, graphs: str) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The gradient of a batch; that of a pass which runs out of memory at its end, while graphs hold some, or are about to be captured;
    whether any are left (in a rank of a pool)."""
    engine, stream, _ = bodies.make(["variant=adpt", "model.dropout=0.1"], "zero0")
    batch, shared = stream.batch(0), engine.spaces[SHARED]
    engine.accumulate([batch], [shared])
    (wanted,) = shared.gradient()
    loss, failures = engine.model.loss, [error]

    def fails_once(rows: Any) -> Any:
        result = loss(rows)
        if failures:
            result[0].backward()
            raise failures.pop()
        return result

    engine.model.loss = fails_once
    if graphs == "held":
        engine.passes.captured["a kind"] = SimpleNamespace()
    if graphs == "wanted":
        engine.passes.graphs = True
        engine.passes._kind = lambda *_: None
    engine.accumulate([batch], [shared])
    return wanted, shared.gradient()[0], engine.passes.graphs or bool(engine.passes.captured)


def test_graphs_are_given_up_where_memory_does_not_hold_them_beside_a_pass() -> None:
    full, of_capture = torch.OutOfMemoryError("planted"), RuntimeError("the capture cannot go on")
    of_capture.__context__ = full
    assert passes.out_of_memory(of_capture) and not passes.out_of_memory(RuntimeError("planted"))
    for graphs in ("held", "wanted"):
        ((wanted, gradient, left),) = pool(1).run(crowded, full, graphs)
        assert torch.equal(gradient, wanted) and not left
    for error, graphs in ((full, ""), (RuntimeError("planted"), "held")):
        with pytest.raises(AssertionError, match="planted"):
            pool(1).run(crowded, error, graphs)


def evaluated_beside_graphs(held: bool) -> tuple[float, float]:
    """The loss of a batch, and the loss where it runs out of memory once, perhaps beside graphs (in a rank of a pool)."""
    engine, stream, _ = bodies.make(["variant=adpt"], "zero0")
    wanted, forward, failures = engine.evaluate([stream.batch(0)]), engine.model.forward, [True]

    def fails_once(rows: Any) -> Any:
        if failures and failures.pop():
            raise torch.OutOfMemoryError("planted")
        return forward(rows)

    engine.model.forward = fails_once
    if held:
        engine.passes.captured["a kind"] = SimpleNamespace()
    return wanted, engine.evaluate([stream.batch(0)])


def test_graphs_are_given_up_where_an_evaluation_has_no_room_beside_them() -> None:
    ((wanted, again),) = pool(1).run(evaluated_beside_graphs, True)
    assert again == wanted
    with pytest.raises(AssertionError, match="planted"):
        pool(1).run(evaluated_beside_graphs, False)


def compiled_on(json_name: str, broken: int) -> tuple[bool, bool]:
    """Whether this rank compiles the regions of its model, and passes over several languages too, where one rank cannot (in a rank of
    a pool)."""
    engine, _, _ = bodies.make(["variant=adpt"], json_name)
    rank = torch.distributed.get_rank()

    def compile_(function: Any, **_: Any) -> Any:
        if rank == broken:
            raise RuntimeError("no compiler")
        return function

    with mock.patch.object(torch, "compile", compile_):
        passes.make_fast(engine, True, False, rank == 0)
    found = engine.model.router.regions
    return found is not None, found is not None and found.several


def test_all_ranks_compile_or_none() -> None:
    """ZeRO 2 and our groups of languages add gradients up in the order in which they arrive, which compiling changes."""
    for broken in (0, 1):
        assert pool(2).run(compiled_on, "zero2", broken) == [(False, False)] * 2
    assert pool(2).run(compiled_on, "zero2", 2) == [(True, False)] * 2
    assert pool(2).run(compiled_on, "zero1", 2) == [(True, False)] * 2
    assert pool(1).run(compiled_on, "zero2", 2) == [(True, True)]


def written_under_zero_3() -> list[str]:
    """What a language's write does on an accelerator whose streams do not wait for each other (in a rank of a pool)."""
    import deepspeed.accelerator

    engine, _, _ = bodies.make(["variant=adpt"], "zero3")
    space, done = engine.spaces[bodies.LANGUAGES[0]], []
    stream = SimpleNamespace(synchronize=lambda: done.append("synchronised"))
    apart = SimpleNamespace(resolves_data_dependency=lambda: False, current_stream=lambda: stream)
    write = space._slice

    def noted(*arguments: Any) -> Any:
        done.append("written")
        return write(*arguments)

    with (
        mock.patch.object(deepspeed.accelerator, "get_accelerator", lambda: apart),
        mock.patch.object(space, "_slice", noted),
    ):
        space.write()
    return done


def test_a_language_is_written_before_deepspeed_gathers_it() -> None:
    for done in pool(2).run(written_under_zero_3):
        assert len(done) > 1 and done.index("synchronised") == len(done) - 1


def launched_between_meta_steps() -> list[str]:
    """In which order a plain step between meta steps settles the one before and launches its pass (in a rank of a pool)."""
    settings = ["variant=meta_adpt", "meta.every=2", "meta.batch=12"]
    engine, stream, config = bodies.make(settings, "zero0")
    meta = bodies.meta_step(engine, config, stream)
    bodies.advance(engine, stream, config, 1, meta)
    done, settle, run = [], engine.settle, engine.passes.run
    engine.settle = lambda: (done.append("settle"), settle())[1]
    engine.passes.run = lambda *arguments: (done.append("pass"), run(*arguments))[1]
    meta.step([stream.batch(1)], [])
    return done


def test_a_step_between_meta_steps_waits_for_none_before_its_pass() -> None:
    ((first, *rest),) = pool(1).run(launched_between_meta_steps)
    assert first == "pass" and "settle" in rest


def order(settings: list[str], freeze: str) -> list[str]:
    """What a meta step does with the masters and moments of its language, in order (in a rank of a pool)."""
    engine, stream, config = bodies.make(["variant=meta_adpt", *settings], "zero0", freeze=freeze)
    done: list[str] = []
    calls = {name: lambda *_, name=name: done.append(name) for name in ("fetch", "wait", "release", "finish")}
    engine.idle, update = SimpleNamespace(**calls), engine.update

    def updated(space: Any, *arguments: Any) -> None:
        if space.name != SHARED:
            done.append("update")
        update(space, *arguments)

    engine.update = updated
    bodies.advance(engine, stream, config, 1, MetaStep(engine, config.meta))
    return done


@pytest.mark.parametrize("freeze", ["none", "shared"])
@pytest.mark.parametrize("way", ["phi_first", "theta_first", "simultaneous"])
def test_a_meta_step_waits_for_its_language_before_the_update(way: str, freeze: str) -> None:
    ((*before, release, finish),) = pool(1).run(order, [f"meta.order={way}"], freeze)
    assert before[0] == "fetch" and "wait" in before[: before.index("update")] and before[-1] == "update"
    assert (release, finish) == ("release", "finish"), "whoever has read a step's facts finds its language on the host"


def left_by_a_plain_step() -> tuple[list[str], list[str]]:
    """Whether the copies to the host are over when a step returns, and when its facts are read (in a rank of a pool)."""
    engine, stream, _ = bodies.make(["variant=adpt", "train.idle_languages=host"], "zero0")
    done: list[str] = []
    with mock.patch.object(engine.idle, "finish", lambda: done.append("finish")):
        facts = engine.train_step([stream.batch(0)])
        launched = list(done)
        facts.read()
    return launched, done


def test_the_facts_of_a_step_are_read_after_its_copies_to_the_host() -> None:
    assert pool(1).run(left_by_a_plain_step) == [([], ["finish"])]


def masters_at_the_start(kept: str) -> dict[str, str]:
    """On which device the masters of each group are made, where a device stands in for a GPU (in a rank of a pool)."""
    engine, _, _ = bodies.make(["variant=adpt"], "zero0")
    away = engine.languages if kept == "host" else ()
    spaces = engine._make_spaces(engine.model.parameter_groups(), torch.device("meta"), away)
    return {name: space.masters[0].device.type for name, space in spaces.items()}


def test_masters_of_idle_languages_are_made_where_they_are_kept() -> None:
    """A device that holds the languages of one step need not hold those of all when the run starts."""
    here, away = dict.fromkeys(bodies.LANGUAGES, "meta"), dict.fromkeys(bodies.LANGUAGES, "cpu")
    assert pool(1).run(masters_at_the_start, "device") == [{SHARED: "meta", **here}]
    assert pool(1).run(masters_at_the_start, "host") == [{SHARED: "meta", **away}]
