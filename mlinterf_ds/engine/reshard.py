"""A checkpoint in one canonical form: the same bytes whatever layout saved it.

    shard-0000r.safetensors   what tensor-parallel rank r of N holds, parameter by parameter in the order of (space, name);
                              fp32 master, both moments and Adam's step of each; replicated parameters in rank 0's alone
    run.json                  as saved, with the layout of the new form

Reads and writes one parameter at a time, in one process without process groups.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mlinterf_ds.engine.checkpoint import FORMAT, MOMENTS, digests, verify
from mlinterf_ds.engine.source import Source, part
from mlinterf_ds.engine.space import Segment
from mlinterf_ds.errors import UserError

KINDS = ("master", *MOMENTS)


def reshard(source: Path, target: Path, tensor: int) -> dict[str, Any]:
    """Write the canonical form of checkpoint folder `source`, for `tensor` tensor-parallel ranks, as folder `target`.

    The new folder appears whole or not at all, and nothing that exists is overwritten. Returns its run.json.
    """
    if tensor < 1:
        raise UserError(f"--tp {tensor}: expected 1 or more tensor-parallel ranks")
    if target.exists():
        raise UserError(f"{target} exists and is never overwritten: choose another folder")
    state = verify(source)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write(source, partial, state, tensor)
        os.rename(partial, target)
    except OSError as error:
        raise UserError(
            f"could not write {target}: {error}; {source} is untouched: free some space or choose another folder"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return state


def _write(source: Path, folder: Path, state: dict[str, Any], tensor: int) -> None:
    found = Source(source)
    rows = _parameters(found, tensor)
    shards = [folder / f"shard-{rank:05d}.safetensors" for rank in range(tensor)]
    for rank, path in enumerate(shards):
        _write_shard(path, found, [row for row in rows if rank == 0 or row[1].partition_dim is not None], tensor, rank)
    state["layout"] = {"rank": 0, "world": tensor, "tensor": tensor, "precision": state["layout"]["precision"]}
    (folder / "run.json").write_text(json.dumps(state, indent=1))
    others = [
        name for name in json.loads((source / "complete.json").read_text())["files"] if not name.startswith("shard-")
    ]
    for name in others:
        if name != "run.json":
            shutil.copyfile(source / Path(name).name, folder / Path(name).name)
    facts = digests([*shards, *(folder / Path(name).name for name in others)])
    (folder / "complete.json").write_text(json.dumps({"format": FORMAT, "files": facts}, indent=1))


def _parameters(found: Source, tensor: int) -> list[tuple[str, Segment]]:
    """(space, the whole parameter of one tensor-parallel rank), in canonical order; `shard` counts them."""
    rows = []
    for name, ranks in found.addresses.items():
        saved, _, key = ranks[min(ranks)][0]
        shape, dim = list(saved.shape), saved.partition_dim
        if dim is not None:
            whole = shape[dim] * len(ranks)
            if whole % tensor:
                raise UserError(f"--tp {tensor}: does not divide dimension {dim} of {name}, {whole}")
            shape[dim] = whole // tensor
        rows.append((key.rpartition("/")[0], name, tuple(shape), dim))
    return [
        (space, Segment(name, shape, 0, torch.Size(shape).numel(), index, 0, dim))
        for index, (space, name, shape, dim) in enumerate(sorted(rows, key=lambda row: row[:2]))
    ]


def _write_shard(path: Path, found: Source, rows: list[tuple[str, Segment]], tensor: int, rank: int) -> None:
    """One safetensors file (8 bytes of header length, a JSON header, the data), streamed: no library writes by pieces."""
    table = [{"space": space, **asdict(segment)} for space, segment in rows]
    header: dict[str, Any] = {"__metadata__": {"segments": json.dumps(table), "tensor_rank": str(rank)}}
    position = 0
    for space, segment in rows:
        for kind, length in [*((kind, segment.length) for kind in KINDS), ("step", 1)]:
            header[f"{space}/{segment.shard}/{kind}"] = {
                "dtype": "F32", "shape": [length], "data_offsets": [position, position + 4 * length],
            }  # fmt: skip
            position += 4 * length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data start at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, segment in rows:
            for piece in _pieces(found, segment, tensor, rank):
                _write_floats(file, piece)


def _pieces(found: Source, segment: Segment, tensor: int, rank: int) -> Iterator[Tensor]:
    for kind in KINDS:
        yield part(found.whole(segment.name, kind), segment.partition_dim, tensor, rank)
    yield torch.tensor([found.steps(segment.name)])


def _write_floats(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().numpy().astype("<f4", copy=False).data)
