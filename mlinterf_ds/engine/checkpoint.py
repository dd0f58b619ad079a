"""Checkpoints: atomic, versioned folders of safetensors shards that load at any layout; nothing is unpickled.

    <run>/checkpoints/step-00000600/
        run.json                 resolved configuration, counters, languages; what the run needs to go on
        tokenizer.model          the vocabulary the weights belong to
        shard-00000.safetensors  rank 0's fp32 masters and Adam moments, and which parameter each element belongs to
        complete.json            written last: size and digest of every file
    <run>/checkpoints/best       the name of the best one by validation loss

Every element is stored with its address (parameter, position), so a checkpoint is read by name: at the layout that
saved it this is a copy, at another one a re-slicing (tensor-parallel parameters along their `partition_dim`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mlinterf_ds.engine.space import FlatSpace
from mlinterf_ds.engine.weights import Source, Weights
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import PARTIAL, check_files, flushed_facts, write_bytes
from mlinterf_ds.ranks import agreed

if TYPE_CHECKING:  # reading a checkpoint needs neither DeepSpeed nor megatron
    from mlinterf_ds.engine.engine import Engine

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
Found = TypeVar("Found")


def save(run: Path, engine: Engine, state: Mapping[str, Any], files: Mapping[str, Path], keep: int) -> Path:
    """Write <run>/checkpoints/step-N from all ranks; it appears whole or not at all. Returns its path."""
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
            (partial / "run.json").write_text(json.dumps({"format": FORMAT, **_counters(engine), **state}, indent=1))
            for name, source in files.items():
                shutil.copyfile(source, partial / name)
            listed |= flushed_facts([partial / name for name in ("run.json", *files)])
        return listed

    def complete() -> None:
        if rank == 0:
            listed = {name: facts for digest in found for name, facts in digest.items()}
            (partial / "complete.json").write_text(json.dumps({"format": FORMAT, "files": listed}, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            prune(run, keep)

    try:
        _on_all(begin)
        found = _on_all(write)
        _on_all(complete)
    except UserError as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"could not save {target}: {error}; earlier checkpoints are untouched: free some space, then "
            f"continue with --set output={run} --set resume=auto"
        ) from None
    return target


def _on_all(work: Callable[[], Found]) -> list[Found]:
    """What `work` gives on every rank; if files fail it on any, a UserError on all of them. A barrier, too."""
    done, problem = None, ""
    try:
        done = work()
    except (OSError, SafetensorError) as error:
        problem = f"rank {dist.get_rank()}: {error}"
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (done, problem))
    if problems := [why for _, why in found if why]:
        raise UserError("; ".join(problems))
    return [part for part, _ in found]


def _counters(engine: Engine) -> dict[str, Any]:
    return {
        "updates": engine.updates,
        "skipped": engine.skipped,
        "loss_scale": engine.scale.state(),
        "losses": engine.spikes.seen,
        "layout": asdict(engine.layout) | {"stage": engine.stage, "precision": engine.precision},
    }


def _write_shard(folder: Path, engine: Engine, rank: int) -> Path | None:
    tensors: dict[str, Tensor] = {}
    table = []
    for name, space in engine.spaces.items():
        if isinstance(space, FlatSpace) and space.partitions == 1 and engine.layout.data_rank != 0:
            continue  # a replica: data-parallel rank 0 writes it
        for shard, master in enumerate(space.masters):
            kept = engine.optimizers[name].state[master]
            key = f"{name}/{shard}"
            tensors[f"{key}/master"] = master.detach()
            tensors[f"{key}/step"] = kept["step"].detach().clone().reshape(1)
            for moment in MOMENTS:
                tensors[f"{key}/{moment}"] = kept[moment]
        table += [{"space": name, **asdict(segment)} for segment in space.segments]
    if not tensors:
        return None
    path = folder / f"shard-{rank:05d}.safetensors"
    metadata = {"segments": json.dumps(table), "tensor_rank": str(engine.layout.tensor_rank)}
    save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, path, metadata=metadata)
    return path


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    best = _best_name(run)
    for path in _all(run)[:-keep]:
        if path.name != best:
            shutil.rmtree(path)


def mark_best(run: Path, checkpoint: Path) -> None:
    """Remember this checkpoint as the best of the run."""
    write_bytes(run / "checkpoints" / "best", checkpoint.name.encode())


def _best_name(run: Path) -> str:
    pointer = run / "checkpoints" / "best"
    return pointer.read_text().strip() if pointer.is_file() else ""


def _all(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit())


def find(path: str | Path, prefer: str = "newest") -> Path:
    """The checkpoint meant by a checkpoint folder or a run's output folder (its newest, or its best)."""
    folder = Path(path)
    if (folder / "complete.json").is_file() or folder.name.startswith("step-"):
        return folder
    found = _all(folder)
    best = folder / "checkpoints" / _best_name(folder)
    if prefer == "best" and best in found:
        return best
    if not found:
        raise UserError(
            f"{folder}: no checkpoint here; expected a run's output folder or one of its checkpoints/step-*"
        )
    return found[-1]


def verify(path: Path) -> dict[str, Any]:
    """run.json of a checkpoint all of whose files are there and unaltered; else an error naming file and remedy."""
    with refusing(f"{path}: not a checkpoint of mlinterf_ds", _fallback(path)):
        listed = json.loads((path / "complete.json").read_bytes())
        if listed["format"] != FORMAT:
            raise UserError(f"{path}: checkpoint format {listed['format']}; this version reads format {FORMAT}")
        check_files(path, listed["files"], _fallback(path))
        state: dict[str, Any] = json.loads((path / "run.json").read_bytes())
    return state


def _fallback(path: Path) -> str:
    earlier = [other for other in _all(path.parent.parent) if other.name < path.name]
    return f"; the one before it is {earlier[-1]}: --set resume={earlier[-1]}" if earlier else ""


def load(
    path: Path, engine: Engine, *, moments: bool = True, missing: bool = False, state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fill the engine's masters (and moments, counters) from a checkpoint, then the working weights; its `state`.

    missing=True leaves parameters that the checkpoint does not have as they were initialised (a classifier).
    state: what `verify` said of the checkpoint, if it was asked just now: every file is read for it.
    """
    state = state or agreed(lambda: verify(path))
    source = Source(path)
    fill(engine, source, ("master", *MOMENTS) if moments else ("master",), missing)
    if moments:
        for name, space in engine.spaces.items():
            for segment in space.segments:
                kept = engine.optimizers[name].state[space.masters[segment.shard]]
                kept["step"].fill_(source.steps(segment.name))
        engine.updates, engine.skipped = int(state["updates"]), int(state["skipped"])
        engine.scale.load(state["loss_scale"])
        engine.spikes.seen = state.get("losses", {})  # older ones have none
    return state


def fill(engine: Engine, source: Weights, kinds: Sequence[str] = ("master",), missing: bool = False) -> None:
    """Fill the engine's masters (and moments) from any source, then the working weights.

    missing=True leaves parameters that the source does not have as they were initialised.
    """
    for name, space in engine.spaces.items():
        for segment in space.segments:
            if missing and not source.has(segment.name):
                continue
            master = space.masters[segment.shard]
            for kind in kinds:
                target = master.detach() if kind == "master" else engine.optimizers[name].state[master][kind]
                piece = source.read(segment, kind, engine.layout.tensor, engine.layout.tensor_rank)
                target[segment.offset : segment.offset + segment.length].copy_(piece)
        space.write()
