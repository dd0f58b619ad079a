"""What every rank of the resharding test runs: one engine a layout, through which both kinds of checkpoint pass."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.engine import SHARED, Engine
from mlinterf_ds.engine.meta_step import MetaStep
from mlinterf_ds.engine.reshard import reshard
from tests.parity import bodies

SETTINGS = ["variant=meta_adpt", "meta.radius=1e-2"]  # a fixed radius: the controlled one is the job's to keep
SAVED_AT, STEPS = 2, 4


def advance(kind: str, until: int, engine: Engine, stream, config) -> list[float]:
    """The losses of `plain` or `meta` steps up to step `until`."""
    if kind == "plain":
        return [facts["loss"] for facts in bodies.advance(engine, stream, config, until)]
    facts = bodies.advance_meta(engine, stream, config, MetaStep(engine, config.meta), until)
    return [value for step in facts for value in (step["loss"], step["meta/validation"])]


def original(kind: str, out: str) -> tuple[dict[str, dict[str, torch.Tensor]], set[str], list[float]]:
    """On one rank: a checkpoint after SAVED_AT steps; its truth {kind of number: {parameter: value}}, read off the model
    and the optimizers; the languages stepped till then; the losses of the steps to come."""
    engine, stream, config = bodies.make(SETTINGS, "zero1", 1)
    stepped = {SHARED}
    for step in range(SAVED_AT):
        stepped |= {engine.languages[i] for i in stream.batch(step, 0, 1).step_languages}
        advance(kind, step + 1, engine, stream, config)
    checkpoint.save(Path(out), engine, {}, {}, keep=9)
    truth = {"master": {name: p.detach().clone() for name, p in engine.model.named_parameters()}}
    for moment in checkpoint.MOMENTS:
        truth[moment] = {
            s.name: engine.optimizers[name].state[space.masters[s.shard]][moment][s.offset : s.offset + s.length].clone()
            for name, space in engine.spaces.items()
            for s in space.segments
        }  # fmt: skip
    return truth, stepped, advance(kind, STEPS, engine, stream, config)


def through(json_name: str, tensor: int, sources: dict[str, str], out: str) -> dict[str, list[float]]:
    """Load each source, save it at this layout, bring that to canonical form, forget everything, load the canonical form,
    save again, and go on: the losses."""
    engine, stream, config = bodies.make(SETTINGS, json_name, tensor)
    losses = {}
    for kind, source in sources.items():
        folder = Path(out) / kind
        checkpoint.load(Path(source), engine)
        saved = checkpoint.save(folder / "saved", engine, {}, {}, keep=9)
        if dist.get_rank() == 0:
            reshard(saved, folder / "canonical", 1)
        dist.barrier()
        _forget(engine)
        checkpoint.load(folder / "canonical", engine)
        checkpoint.save(folder / "again", engine, {}, {}, keep=9)
        losses[kind] = advance(kind, STEPS, engine, stream, config)
    return losses


@torch.no_grad()
def _forget(engine: Engine) -> None:
    engine.updates = engine.skipped = 99
    for name, space in engine.spaces.items():
        for master in space.masters:
            for tensor in (master, *engine.optimizers[name].state[master].values()):
                tensor.fill_(torch.nan)
        space.write()
