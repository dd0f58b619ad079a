"""Checkpoints: atomic, versioned folders of safetensors shards that load at any layout; nothing is unpickled.

    <run>/checkpoints/step-00000600/
        run.json                 resolved configuration, counters, languages; what the run needs to go on
        tokenizer.model          the vocabulary the weights belong to
        shard-00000.safetensors  rank 0's fp32 masters and Adam moments, and which parameter each element belongs to
        complete.json            written last: size and digest of every file
    <run>/checkpoints/best       the name of the best checkpoint by validation loss

Every element is stored with its address (parameter, position), so a checkpoint is read by name: at the layout that
saved it reading is a copy, at another layout a re-slicing (of tensor-parallel parameters along their `partition_dim`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mlinterf_ds.engine.space import FlatSpace
from mlinterf_ds.engine.weights import CheckpointReader, Weights
from mlinterf_ds.errors import UserError, refusing, resumption, setting
from mlinterf_ds.files import PARTIAL, check_files, flushed_facts, write_bytes
from mlinterf_ds.ranks import agreed

if TYPE_CHECKING:  # reading a checkpoint needs neither DeepSpeed nor megatron
    from mlinterf_ds.engine.engine import Engine

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


def save(run: Path, engine: Engine, state: Mapping[str, Any], files: Mapping[str, Path], keep: int) -> Path:
    """Writes <run>/checkpoints/step-N from all ranks, which appears whole or not at all; returns its path.

    state: what goes into run.json beside the engine's counters. files: name to file, copied into the checkpoint. keep:
    how many of the newest checkpoints stay.
    """
    target = run / "checkpoints" / f"step-{engine.step:08d}"
    partial = target.with_name(target.name + PARTIAL)
    rank = dist.get_rank()

    def begin() -> None:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> dict[str, Any]:
        shard = _write_shard(partial, engine, rank)
        listed = flushed_facts([shard] if shard else [])
        if rank == 0:
            counters = {
                "updates": engine.updates,
                "skipped": engine.skipped,
                "loss_scale": engine.scale.state(),
                "losses": engine.spikes.seen,
                "layout": asdict(engine.layout) | {"stage": engine.stage, "precision": engine.precision},
            }
            (partial / "run.json").write_text(json.dumps({"format": FORMAT, **counters, **state}, indent=1), "utf-8")
            for name, source in files.items():
                shutil.copyfile(source, partial / name)
            listed |= flushed_facts([partial / name for name in ("run.json", *files)])
        return listed

    def complete() -> None:
        if rank == 0:
            listed = {name: facts for of_rank in written for name, facts in of_rank.items()}
            (partial / "complete.json").write_text(json.dumps({"format": FORMAT, "files": listed}, indent=1), "utf-8")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            prune(run, keep)

    try:
        _on_all(begin)
        written = _on_all(write)
        _on_all(complete)
    except UserError as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"could not save {target}: {error}; earlier checkpoints are untouched: free some space, then "
            f"{resumption(run)}"
        ) from None
    return target


def _on_all(work: Callable[[], Any]) -> list[Any]:
    """Does `work` on every rank and returns every rank's result; a file error on one rank is a UserError on all."""
    result, problem = None, ""
    try:
        result = work()
    except (OSError, SafetensorError) as error:
        problem = f"rank {dist.get_rank()}: {error}"
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (result, problem))
    if problems := [problem for _, problem in gathered if problem]:
        raise UserError("; ".join(problems))
    return [result for result, _ in gathered]


def _write_shard(folder: Path, engine: Engine, rank: int) -> Path | None:
    """Writes this rank's masters, moments and segments; returns the file, or None if other ranks hold all of them."""
    tensors: dict[str, Tensor] = {}
    table = []
    for name, space in engine.spaces.items():
        if isinstance(space, FlatSpace) and space.partitions == 1 and engine.layout.data_rank != 0:
            continue  # a replica, which data-parallel rank 0 writes
        for shard, master in enumerate(space.masters):
            adam = engine.optimizers[name].state[master]
            key = f"{name}/{shard}"
            tensors[f"{key}/master"] = master.detach()
            tensors[f"{key}/step"] = adam["step"].detach().clone().reshape(1)
            tensors |= {f"{key}/{moment}": adam[moment] for moment in MOMENTS}
        table += [{"space": name, **asdict(segment)} for segment in space.segments]
    if not tensors:
        return None
    path = folder / f"shard-{rank:05d}.safetensors"
    metadata = {"segments": json.dumps(table), "tensor_rank": str(engine.layout.tensor_rank)}
    save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, path, metadata=metadata)
    return path


