"""What ranks of the pool run in tests of faults inside a step or a save."""

from __future__ import annotations

import itertools
import os
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mlinterf_ds.engine import checkpoint, optimizer
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.meta_step import MetaStep
from mlinterf_ds.engine.pcgrad import pcgrad_step
from mlinterf_ds.errors import UserError
from tests.parity import bodies


def everything(engine: Engine) -> list[torch.Tensor]:
    """Copies of masters and moments of this rank."""
    return [
        tensor.detach().clone()
        for name, space in engine.spaces.items()
        for master in space.masters
        for tensor in (master, *engine.optimizers[name].state[master].values())
    ]


def poisoned(variant: str, json_name: str) -> dict[str, Any]:
    """Two steps, then on rank 1 alone every loss is NaN: first for one step, then (after a good one) for ever."""
    engine, stream, config = bodies.make([f"variant={variant}"], json_name, 1)
    meta = MetaStep(engine, config.meta) if variant.startswith("meta_") else None
    bad = [False]

    def poison(_: Any, __: Any, result: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return (result[0] * torch.nan, result[1]) if bad[0] and dist.get_rank() == 1 else result

    engine.model.register_forward_hook(poison)

    def step(until: int) -> dict[str, float]:
        return bodies.advance(engine, stream, config, until, meta)[-1]

    step(2)
    before, bad[0] = everything(engine), True
    facts = step(3)
    same = all(torch.equal(old, new) for old, new in zip(before, everything(engine), strict=True))
    bad[0] = False
    after = step(4)
    moved = not all(torch.equal(old, new) for old, new in zip(before, everything(engine), strict=True))
    bad[0], said = True, ""
    try:
        step(99)
    except UserError as error:
        said = str(error)
    return {"skipped": facts["skipped"], "same": same, "after": after["loss"], "moved": moved, "said": said,
            "step": engine.step}  # fmt: skip


def save_without_room(out: str) -> dict[str, Any]:
    """A good save, a step, a save for which rank 1's disk has no room, and one for which it has again."""
    engine, stream, config = bodies.make(["variant=adpt"], "zero2", 1)
    bodies.advance(engine, stream, config, 1)
    first = checkpoint.save(Path(out), engine, {}, {}, keep=9)
    bodies.advance(engine, stream, config, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:  # files may not grow beyond this: the write fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        checkpoint.save(Path(out), engine, {}, {}, keep=9, output=Path("above"))
        said = "saved"
    except UserError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()  # rank 0 has tidied up
    left = sorted(os.listdir(Path(out) / "checkpoints"))
    dist.barrier()  # all have looked before the next save begins
    second = checkpoint.save(Path(out), engine, {}, {}, keep=9)
    return {"said": said, "left": left, "first": str(first), "second": str(second)}


SPIKE, SAVED, END = 12, 9, 15  # steps


def spiked(settings: list[str], json_name: str, out: str, source: str | None, limit: str = "10") -> dict[str, Any]:
    """Steps to END, from a checkpoint or from the start (then saved at SAVED); at SPIKE rank 1's losses are 60 times as large.

    With limit "ever", they are so from SPIKE on.
    """
    ever = limit == "ever"
    optimizer.FEWEST = 1
    engine, stream, config = bodies.make([*settings, f"train.spike={'10' if ever else limit}"], json_name, 1)
    meta = MetaStep(engine, config.meta) if config.variant.startswith("meta_") else None

    def factor() -> float:
        return 60.0 if dist.get_rank() == 1 and (engine.step == SPIKE or (ever and engine.step > SPIKE)) else 1.0

    engine.model.register_forward_hook(lambda _, __, found: (found[0] * factor(), found[1] * factor()))

    def step(until: int) -> list[dict[str, float]]:
        if config.treatment == "pcgrad":
            facts = []
            while engine.step < until:
                micro = [stream.batch(engine.step, *slice_) for slice_ in engine.slices(config.train.batch)]
                facts.append(dict(pcgrad_step(engine, micro, 0)))
            return facts
        return bodies.advance(engine, stream, config, until, meta)

    try:
        if source:
            checkpoint.load(Path(source), engine)
            facts = []
        else:
            facts = step(SAVED)
            checkpoint.save(Path(out), engine, {}, {}, keep=9)
        radius = meta.radius.radius if meta else 0.0
        facts += step(SPIKE)
        before, scale = everything(engine), engine.scale.state()
        facts += step(SPIKE + 1)
        unmoved = all(torch.equal(old, new) for old, new in zip(before, everything(engine), strict=True))
        found = {"unmoved": unmoved, "scale": engine.scale.state() == scale, "said": engine.spiked, "radius": radius}
        found |= {"skipped": engine.skipped}
        if ever:
            step(99)
        facts += step(END)
        moved = not all(torch.equal(old, new) for old, new in zip(before, everything(engine), strict=True))
        return found | {"moved": moved, "facts": facts, "seen": engine.spikes.seen, "end": everything(engine)}
    except UserError as error:
        return found | {"lost": str(error), "step": engine.step}
    finally:
        optimizer.FEWEST = 20


def with_a_clock_set_back(folder: str, words: list[str]) -> str:
    """Pretrains on this rank of the pool while every look at the clock shows an hour less; the message of a refusal, or ''."""
    import time

    import tqdm.std

    from tests.commands import call

    hours = itertools.count(int(time.time()), -3600)
    usual, tqdm.std.time, time.time = time.time, hours.__next__, hours.__next__  # type: ignore[attr-defined]
    try:
        return call("pretrain.main", folder, words)
    finally:
        tqdm.std.time = time.time = usual  # type: ignore[attr-defined]
