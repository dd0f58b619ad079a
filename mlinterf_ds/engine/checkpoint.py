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

import errno
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mlinterf_ds.engine.optimizer import kept
from mlinterf_ds.engine.space import FlatSpace
from mlinterf_ds.engine.transfers import host_memory
from mlinterf_ds.engine.weights import CheckpointReader, Weights
from mlinterf_ds.errors import Fault, UserError, refusing, resumption
from mlinterf_ds.files import PARTIAL, check_files, flush, flushed_facts, read_json, write_bytes, write_json
from mlinterf_ds.ranks import agreed, agreed_by_all

if TYPE_CHECKING:  # reading a checkpoint needs neither DeepSpeed nor megatron
    from mlinterf_ds.engine.engine import Engine

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
LASTING = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.EFBIG,
)  # a user mends these
POLL = 0.05  # seconds between rank 0's looks for the other ranks' files
PATIENCE = 10.0  # seconds that a failing run waits for the save under way
MOST_COPIED = 1 << 30  # bytes that a save copies within host memory; more is written while training there waits

Shard = tuple[dict[str, Tensor], dict[str, str]]  # a rank's tensors, and the metadata of their file


class Saver:
    """Saves a run's checkpoints while the run goes on, never two at once. All ranks call the same methods in the same order.

    Training waits only while masters and moments are copied to host memory (on a CPU, where a copy of more than MOST_COPIED
    bytes would take memory that training needs: while they are written). A thread of each rank then writes and hashes
    that rank's files. The threads use no collectives, because training uses them meanwhile: a thread leaves a file in the
    unfinished folder when it is done, and rank 0's thread, once it sees all of these, lists every file in complete.json and
    renames the folder. A Saver is a context manager that waits at its end for the save under way.
    """

    def __init__(self, run: Path, keep: int, output: Path | None = None):
        """keep: how many of the newest checkpoints stay. output: the folder that a user names to go on, if that is not `run`."""
        self.run, self.keep, self.output = run, keep, output or run
        self._writing: _Writing | None = None  # the save under way
        self._copies: dict[str, Tensor] = {}  # this rank's tensors in host memory, which every save overwrites

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.finish()
        elif self._writing:
            self._writing.thread.join(PATIENCE)  # other ranks may be lost; an unfinished folder is no checkpoint

    @property
    def failed(self) -> bool:
        """Whether this rank failed to save; `finish` then raises the reason on all ranks."""
        return self._writing is not None and bool(self._writing.problem)

    def begin(self, engine: Engine, state: Mapping[str, Any], files: Mapping[str, Path], best: bool = False) -> None:
        """Begins to save this step, once the save before it has ended.

        state: what goes into run.json beside the engine's counters. files: name to file, copied into the checkpoint.
        best: whether the checkpoint is then marked as the best of the run.
        """
        self.finish()
        engine.settle()  # idle languages are in host memory then
        writing = _Writing(self.run, self.keep, self.output, engine.step, best)
        tensors, metadata = _shard(engine)
        copied = engine.device.type != "cpu" or sum(tensor.nbytes for tensor in tensors.values()) <= MOST_COPIED
        writing.begin((self._copy(tensors) if copied else tensors, metadata), _run_json(engine, state), files)
        self._writing = writing
        if not copied:
            writing.released.wait()

    def finish(self) -> None:
        """Waits for the save under way, if there is one. Raises UserError on all ranks if one of them could not save."""
        if self._writing:
            writing, self._writing = self._writing, None
            writing.finish()

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for key, tensor in tensors.items():
            if key not in self._copies or self._copies[key].shape != tensor.shape:
                self._copies[key] = host_memory(tensor, tensor.device)
            self._copies[key].copy_(tensor, non_blocking=True)
        if any(tensor.device.type != "cpu" for tensor in tensors.values()):
            from deepspeed.accelerator import get_accelerator

            get_accelerator().synchronize()
        return {key: self._copies[key] for key in tensors}


def save(
    run: Path,
    engine: Engine,
    state: Mapping[str, Any],
    files: Mapping[str, Path],
    keep: int,
    output: Path | None = None,
) -> Path:
    """Writes <run>/checkpoints/step-N from all ranks, which appears whole or not at all; returns its path (see `Saver`)."""
    with Saver(run, keep, output) as saver:
        saver.begin(engine, state, files)
    return path_of(run, engine.step)


def path_of(run: Path, step: int) -> Path:
    """The folder of the checkpoint of this step."""
    return run / "checkpoints" / f"step-{step:08d}"


