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

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlinterf_ds.engine.zero import FlatSpace, Segment, Space
from mlinterf_ds.errors import UserError

if TYPE_CHECKING:  # whoever only reads checkpoints does without DeepSpeed and megatron
    from mlinterf_ds.engine.engine import Engine

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")


def save(run: Path, engine: Engine, state: Mapping[str, Any], files: Mapping[str, Path], keep: int) -> Path:
    """Write <run>/checkpoints/step-N from all ranks; it appears whole or not at all. Returns its path."""
    target = run / "checkpoints" / f"step-{engine.step:08d}"
    partial = target.with_name(target.name + ".partial")
    rank = dist.get_rank()
    problem = None
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    written: dict[str, Any] = {}
    try:
        shard = _write_shard(partial, engine, rank)
        written = digests([shard] if shard else [])
        if rank == 0:
            (partial / "run.json").write_text(json.dumps({"format": FORMAT, **_counters(engine), **state}, indent=1))
            for name, source in files.items():
                shutil.copyfile(source, partial / name)
            written |= digests([partial / name for name in ("run.json", *files)])
    except (OSError, SafetensorError) as error:
        problem = f"rank {rank}: {error}"
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (written, problem))
    problems = [why for _, why in found if why]
    if problems:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"could not save {target}: {'; '.join(problems)}; earlier checkpoints are untouched: free some space, then "
            f"continue with --set output={run} --set resume=auto"
        )
    if rank == 0:
        files_found = {name: facts for digest, _ in found for name, facts in digest.items()}
        (partial / "complete.json").write_text(json.dumps({"format": FORMAT, "files": files_found}, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        prune(run, keep)
    dist.barrier()
    return target


def _counters(engine: Engine) -> dict[str, Any]:
    return {
        "updates": engine.updates,
        "skipped": engine.skipped,
        "loss_scale": engine.scale.state(),
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


def digests(paths: list[Path]) -> dict[str, Any]:
    """Size and sha256 of files that are now on disk, by name: what complete.json lists."""
    facts = {}
    for path in paths:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        facts[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return facts


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    best = _best_name(run)
    for path in _all(run)[:-keep]:
        if path.name != best:
            shutil.rmtree(path)


def mark_best(run: Path, checkpoint: Path) -> None:
    """Remember this checkpoint as the best of the run."""
    pointer = run / "checkpoints" / "best"
    pointer.with_suffix(".partial").write_text(checkpoint.name)
    os.replace(pointer.with_suffix(".partial"), pointer)


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
    try:
        listed = json.loads((path / "complete.json").read_text())
        if listed["format"] != FORMAT:
            raise UserError(f"{path}: checkpoint format {listed['format']}; this version reads format {FORMAT}")
        for name, facts in listed["files"].items():
            file = path / Path(name).name
            if not file.is_file():
                raise UserError(f"{file} is missing{_fallback(path)}")
            if file.stat().st_size != facts["bytes"]:
                size = file.stat().st_size
                raise UserError(f"{file}: {size} bytes, expected {facts['bytes']} (truncated?){_fallback(path)}")
            with file.open("rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != facts["sha256"]:
                    raise UserError(f"{file}: altered since it was saved (sha256 differs){_fallback(path)}")
        return json.loads((path / "run.json").read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a checkpoint of mlinterf_ds ({error}){_fallback(path)}") from None


def _fallback(path: Path) -> str:
    earlier = [other for other in _all(path.parent.parent) if other.name < path.name]
    return f"; the one before it is {earlier[-1]}: --set resume={earlier[-1]}" if earlier else ""


def load(path: Path, engine: Engine, *, moments: bool = True, missing: bool = False) -> dict[str, Any]:
    """Fill the engine's masters (and moments, counters) from a checkpoint, then the working weights.

    missing=True leaves parameters that the checkpoint does not have as they were initialised (adapters added).
    """
    state: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            state[0] = verify(path)
        except UserError as error:
            state[1] = str(error)
    dist.broadcast_object_list(state)
    if state[1]:
        raise UserError(state[1])
    source = Source(path)
    for name, space in engine.spaces.items():
        _fill(space, engine.optimizers[name], source, engine, moments, missing)
        space.write()
    if moments:
        engine.updates, engine.skipped = int(state[0]["updates"]), int(state[0]["skipped"])
        engine.scale.load(state[0]["loss_scale"])
    return state[0]


def _fill(
    space: Space, optimizer: torch.optim.AdamW, source: Source, engine: Engine, moments: bool, missing: bool
) -> None:
    layout = engine.layout
    for segment in space.segments:
        if missing and segment.name not in source.addresses:
            continue
        master = space.masters[segment.shard]
        wanted = {"master": master.detach()}
        if moments:
            wanted |= {moment: optimizer.state[master][moment] for moment in MOMENTS}
            optimizer.state[master]["step"].fill_(source.steps(segment.name))
        for kind, target in wanted.items():
            piece = source.read(segment, kind, layout.tensor, layout.tensor_rank)
            target[segment.offset : segment.offset + segment.length].copy_(piece)


class Source:
    """Reads parameters by name out of a checkpoint's shards, whatever layout saved them."""

    def __init__(self, path: Path):
        self.path = path
        # name -> tensor rank -> [(segment, file, tensor key)]
        self.addresses: dict[str, dict[int, list[tuple[Segment, Any, str]]]] = {}
        for file in sorted(path.glob("shard-*.safetensors")):
            opened = safe_open(file, framework="pt")
            metadata = opened.metadata()
            for row in json.loads(metadata["segments"]):
                space = row.pop("space")
                segment = Segment(**row | {"shape": tuple(row["shape"])})
                ranks = self.addresses.setdefault(segment.name, {})
                ranks.setdefault(int(metadata["tensor_rank"]), []).append((segment, opened, f"{space}/{segment.shard}"))

    def steps(self, name: str) -> float:
        """Adam's step count of this parameter."""
        _, opened, key = next(iter(self._ranks(name).values()))[0]
        return float(opened.get_tensor(f"{key}/step").item())

    def _ranks(self, name: str) -> dict[int, list[tuple[Segment, Any, str]]]:
        if name not in self.addresses:
            raise UserError(f"{self.path}: has no parameter {name}; it was saved by another variant, language or shape")
        return self.addresses[name]

    def read(self, wanted: Segment, kind: str, tensor: int, tensor_rank: int) -> Tensor:
        """The elements of one segment (1-d fp32) of the 'master' or a moment, at the reader's layout."""
        ranks = self._ranks(wanted.name)
        saved = next(iter(ranks.values()))[0][0]
        if wanted.partition_dim is None or len(ranks) == tensor:
            mine = tensor_rank if wanted.partition_dim is not None else 0
            self._check(wanted, saved.shape)
            return self._range(ranks[mine], kind, wanted.start, wanted.length)
        local = part(self.whole(wanted.name, kind), wanted.partition_dim, tensor, tensor_rank)
        self._check(wanted, tuple(local.shape))
        return local.reshape(-1)[wanted.start : wanted.start + wanted.length]

    def whole(self, name: str, kind: str) -> Tensor:
        """The 'master' or a moment of a parameter (fp32, its full shape)."""
        ranks = self._ranks(name)
        (saved, _, _), *_ = ranks[min(ranks)]
        pieces = [
            self._range(ranks[rank], kind, 0, _numel(saved.shape)).view(saved.shape)
            for rank in (sorted(ranks) if saved.partition_dim is not None else [min(ranks)])
        ]
        return torch.cat(pieces, saved.partition_dim or 0) if len(pieces) > 1 else pieces[0]

    def _check(self, wanted: Segment, shape: tuple[int, ...]) -> None:
        if tuple(wanted.shape) != tuple(shape):
            raise UserError(
                f"{self.path}: {wanted.name} has shape {tuple(shape)}, this run's model wants {tuple(wanted.shape)}: "
                "use the model.*, vocabulary and languages of the run that saved it"
            )

    @staticmethod
    def _range(found: list[tuple[Segment, Any, str]], kind: str, start: int, length: int) -> Tensor:
        result = torch.empty(length, dtype=torch.float32)
        filled = 0
        for segment, opened, key in found:
            low, high = max(start, segment.start), min(start + length, segment.start + segment.length)
            if low < high:
                at = segment.offset + low - segment.start
                result[low - start : high - start] = opened.get_slice(f"{key}/{kind}")[at : at + high - low]
                filled += high - low
        if filled != length:
            raise UserError(f"{found[0][0].name}: {filled} of {length} elements are in the checkpoint: it is damaged")
        return result


def part(whole: Tensor, dim: int | None, tensor: int, rank: int) -> Tensor:
    """What tensor-parallel rank `rank` of `tensor` holds of a parameter (a view); dim None: all of it."""
    return whole if dim is None else whole.chunk(tensor, dim)[rank]


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
