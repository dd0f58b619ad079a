"""What a rank of a meta test runs: the engine's quantities beside exact double backward in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mlinterf_ds.data.stream import ValidationStream
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.meta_step import MetaStep, Phases
from mlinterf_ds.engine.space import Vector
from mlinterf_ds.meta.bilevel import GradientDescent, mixed_product
from mlinterf_ds.meta.lookahead import AdamLookahead
from mlinterf_ds.model.encoder import SHARED, Encoder
from mlinterf_ds.sections import RowFormat
from tests.parity import bodies
from tools.bench.double_backward import LocalSpace, exact_mixed_product, gradients_of


def double(batch: Any) -> Any:
    return replace(batch, weights=batch.weights.double())


class Exact:
    """A float64 copy of an engine's model, and the losses of one step as functions of its weights.

    languages: those whose modules are phi; by default those of the batch.
    """

    def __init__(self, engine: Engine, batch: Any, held_out: Any, languages: Any = ()):
        model = engine.model
        self.model = Encoder(
            model.config,
            variant=model.variant,
            languages=model.languages,
            vocabulary=model.vocabulary,
            positions=model.embeddings.longest,
        ).double()
        self.model.twice_differentiable = True
        self.model.train()
        with torch.no_grad():
            masters = flat_weights(engine)
            for name, parameter in self.model.named_parameters():
                parameter.copy_(masters[name].view_as(parameter))
                parameter.requires_grad_(True)
        self.languages = [engine.languages[language] for language in sorted(languages or batch.step_languages)]
        groups = self.model.parameter_groups()
        self.theta_names = list(groups[SHARED])
        self.phi_names = [name for language in self.languages for name in groups[language]]
        self.theta = LocalSpace([self.model.get_parameter(name) for name in self.theta_names])
        self.phi = LocalSpace([self.model.get_parameter(name) for name in self.phi_names])
        self.train = lambda: self.model(double(batch))[0]
        self.validation = lambda: self.model(double(held_out))[0]

    def mixed_product(self, engine: Engine, lookahead: str, beta: float) -> tuple[Vector, torch.Tensor]:
        """(v, the exact mixed product along it, flat)."""
        rule = GradientDescent() if lookahead == "sgd" else self.moments(engine)
        (descent,) = gradients_of(self.train)([self.theta])
        with self.theta.displaced(rule.step(descent), -beta):
            (value,) = gradients_of(self.validation)([self.theta])
        v = rule.pull_back(descent, value)
        return v, torch.cat(exact_mixed_product(self.train, self.theta, self.phi, v))

    def moments(self, engine: Engine) -> AdamLookahead:
        """Adam's rule as the lookahead, from the engine's moments."""
        config = engine.training
        first, second = (gathered(engine, [SHARED], kind, self.theta_names) for kind in ("exp_avg", "exp_avg_sq"))
        space = engine.spaces[SHARED]
        number = int(engine.optimizers[SHARED].state[space.masters[0]]["step"].item()) + 1
        return AdamLookahead(first, second, number, config.beta1, config.beta2, config.eps)


def flat_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Every parameter's fp32 master, whole (one rank)."""
    return {
        segment.name: space.masters[segment.shard].detach()[segment.offset : segment.offset + segment.length].double()
        for space in engine.spaces.values()
        for segment in space.segments
    }


def by_name(engine: Engine, space_names: list[str], vector: Vector) -> dict[str, torch.Tensor]:
    """The parameters' pieces of a vector of these groups, one after the other."""
    known, shards = {}, list(vector)
    for space in (engine.spaces[name] for name in space_names):
        for segment in space.segments:
            piece = shards[segment.shard][segment.offset : segment.offset + segment.length]
            known[segment.name] = piece.double()
        del shards[: len(space.masters)]
    return known


def gathered(engine: Engine, space_names: list[str], kind: str, names: list[str]) -> Vector:
    spaces = [engine.spaces[name] for name in space_names]
    vector = [engine.optimizers[space.name].state[master][kind] for space in spaces for master in space.masters]
    vectors = by_name(engine, space_names, vector)
    return [vectors[name] for name in names]