def _number(error: Exception) -> int | None:
    """The system's number of an error; safetensors tells it in the message alone."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"os error (\d+)", str(error))
    return int(told[1]) if told else None


class _Writing:
    """One save: a thread on each rank writes that rank's files, and rank 0's completes the checkpoint."""

    def __init__(self, run: Path, keep: int, output: Path, step: int, best: bool):
        self.run, self.keep, self.output, self.best = run, keep, output, best
        self.target = path_of(run, step)
        self.unfinished = self.target.with_name(self.target.name + PARTIAL)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.problem = ""  # why this rank could not save
        self.lasting = False  # whether it could not if it tried again: the disk is full, or the folder is not ours
        self._written, self._abandoned = threading.Event(), threading.Event()
        self.released = threading.Event()  # set when the thread reads the tensors no more

    def begin(self, shard: Shard, run_json: str, files: Mapping[str, Path]) -> None:
        """Makes the unfinished folder and starts the thread. files: name to file, copied into the checkpoint."""
        if self.rank == 0:
            self._attempt(self._make_folder)
        self._refuse(self._problems())
        self._written.clear()
        self.released.clear()
        work = partial(self._attempt, self._save, shard, run_json, files)
        self.thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self.thread.start()

    def finish(self) -> None:
        """Waits until the checkpoint is complete. Raises UserError on all ranks if one of them could not write."""
        self._written.wait()
        if problems := self._problems():
            self._abandoned.set()
        self.thread.join()
        self._refuse(problems or self._problems())

    def _attempt(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:  # whatever it is, all ranks must learn of it
            known = isinstance(error, OSError | SafetensorError)
            self.problem = f"rank {self.rank}: {error if known else repr(error)}"
            self.lasting = _number(error) in LASTING
        finally:
            self.released.set()
            self._written.set()

    def _problems(self) -> list[tuple[str, bool]]:
        """The problem of each rank that has one, and whether it lasts."""
        gathered: list[Any] = [None] * self.ranks
        dist.all_gather_object(gathered, (self.problem, self.lasting))
        return [(problem, lasting) for problem, lasting in gathered if problem]

    def _refuse(self, problems: list[tuple[str, bool]]) -> None:
        if problems:
            if self.rank == 0:
                shutil.rmtree(self.unfinished, ignore_errors=True)
            kind = UserError if any(lasting for _, lasting in problems) else Fault
            raise kind(
                f"could not save {self.target}: {'; '.join(problem for problem, _ in problems)}; earlier checkpoints are untouched: free some "
                f"space, then {resumption(self.output)}"
            )

    def _make_folder(self) -> None:
        for left in self.unfinished.parent.glob(
            f"step-*{PARTIAL}"
        ):  # of a run that was killed while it saved this or another step
            shutil.rmtree(left, ignore_errors=True)
        self.unfinished.mkdir(parents=True)

    def _save(self, shard: Shard, run_json: str, files: Mapping[str, Path]) -> None:
        tensors, metadata = shard
        paths = []
        if tensors:
            paths.append(self.unfinished / f"shard-{self.rank:05d}.safetensors")
            save_file(tensors, paths[0], metadata=metadata)
        self.released.set()
        if self.rank:
            return write_json(self._list_of(self.rank), flushed_facts(paths))
        for name, source in files.items():
            shutil.copyfile(source, self.unfinished / name)
        (self.unfinished / "run.json").write_text(run_json, "utf-8")
        listed = flushed_facts([*paths, *(self.unfinished / name for name in ("run.json", *files))])
        self._written.set()
        for rank in range(1, self.ranks):
            while not self._list_of(rank).is_file():
                if self._abandoned.wait(POLL):
                    return None
            listed |= read_json(self._list_of(rank))
        return self._complete(listed)

    def _list_of(self, rank: int) -> Path:
        """The file that tells rank 0 that a rank has written its part; it holds the facts of that rank's files."""
        return self.unfinished / f"rank-{rank:05d}.json"

    def _complete(self, listed: dict[str, Any]) -> None:
        for rank in range(1, self.ranks):
            self._list_of(rank).unlink()
        complete = self.unfinished / "complete.json"
        complete.write_text(json.dumps({"format": FORMAT, "files": listed}, indent=1), "utf-8")
        flush(complete)
        shutil.rmtree(self.target, ignore_errors=True)
        os.replace(self.unfinished, self.target)
        flush(self.target.parent)  # before an older one goes
        if self.best:
            mark_best(self.run, self.target)
        prune(self.run, self.keep)


def _run_json(engine: Engine, state: Mapping[str, Any]) -> str:
    counters = {
        "updates": engine.updates,
        "skipped": engine.skipped,
        "loss_scale": engine.scale.state(),
        "losses": engine.spikes.seen,
        "layout": asdict(engine.layout) | {"stage": engine.stage, "precision": engine.precision},
    }
    return json.dumps({"format": FORMAT, **counters, **state}, indent=1)