def prune(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the best one."""
    best = _best_name(run)
    for path in _all(run)[:-keep]:
        if path.name != best:
            shutil.rmtree(path)


def mark_best(run: Path, checkpoint: Path) -> None:
    """Notes this checkpoint as the best of the run."""
    write_bytes(run / "checkpoints" / "best", checkpoint.name.encode())


def _best_name(run: Path) -> str:
    pointer = run / "checkpoints" / "best"
    return pointer.read_text("utf-8").strip() if pointer.is_file() else ""


def _all(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit())


def find(path: str | Path, prefer: str = "newest") -> Path:
    """The checkpoint that `path` names: a checkpoint's own folder, or a run's output folder.

    For a run's folder it is the newest checkpoint, or with prefer="best" the best one where one is marked.
    """
    folder = Path(path)
    if (folder / "complete.json").is_file() or folder.name.startswith("step-"):
        return folder
    saved, best = _all(folder), folder / "checkpoints" / _best_name(folder)
    if not saved:
        raise UserError(f"{folder}: no checkpoint here; expected a run's folder or one of its checkpoints/step-*")
    return best if prefer == "best" and best in saved else saved[-1]


def verify(path: Path) -> dict[str, Any]:
    """The content of run.json, if all files of the checkpoint are there and unaltered.

    Raises UserError, which names the file and the remedy, if not.
    """
    with refusing(f"{path}: not a checkpoint of mlinterf_ds", _fallback(path)):
        listed = json.loads((path / "complete.json").read_bytes())
        if listed["format"] != FORMAT:
            raise UserError(f"{path}: checkpoint format {listed['format']}; this version reads format {FORMAT}")
        check_files(path, listed["files"], _fallback(path))
        state: dict[str, Any] = json.loads((path / "run.json").read_bytes())
    return state


def _fallback(path: Path) -> str:
    """The remedy for a damaged checkpoint: to use the checkpoint before it, if there is one."""
    earlier = [other for other in _all(path.parent.parent) if other.name < path.name]
    return f"; the one before it is {earlier[-1]}: {setting('resume', earlier[-1])}" if earlier else ""


def load(
    path: Path, engine: Engine, *, moments: bool = True, missing: bool = False, state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fills the engine's masters (and moments and counters) from a checkpoint, then its working weights; returns run.json.

    missing=True leaves parameters that the checkpoint does not have as they were initialised (a classifier). state: what
    `verify` returned of this checkpoint, which spares reading every file again.
    """
    state = state or agreed(lambda: verify(path))
    reader = CheckpointReader(path)
    fill(engine, reader, ("master", *MOMENTS) if moments else ("master",), missing)
    if moments:
        for name, space in engine.spaces.items():
            for segment in space.segments:
                adam = engine.optimizers[name].state[space.masters[segment.shard]]
                adam["step"].fill_(reader.steps(segment.name))
        engine.updates, engine.skipped = int(state["updates"]), int(state["skipped"])
        engine.scale.load(state["loss_scale"])
        engine.spikes.seen = state.get("losses", {})  # older checkpoints have none
    return state


def fill(engine: Engine, weights: Weights, kinds: Sequence[str] = ("master",), missing: bool = False) -> None:
    """Fills the engine's masters (and moments) from any weights, then its working weights.

    missing=True leaves parameters that `weights` does not have as they were initialised.
    """
    for name, space in engine.spaces.items():
        for segment in space.segments:
            if missing and not weights.has(segment.name):
                continue
            master = space.masters[segment.shard]
            for kind in kinds:
                target = master.detach() if kind == "master" else engine.optimizers[name].state[master][kind]
                elements = weights.read(segment, kind, engine.layout.tensor, engine.layout.tensor_rank)
                target[segment.offset : segment.offset + segment.length].copy_(elements)
        space.write()