def shard(engine: Engine, space_name: str, names: list[str], pieces: Vector) -> Vector:
    """Named float64 pieces as the engine's fp32 shards."""
    known = dict(zip(names, pieces, strict=True))
    space = engine.spaces[space_name]
    vector = [torch.zeros_like(master, requires_grad=False) for master in space.masters]
    for segment in space.segments:
        into = vector[segment.shard][segment.offset : segment.offset + segment.length]
        into.copy_(known[segment.name].reshape(-1))
    return vector


def batches(stream: Any, config: Any, step: int) -> tuple[Any, Any]:
    """The step's train batch and validation batch, whole."""
    rows = config.meta.batch or config.train.batch
    validation = ValidationStream(
        bodies.Made(stream.languages),
        stream.languages,
        rows=rows,
        row_format=config.data.row_format,
        seed=config.train.seed,
    )
    return stream.batch(step), validation.batch(step, stream.language(step))


def held_out_losses(settings: list[str]) -> list[float]:
    """The loss on rows of all languages after each of six steps on the streams that the configuration asks for."""
    engine, _, config = bodies.make(
        [*settings, "train.clip=0"]
    )  # a meta step clips by group, a plain one by the norm of all
    stream, validation = config.streams(bodies.Made(), bodies.LANGUAGES)
    meta = MetaStep(engine, config.meta, stream.together) if validation else None
    common = {"row_format": config.data.row_format, "seed": 1}
    batch = ValidationStream(bodies.Made(), bodies.LANGUAGES, rows=12, **common).batch(0, None)
    losses = []
    for step in range(6):
        train = [stream.batch(step, *rows) for rows in engine.slices(config.train.batch)]
        if meta and validation:
            rows_of_meta = engine.slices(config.meta.batch)
            meta.step(train, [validation.batch(step, stream.language(step), *rows) for rows in rows_of_meta])
        else:
            engine.train_step(train)
        engine.settle()
        losses.append(engine.evaluate([batch]) / engine.layout.data)
    return losses


def mixed_products(settings: list[str], source: str, lookahead: str, difference: str) -> dict[str, float]:
    """Cosine and relative error of the engine's mixed product against double backward, at the checkpoint `source`."""
    engine, stream, config = bodies.make(settings, "zero1")
    if source:
        scale = engine.scale.state()
        checkpoint.load(Path(source), engine)
        assert engine.scale.state() == scale  # the checkpoint is of fp32
        bodies.advance(engine, stream, config, engine.step + 4)  # in this precision, which may have to lower the scale
    batch, held_out = batches(stream, config, engine.step)
    exact = Exact(engine, batch, held_out)
    v, wanted = exact.mixed_product(engine, lookahead, engine.learning_rate)
    meta = MetaStep(engine, config.meta)
    theta, phi = engine.spaces[SHARED], engine.spaces[exact.languages[0]]
    direction = shard(engine, SHARED, exact.theta_names, v)

    def train(spaces: Any) -> list[Vector]:
        engine.accumulate([batch], spaces)
        return [[piece / engine.scale.value for piece in space.gradient()] for space in spaces]

    for _ in range(12):  # let the controller find its radius, as it would over the first steps
        here = train([phi])[0] if difference == "one_sided" else None
        product, change = mixed_product(train, theta, phi, direction, meta.radius.radius, here)
        used = meta.radius.radius
        meta.radius.update(change)
    named = by_name(engine, exact.languages, product)
    ours = torch.cat([named[name] for name in exact.phi_names]).to(wanted)
    return {
        "cosine": torch.nn.functional.cosine_similarity(ours, wanted, dim=0).item(),
        "error": ((ours - wanted).norm() / wanted.norm()).item(),
        "radius": float(used),
        "change": float(change),  # a rank of a pool need not be able to hand over tensors of its device
    }


