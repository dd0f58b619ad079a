"""A disk that is full where rank 0 alone writes a part of a checkpoint (a shard's: test_run_faults.py)."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mlinterf_ds.engine import checkpoint
from mlinterf_ds.errors import UserError
from mlinterf_ds.runtime.parallel import Layout


@pytest.mark.parametrize(
    "method, name", [("mkdir", "step-00000007.partial"), ("write_text", "complete.json")], ids=["mkdir", "complete"]
)
def test_no_room_where_rank_0_writes_alone(method: str, name: str, tmp_path: Path, monkeypatch) -> None:
    """As a shard's: the way on is told, nothing half-written stays; in one process, of an engine without weights."""
    usual = getattr(Path, method)

    def full(path: Path, *arguments, **more):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return usual(path, *arguments, **more)

    monkeypatch.setattr(Path, method, full)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, mine: found.__setitem__(0, mine))
    scale, spikes = SimpleNamespace(state=dict), SimpleNamespace(seen=0)
    counters = {"updates": 7, "skipped": 0, "scale": scale, "spikes": spikes, "stage": 1, "precision": "fp32"}
    counters["settle"] = lambda: None
    engine: Any = SimpleNamespace(step=7, spaces={}, layout=Layout(0, 1, 1), device=torch.device("cpu"), **counters)
    with pytest.raises(UserError, match="could not save .*rank 0: .*No space left") as refused:
        checkpoint.save(tmp_path, engine, {}, {}, keep=9)
    assert name in str(refused.value) and f"--set output={tmp_path} --set resume=auto" in str(refused.value)
    assert not list((tmp_path / "checkpoints").glob("*"))
    monkeypatch.setattr(Path, method, usual)
    saved = checkpoint.save(tmp_path, engine, {}, {}, keep=9)
    assert checkpoint.verify(saved)["format"] == checkpoint.FORMAT