def _shard(engine: Engine) -> Shard:
    """This rank's masters, moments and segments; no tensors if other ranks save all of them."""
    tensors: dict[str, Tensor] = {}
    table = []
    for name, space in engine.spaces.items():
        if isinstance(space, FlatSpace) and engine.layout.data_rank != 0:
            continue  # a replica, which data-parallel rank 0 writes
        for shard, master in enumerate(space.masters):
            adam = engine.optimizers[name].state[master]
            key = f"{name}/{shard}"
            tensors[f"{key}/master"] = master.detach()
            tensors[f"{key}/step"] = adam["step"].detach().reshape(1)
            tensors |= {f"{key}/{moment}": adam[moment] for moment in MOMENTS if kept(adam[moment])}
        table += [{"space": name, **asdict(segment)} for segment in space.segments]
    metadata = {"segments": json.dumps(table), "tensor_rank": str(engine.layout.tensor_rank)}
    return {key: tensor.contiguous() for key, tensor in tensors.items()}, metadata


def prune(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the best one."""
    best = _best_name(run)
    for path in _all(run)[:-keep]:
        if path.name != best:
            # one that another program still reads may resist (NFS); the next save tries again
            shutil.rmtree(path, ignore_errors=True)


def set_aside_later(checkpoint: Path) -> list[Path]:
    """Renames the run's checkpoints of later steps, so that neither `find` nor `prune` takes them for the newest; their new paths."""
    run = checkpoint.parent.parent
    later = [path for path in _all(run) if path.name > checkpoint.name]
    if _best_name(run) in {path.name for path in later}:  # else another checkpoint of that step would count as the best
        (run / "checkpoints" / "best").unlink()
    moved = []
    for path in later:
        names = (path.with_name(f"{path.name}.abandoned{number or ''}") for number in itertools.count())
        moved.append(path.rename(next(name for name in names if not name.exists())))
    return moved


def mark_best(run: Path, checkpoint: Path) -> None:
    """Notes this checkpoint as the best of the run."""
    write_bytes(run / "checkpoints" / "best", checkpoint.name.encode())


def _best_name(run: Path) -> str:
    pointer = run / "checkpoints" / "best"
    return pointer.read_text("utf-8").strip() if pointer.is_file() else ""


def _all(run: Path) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdigit())


def begun(run: Path) -> bool:
    """Whether a run has checkpoints; without, it was stopped before its first one."""
    return bool(_all(run))


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
    """The content of run.json, if all files of the checkpoint are there and unaltered; called by all ranks, if there are several.

    Each reads a share of the files: one alone could take longer than the others wait. Raises UserError, which names the file and the
    remedy, if not.
    """
    listed = list(agreed(lambda: _listed(path)).items())
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = dict(listed[rank::world])
    agreed_by_all(lambda: check_files(path, mine, _fallback(path)))
    return agreed(lambda: _state(path))


def _listed(path: Path) -> dict[str, Any]:
    """The facts of the checkpoint's files, by name."""
    with refusing(f"{path}: not a checkpoint of mlinterf_ds", _fallback(path)):
        listed = json.loads((path / "complete.json").read_bytes())
        if listed["format"] != FORMAT:
            raise UserError(f"{path}: checkpoint format {listed['format']}; this version reads format {FORMAT}")
        files: dict[str, Any] = dict(listed["files"])
    return files


def _state(path: Path) -> dict[str, Any]:
    with refusing(f"{path}: not a checkpoint of mlinterf_ds", _fallback(path)):
        state: dict[str, Any] = dict(json.loads((path / "run.json").read_bytes()))
    return state


def _fallback(path: Path) -> str:
    """The remedy for a damaged checkpoint: to use the checkpoint before it, if there is one."""
    earlier = [other for other in _all(path.parent.parent) if other.name < path.name]
    return (
        f"; the one before it is {earlier[-1]}: name that one (resume=, init=, checkpoint= or --checkpoint), or rename the damaged "
        f"folder (mv {path} {path}.damaged), so that resume=auto takes it"
        if earlier
        else ""
    )


def load(
    path: Path, engine: Engine, *, moments: bool = True, missing: bool = False, state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fills the engine's masters (and moments and counters) from a checkpoint, then its working weights; returns run.json.

    missing=True leaves parameters that the checkpoint does not have as they were initialised (a classifier). state: what
    `verify` returned of this checkpoint, which spares reading every file again.
    """
    state = state or verify(path)
    reader = CheckpointReader(path)
    fill(engine, reader, ("master", *MOMENTS) if moments else ("master",), missing)
    if moments:
        for name, space in engine.spaces.items():
            for segment in space.segments:
                adam = engine.optimizers[name].state[space.masters[segment.shard]]
                adam["step"].fill_(reader.steps(segment.name))
        engine.start_at(int(state["updates"]), int(state["skipped"]))
        if (
            state["layout"]["precision"] == engine.precision
        ):  # else the scale of another precision: this one's starts anew
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
                if not kept(target):
                    continue
                elements = weights.read(segment, kind, engine.layout.tensor, engine.layout.tensor_rank)
                target[segment.offset : segment.offset + segment.length].copy_(elements)
        space.write()