def local_mixed_products(settings: list[str], lookahead: str, radius: float) -> float:
    """Relative error of the central difference itself, float64 throughout (the algorithm file on LocalSpaces)."""
    engine, stream, config = bodies.make(settings, "zero0")
    bodies.advance(engine, stream, config, 3)
    batch, held_out = batches(stream, config, engine.step)
    exact = Exact(engine, batch, held_out)
    v, wanted = exact.mixed_product(engine, lookahead, 0.01)
    product, _ = mixed_product(gradients_of(exact.train), exact.theta, exact.phi, v, radius)
    return ((torch.cat(product) - wanted).norm() / wanted.norm()).item()


class Watched:
    """What an engine's meta step computes on its way: every pass's gradients, every update with the weights after it."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.passes: list[tuple[str, list[Vector]]] = []  # ("loss" or "meta/validation", a vector for each space)
        self.updates: list[
            tuple[str, Vector, dict[str, torch.Tensor]]
        ] = []  # SHARED or "phi", its clipped gradient, weights after

    def step(self, meta: MetaStep, batch: Any, held_out: Any) -> None:
        make, update, engine = Phases._gradients_of, self.engine.update, self.engine

        def watched_passes(phases: Phases, batches_: Any, name: str) -> Any:
            inner = make(phases, batches_, name)

            def gradients(spaces: Any) -> list[Vector]:
                vectors = inner(spaces)
                self.passes.append((name, [[shard.clone() for shard in vector] for vector in vectors]))
                return vectors

            return gradients

        def watched_update(space: Any, gradient: Vector, divisor: Any, rate: float, skip: Any) -> None:
            clipped = [shard / divisor for shard in gradient]
            update(space, gradient, divisor, rate, skip)
            if space.name != SHARED and self.updates and self.updates[-1][0] == "phi":
                clipped = [*self.updates.pop()[1], *clipped]  # a step that mixes languages updates them one by one
            self.updates.append((SHARED if space.name == SHARED else "phi", clipped, flat_weights(engine)))

        with (
            mock.patch.object(Phases, "_gradients_of", watched_passes),
            mock.patch.object(engine, "update", watched_update),
        ):
            meta.step([batch], [held_out])


def stages(settings: list[str]) -> dict[str, float]:
    """Relative errors of the stages of the third meta step, each against float64 from the engine's own input to the stage.

    "gradient": the largest of all passes. "mixed": the difference quotient against double backward; "mixed bar": the error
    that it may have (see the test). "hypergradient": its sum. "update": the largest of AdamW's two changes of weights.
    """
    engine, stream, config = bodies.make(settings, "zero1")
    meta = MetaStep(engine, config.meta, stream.together)
    bodies.advance_meta(engine, stream, config, meta, 2)
    batch, held_out = batches(stream, config, engine.step)
    # all languages have validation rows, so that a step that mixes them trains all
    exact = Exact(engine, batch, held_out, held_out.step_languages if config.data.mixed else ())
    rate, radius = engine.learning_rate, meta.radius.radius
    names = {SHARED: exact.theta_names, "phi": exact.phi_names}
    groups = {SHARED: [SHARED], "phi": exact.languages}
    adamw = {name: local_adamw(engine, groups[name], names[name], exact, rate) for name in names}
    lookahead = GradientDescent() if config.meta.lookahead == "sgd" else exact.moments(engine)
    watched = Watched(engine)
    watched.step(meta, batch, held_out)
    passes = iter(watched.passes)
    errors = {"gradient": 0.0, "update": 0.0}

    def exact_pieces(space_name: str, vector: Vector) -> Vector:
        known = by_name(engine, groups[space_name], vector)
        return [known[name] for name in names[space_name]]

    def next_pass(loss: Any, *space_names: str) -> list[Vector]:
        """The engine's next pass, after its gradients are compared with those of `loss`."""
        _, vectors = next(passes)
        ours = [exact_pieces(name, vector) for name, vector in zip(space_names, vectors, strict=True)]
        spaces = [exact.theta if name == SHARED else exact.phi for name in space_names]
        for own, wanted in zip(ours, gradients_of(loss)(spaces), strict=True):
            errors["gradient"] = max(errors["gradient"], relative(own, wanted))
        return ours

    def hypergradient() -> tuple[Vector, Vector]:
        """phi's gradient, and theta's where both are updated at once."""
        beta, one_sided = config.meta.beta or rate, config.meta.difference == "one_sided"
        descent, *at_theta = next_pass(exact.train, SHARED, *["phi"] * (one_sided or simultaneous))
        with exact.theta.displaced(lookahead.step(descent), -beta):
            value, direct = next_pass(exact.validation, SHARED, "phi")
        v = lookahead.pull_back(descent, value)
        epsilon = radius * exact.theta.weights_norm() / torch.cat(v).norm().item()
        with exact.theta.displaced(v, epsilon):
            (plus,) = next_pass(exact.train, "phi")
        minus, width = at_theta, epsilon
        if not one_sided:
            with exact.theta.displaced(v, -epsilon):
                minus, width = next_pass(exact.train, "phi"), 2 * epsilon
        mixed = [(above - below) / width for above, below in zip(plus, minus[0], strict=True)]
        wanted = exact_mixed_product(exact.train, exact.theta, exact.phi, v)
        gradients = gradients_of(exact.train)
        known = gradients([exact.phi])[0] if one_sided else None
        in_float64, change = mixed_product(gradients, exact.theta, exact.phi, v, radius, known)
        errors["mixed"] = relative(mixed, wanted)
        errors["mixed bar"] = relative(in_float64, wanted) + 2 * errors["gradient"] / change
        h = [first - beta * second for first, second in zip(direct, mixed, strict=True)]
        if not config.meta.reuse:
            return h, descent
        theirs = [(first + second) / 2 for first, second in zip(descent, value, strict=True)]
        return [first + second for first, second in zip(h, at_theta[0], strict=True)], theirs

    simultaneous = config.meta.order == "simultaneous"
    for space_name, clipped, after in watched.updates:
        if space_name != SHARED:
            gradient, next_gradient = hypergradient()
        else:
            gradient = next_gradient if simultaneous else next_pass(exact.train, SHARED)[0]
        length = torch.cat(gradient).norm().item()
        factor = min(1.0, engine.training.clip / (length + 1e-6)) if engine.training.clip else 1.0
        own = exact_pieces(space_name, clipped)
        kind = "theta" if space_name == SHARED else "hypergradient"
        errors[kind] = relative(own, [piece * factor for piece in gradient])
        parameters = [exact.model.get_parameter(name) for name in names[space_name]]
        before = [parameter.detach().clone() for parameter in parameters]
        adamw[space_name](own)
        engines = [after[name] - old.reshape(-1) for name, old in zip(names[space_name], before, strict=True)]
        moved = [parameter.detach() - old for parameter, old in zip(parameters, before, strict=True)]
        errors["update"] = max(errors["update"], relative(engines, moved))
        with torch.no_grad():  # the next stage starts where the engine is
            for parameter, name in zip(parameters, names[space_name], strict=True):
                parameter.copy_(after[name].view_as(parameter))
    assert len(watched.updates) == 2 and not list(passes)
    return errors


