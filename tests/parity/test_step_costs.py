"""What a step does beside its passes, counted: operators that are dispatched, and times that the host waits for the device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mlinterf_ds.engine import checkpoint, space
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.transfers import IdleSpaces
from mlinterf_ds.model.encoder import SHARED
from tests.memory import Alive
from tests.parity import bodies
from tests.ranks import pool

WAITS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy")


class Operators(TorchDispatchMode):
    """Counts the operators outside of passes; the profiler's marks are none."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.inside = False
        run = engine.passes.run

        def passing(*arguments: Any) -> Any:
            self.inside = True
            try:
                return run(*arguments)
            finally:
                self.inside = False

        engine.passes.run = passing  # type: ignore[method-assign]

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if not self.inside and function.namespace != "profiler":
            self.names[str(function)] += 1
        return function(*arguments, **(options or {}))


class Waits(TorchFunctionMode):
    """Counts the calls that wait for the device, but for those on the batch's languages, which lie on the host."""

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.operators = operators

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in WAITS and not self.operators.inside:
            self.names[name] += 1
        return function(*arguments, **(options or {}))


def cost(settings: list[str], layers: int = 2) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """What a step launches beside its passes; what it waits for; what the next one waits for (in a rank of a pool).

    Three steps go before, so that nothing is done for the first time.
    """
    engine, stream, config = bodies.make([*settings, "train.precision=bf16", f"model.layers={layers}"], "zero0")
    meta = bodies.meta_step(engine, config, stream)
    held_out = bodies.validation_stream(stream, config) if meta else None

    batches = [stream.batch(number) for number in range(5)]
    rows = [held_out.batch(number, stream.language(number)) if held_out else None for number in range(5)]

    def step() -> Any:
        batch, own = batches[engine.step], rows[engine.step]
        return meta.step([batch], [own]) if meta else engine.train_step([batch])  # type: ignore[list-item]

    for _ in range(3):
        step().read()
    with Operators(engine) as operators, Waits(operators) as waits:
        step()
        launched, first = dict(operators.names), dict(waits.names)
        step()
    return launched, first, dict(waits.names)


def trained(settings: list[str], steps: int = 6) -> tuple[list[dict[str, float]], torch.Tensor, int]:
    """The facts of these steps, the masters after them, and how many kinds of passes were captured (in a rank of a pool)."""
    engine, stream, config = bodies.make(settings, "zero1")
    meta = bodies.meta_step(engine, config, stream)
    if meta:
        facts = bodies.advance_meta(engine, stream, config, meta, steps)
    else:
        facts = bodies.advance(engine, stream, config, steps)
    masters = [master.detach().flatten().cpu() for space in engine.spaces.values() for master in space.masters]
    return facts, torch.cat(masters), len(engine.passes.captured)


def resumed(settings: list[str], folder: str) -> tuple[list[dict[str, float]], list[dict[str, float]], int]:
    """The facts of four steps, of the last two of them from the checkpoint of the second, and how many regions of the model
    were compiled (in a rank of a pool)."""
    engine, stream, config = bodies.make(settings, "zero1")
    facts = bodies.advance(engine, stream, config, 2)
    path = checkpoint.save(Path(folder), engine, {}, {}, keep=1)
    facts += bodies.advance(engine, stream, config, 4)
    again, stream, config = bodies.make(settings, "zero1")
    checkpoint.load(path, again)
    after = bodies.advance(again, stream, config, 4)
    regions = again.model.router.regions
    return facts, after, len(regions.compiled) if regions else 0


def test_compiled_steps_equal_eager_ones_and_resume_digit_for_digit(tmp_path: Path) -> None:
    settings = ["variant=joint", "model.layers=2", "model.compile=true"]
    ((compiled, after, regions),) = pool(1).run(resumed, settings, str(tmp_path / "compiled"))
    assert compiled[2:] == after and regions == 3, "embeddings, layers, head with loss"
    ((eager, _, none),) = pool(1).run(resumed, settings[:2], str(tmp_path / "eager"))
    assert none == 0
    for ours, others in zip(compiled, eager, strict=True):
        for name in ("loss", "gradient_norm"):
            assert ours[name] == pytest.approx(others[name], rel=1e-5), name


def frozen(settings: list[str], json_name: str) -> tuple[int, bool, bool]:
    """After three steps with the shared parameters frozen: bytes of their moments and gradients, whether they and whether the
    languages' moved (in a rank of a pool)."""
    engine, stream, config = bodies.make(settings, json_name, freeze="shared")
    before = {name: [master.detach().clone() for master in space.masters] for name, space in engine.spaces.items()}
    bodies.advance(engine, stream, config, 3)
    shared = engine.spaces[SHARED]
    state = engine.optimizers[SHARED].state
    held = [tensor for master in shared.masters for name, tensor in state[master].items() if name != "step"]
    held += [parameter.grad for parameter in shared.parameters.values() if parameter.grad is not None]
    moved = {
        name: any(not torch.equal(old, new) for old, new in zip(before[name], space.masters, strict=True))
        for name, space in engine.spaces.items()
    }
    size = sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}.values())
    return size, moved.pop(SHARED), any(moved.values())


@pytest.mark.parametrize(("json_name", "ranks"), [("zero0", 1), ("zero2", 2)])
def test_frozen_parameters_have_no_moments_and_no_gradients(json_name: str, ranks: int) -> None:
    for size, shared_moved, own_moved in pool(ranks).run(frozen, ["variant=adpt"], json_name):
        assert size <= 8 and not shared_moved and own_moved


