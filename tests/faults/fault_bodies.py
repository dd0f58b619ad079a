"""What ranks of the pool run in tests of faults inside a step or a save."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.meta_step import MetaStep
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
        if meta:
            return bodies.advance_meta(engine, stream, config, meta, until)[-1]
        return bodies.advance(engine, stream, config, until)[-1]

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
        checkpoint.save(Path(out), engine, {}, {}, keep=9)
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