def relative(ours: Vector, wanted: Vector) -> float:
    """|ours - wanted| / |wanted| over all pieces."""
    ours_flat, flat = (torch.cat([piece.reshape(-1).double() for piece in vector]) for vector in (ours, wanted))
    return ((ours_flat - flat).norm() / flat.norm()).item()


def local_adamw(engine: Engine, space_names: list[str], names: list[str], exact: Exact, lr: float) -> Any:
    """torch's AdamW in float64 on the copy, continuing from the engine's moments."""
    parameters = [exact.model.get_parameter(name) for name in names]
    train = engine.training
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=train.weight_decay
    )
    steps = {
        segment.name: engine.optimizers[space.name].state[space.masters[0]]["step"].item()
        for space in (engine.spaces[name] for name in space_names)
        for segment in space.segments
    }
    moments = {kind: gathered(engine, space_names, kind, names) for kind in ("exp_avg", "exp_avg_sq")}
    for index, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        optimizer.state[parameter] = {"step": torch.tensor(float(steps[name]))} | {
            kind: vectors[index].view_as(parameter).clone() for kind, vectors in moments.items()
        }

    def update(gradient: Vector) -> None:
        for parameter, piece in zip(parameters, gradient, strict=True):
            parameter.grad = piece.view_as(parameter)
        optimizer.step()
        for parameter in exact.model.parameters():
            parameter.grad = None

    return update