def handed_over(settings: list[str], least: int) -> tuple[torch.Tensor, float, bool]:
    """Where gradients of `least` elements count as large: a gradient of the shared parameters, the vectors of their length that
    two steps made and held at once, and whether one stays for the gradients to come (in a rank of a pool)."""
    with mock.patch.object(space, "LARGE", least):
        engine, stream, config = bodies.make(
            [*settings, "train.batch=2", "meta.batch=3", "data.sequence_length=8"], "zero1"
        )
    meta, shared = bodies.meta_step(engine, config, stream), engine.spaces[SHARED]
    assert isinstance(shared, space.FlatSpace)
    bodies.advance(engine, stream, config, 2, meta)
    batches = [stream.batch(2, *slice_) for slice_ in engine.slices(2)]
    engine.accumulate(batches, [shared])
    (gradient,) = shared.gradient()
    with Alive(engine.model.embeddings.word.weight.nbytes) as alive:  # more than any activation
        bodies.advance(engine, stream, config, 4, meta)
    return gradient, alive.most / shared.working.nbytes, shared.arriving is not None


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (["variant=adpt"], 1),
        (["variant=adpt", "train.micro_batch=1"], 1),
        (["variant=meta_adpt"], 2),
        (["variant=meta_adpt", "meta.order=simultaneous", "meta.reuse=true"], 2),
    ],
)
def test_a_large_gradient_is_handed_over_and_not_copied(settings: list[str], most: int) -> None:
    """A step then holds no vector beside the gradients that its rule needs at once (one, or theta's descent and v), and no
    matrix as large as the word embeddings, which are used twice."""
    ((gradient, vectors, stays),) = pool(1).run(handed_over, settings, 0)
    ((wanted, _, stayed),) = pool(1).run(handed_over, settings, 1 << 26)
    assert vectors == most and not stays and stayed
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())


def lent() -> tuple[bool, bool, bool, bool]:
    """A gradient that a graph left in a buffer of its own, then an eager pass of the same language (in a rank of a pool)."""
    engine, stream, _ = bodies.make(["variant=adpt"], "zero0")
    batch = stream.batch(0)
    own: Any = engine.spaces[engine.languages[batch.step_languages[0]]]
    engine.accumulate([batch], [engine.spaces[SHARED], own])
    (wanted,) = own.gradient()
    buffer = torch.ones_like(own.working)
    own.borrow(buffer)
    kept = any(parameter.grad is not None for parameter in own.parameters.values())
    (gradient,) = own.gradient()
    engine.accumulate([batch], [engine.spaces[SHARED], own])
    return bool((gradient == 1).all()), not buffer.any(), torch.equal(own.gradient()[0], wanted), kept


def test_an_eager_pass_after_a_graph_has_a_buffer_of_its_own() -> None:
    """And the graph's gradient takes the place of the eager one, or every language would keep a buffer in time."""
    assert pool(1).run(lent) == [(True, True, True, False)]


def test_idle_groups_lie_on_the_host_between_their_steps_and_keep_what_a_step_did() -> None:
    master = torch.zeros(3).requires_grad_()
    optimizer = torch.optim.AdamW([master])
    optimizer.state[master] = {"step": torch.zeros(()), "exp_avg": torch.zeros(3)}
    group: Any = SimpleNamespace(name="sw", masters=[master])
    idle = IdleSpaces([group], {"sw": optimizer}, torch.device("cpu"))
    host = master.data_ptr()
    idle.fetch([group])
    assert master.data_ptr() != host, "the step works on a copy"
    with torch.no_grad():
        master.add_(1)
        optimizer.state[master]["exp_avg"].add_(2)
    idle.release([group])
    assert master.data_ptr() == host and master.tolist() == [1.0] * 3
    assert optimizer.state[master]["exp_avg"].tolist() == [2.0] * 3


@pytest.mark.parametrize("variant, mixed", [("adpt", "false"), ("meta_adpt", "false"), ("meta_adpt", "true")])
@pytest.mark.parametrize("ranks", [1, 2])
def test_idle_languages_on_the_host_change_nothing(variant: str, mixed: str, ranks: int) -> None:
    settings = [f"variant={variant}", "meta.check_every=3", f"data.mixed={mixed}"]
    here = pool(ranks).run(trained, [*settings, "train.idle_languages=device"])
    away = pool(ranks).run(trained, [*settings, "train.idle_languages=host"])
    for (facts, masters, _), (other_facts, other_masters, _) in zip(here, away, strict=True):
        assert facts == other_facts and torch.equal(masters, other_masters)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (["variant=joint"], 40),
        (["variant=adpt"], 50),
        (["variant=meta_adpt", "meta.check_every=0"], 150),
        (["variant=meta_adpt", "meta.check_every=0", "meta.order=simultaneous", "meta.reuse=true"], 150),
        (
            ["variant=meta_adpt", "meta.check_every=0", "data.mixed=true"],
            270,
        ),  # sums and AdamW of two further languages
    ],
)
def test_a_step_costs_little_beside_its_passes(settings: list[str], most: int) -> None:
    ((launched, first, both),) = pool(1).run(cost, settings)
    assert 0 < sum(launched.values()) <= most, launched
    assert not first, f"a step that is launched waits for nothing: {first}"
    assert sum(both.values()) == 1, f"the next step reads the facts of the one before, at once: {both}"


@pytest.mark.parametrize("settings", [["variant=joint"], ["variant=adpt"], ["variant=meta_adpt", "meta.check_every=0"]])
def test_no_cost_grows_with_the_number_of_parameters(settings: list[str]) -> None:
    one, four = (pool(1).run(cost, settings, layers)[0][0] for layers in (1, 4))
    assert one == four