def state_of(engine: Engine, name: str) -> list[torch.Tensor]:
    space = engine.spaces[name]
    moments = [tensor for master in space.masters for tensor in engine.optimizers[name].state[master].values()]
    return [tensor.detach().clone() for tensor in (*space.masters, *moments)]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def moved_by_a_meta_step(settings: list[str], json_name: str) -> tuple[int, bool]:
    """(languages whose state changed in a meta step, whether theta changed before phase 2)."""
    engine, stream, config = bodies.make(settings, json_name)
    meta = MetaStep(engine, config.meta, stream.together)
    bodies.advance_meta(engine, stream, config, meta, 2)
    before = {name: state_of(engine, name) for name in engine.spaces}
    seen: list[bool] = []
    update_theta = Phases.update_theta

    def watched(phases: Phases) -> None:
        seen.append(not same(before[SHARED], state_of(engine, SHARED)))
        update_theta(phases)

    with mock.patch.object(Phases, "update_theta", watched):
        bodies.advance_meta(engine, stream, config, meta, 3)
    assert len(seen) == 1 and not same(before[SHARED], state_of(engine, SHARED))
    moved = [name for name in engine.languages if not same(before[name], state_of(engine, name))]
    return len(moved), seen[0]


def overflow(settings: list[str], json_name: str, failing: int) -> dict[str, Any]:
    """Plant an infinite loss in pass number `failing` of a meta step; what changed."""
    engine, stream, config = bodies.make(settings, json_name)
    engine.scale.value, engine.scale.hysteresis, engine.scale.patience, engine.scale.minimum = 1.0, 1, 1, 0.125
    meta = MetaStep(engine, config.meta, stream.together)
    bodies.advance_meta(engine, stream, config, meta, 2)
    before = {name: state_of(engine, name) for name in engine.spaces}
    working = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    radius, skipped, updates = meta.radius.radius, engine.skipped, engine.updates
    accumulate, passes = engine.accumulate, []

    def planted(batches_: Any, spaces: Any, **options: Any) -> torch.Tensor:
        passes.append(len(passes))
        if passes[-1] == failing:
            batches_ = [replace(batch, weights=batch.weights * float("inf")) for batch in batches_]
        return accumulate(batches_, spaces, **options)

    engine.accumulate = planted  # type: ignore[method-assign]
    batch, held_out = batches(stream, config, engine.step)
    meta.step([batch], [held_out])
    unchanged = all(same(before[name], state_of(engine, name)) for name in engine.spaces)
    unchanged &= all(torch.equal(working[name], p) for name, p in engine.model.named_parameters())
    unchanged &= meta.radius.radius == radius and engine.updates == updates
    return {"unchanged": unchanged, "skipped": engine.skipped - skipped, "scale": engine.scale.value}


def largest_tensor(json_name: str) -> tuple[int, int, int]:
    """Elements of the largest tensor made inside a meta step, of the smaller group (theta or phi_i), of a shard."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from mlinterf_ds.engine import space

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            made = isinstance(out, torch.Tensor) and out.untyped_storage().size() > 0
            if made and all(
                not isinstance(a, torch.Tensor) or a.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
                for a in args
            ):
                sizes.append(out.untyped_storage().nbytes() // out.element_size())
            return out

    bucket, space.BUCKET = space.BUCKET, 2000
    settings = [
        "variant=meta_ffn",
        "model.width=64",
        "model.ffn=144",
        "model.layers=4",
        "train.batch=4",
        "meta.radius=1e-3",
    ]
    try:
        engine, stream, config = bodies.make(settings, json_name, bucket=2000)
        meta = MetaStep(engine, config.meta)
        bodies.advance_meta(engine, stream, config, meta, 2)
        _, held_out = batches(stream, config, engine.step)
        slices = engine.slices(4)
        with Watch():
            meta.step([stream.batch(engine.step, *s) for s in slices], [held_out])
    finally:
        space.BUCKET = bucket
    groups = engine.model.parameter_groups().values()
    whole = [sum(math.prod(tuple(getattr(p, "ds_shape", p.shape))) for p in group.values()) for group in groups]
    return max(sizes), min(whole[0], whole[1]), max(whole) // 2


def subsets_error(settings: list[str]) -> float:
    """Relative difference of the mean direct and mixed terms over all pairs of languages and the full estimate."""
    settings = [*settings, "meta.batch=6", "train.lr=0.003"]
    engine, stream, config = bodies.make(settings, "zero1")
    bodies.advance(engine, stream, config, 3)
    meta = MetaStep(engine, config.meta)
    batch = stream.batch(engine.step)
    (language,) = batch.step_languages
    # The same two rows of every language, whatever subset is drawn: only the weights differ.
    validation = ValidationStream(
        bodies.Made(), stream.languages, rows=6, row_format=config.data.row_format, seed=0
    ).batch(0, language)
    count = len(engine.languages)

    def gradient(weights: dict[int, float]) -> torch.Tensor:
        factors = torch.tensor([weights.get(int(j), 0.0) * count for j in validation.languages])
        weighted = replace(validation, weights=validation.weights * factors.view(-1, 1))
        phases = Phases(meta, [batch], [weighted])
        value, direct = phases.validation([phases.theta, phases.phi])
        return torch.cat([*value, *direct]).double()

    full = gradient(dict.fromkeys(range(count), 1 / count))
    others = [other for other in range(count) if other != language]
    plans = [
        ValidationStream(
            bodies.Made(), stream.languages, rows=6, row_format=RowFormat(16), seed=0, languages_per_step=2
        )
    ]
    weights = {}
    for step in range(40):
        chosen, scale, _ = plans[0].plan(step, language)
        (other,) = [int(c) for c in chosen if c != language]
        weights[other] = {int(c): float(w) for c, w in zip(chosen, scale, strict=True)}
    assert sorted(weights) == others, "every subset is drawn"
    mean = sum(gradient(weights[other]) for other in others) / len(others)
    return ((mean - full).norm() / full.norm()).item()


def routed_names(languages: tuple[str, ...]) -> set[str]:
    """Languages whose own parameters, and no other's, move in a step on them."""
    engine, stream, config = bodies.make(["variant=meta_adpt"], "zero1", languages=languages)
    meta = MetaStep(engine, config.meta)
    right = set()
    for _ in range(200):
        batch, held_out = batches(stream, config, engine.step)
        name = languages[batch.step_languages[0]]
        if name in right:
            engine.start_at(engine.updates, engine.skipped + 1)  # on to the next batch
            continue
        before = {other: state_of(engine, other) for other in languages}
        meta.step([batch], [held_out])
        moved = [other for other in languages if not same(before[other], state_of(engine, other))]
        assert moved == [name], (name, moved)
        right.add(name)
        if len(right) == len(languages):
            break
    return right


def pcgrad_facts(settings: list[str], json_name: str, tensor: int) -> list[dict[str, float]]:
    from mlinterf_ds.engine.pcgrad import pcgrad_step

    engine, stream, config = bodies.make(settings, json_name, tensor)
    facts = []
    while engine.step < 3:
        train = [stream.batch(engine.step, *slice_) for slice_ in engine.slices(config.train.batch)]
        facts.append(dict(pcgrad_step(engine, train, 0)))
    return facts


def first_steps(settings: list[str]) -> list[dict[str, float]]:
    """The facts of a run's first two meta steps."""
    engine, stream, config = bodies.make(settings, "zero1")
    meta = MetaStep(engine, config.meta)
    facts = []
    for _ in range(2):
        batch, held_out = batches(stream, config, engine.step)
        facts.append(dict(meta.step([batch], [held_out])))
    return facts
