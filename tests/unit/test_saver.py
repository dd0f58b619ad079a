"""Checkpoints that are written while training goes on: what they hold, when the run waits, how a failure is reported."""

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file

from mlinterf_ds.engine import checkpoint
from mlinterf_ds.errors import Fault, UserError
from mlinterf_ds.runtime.parallel import Layout


@pytest.fixture()
def engine(monkeypatch) -> Any:
    """An engine of one rank with one parameter group of three elements, at step 1."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda gathered, own: gathered.__setitem__(0, own))
    master = torch.tensor([1.0, 2.0, 3.0])
    moments = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.ones(3), "step": torch.tensor(1.0)}
    spaces = {"shared": SimpleNamespace(masters=[master], segments=[])}
    optimizers = {"shared": SimpleNamespace(state={master: moments})}
    counters = {"updates": 1, "skipped": 0, "stage": 1, "precision": "fp32"}
    scale, spikes = SimpleNamespace(state=dict), SimpleNamespace(seen={})
    return SimpleNamespace(
        device=torch.device("cpu"),
        step=1,
        spaces=spaces,
        optimizers=optimizers,
        layout=Layout(0, 1, 1),
        scale=scale,
        spikes=spikes,
        settle=lambda: None,
        **counters,
    )


@pytest.fixture()
def disk(monkeypatch) -> SimpleNamespace:
    """Shards are written only while `disk.free` is set, and not at all where `disk.full`."""
    disk, write = SimpleNamespace(free=threading.Event(), full=False), checkpoint.save_file

    def slow(*arguments: Any, **more: Any) -> None:
        assert disk.free.wait(30)
        if disk.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments, **more)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    return disk


def test_a_run_that_goes_back_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    """Else its own next ones would be pruned as the oldest, and resume=auto would load the abandoned branch."""
    folder = tmp_path / "checkpoints"
    for step in (3, 4, 5):
        (folder / f"step-{step:08}").mkdir(parents=True)
    checkpoint.mark_best(tmp_path, folder / "step-00000004")
    assert [path.name for path in checkpoint.set_aside_later(folder / "step-00000003")] == [
        "step-00000004.abandoned",
        "step-00000005.abandoned",
    ]
    assert checkpoint.find(tmp_path).name == "step-00000003"
    (folder / "step-00000004").mkdir()
    assert checkpoint.find(tmp_path, "best").name == "step-00000004" and not (folder / "best").exists()
    checkpoint.mark_best(tmp_path, folder / "step-00000004")
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.find(tmp_path).name == "step-00000004" and not (folder / "step-00000003").exists()
    (folder / "step-00000003").mkdir()
    assert [path.name for path in checkpoint.set_aside_later(folder / "step-00000003")] == ["step-00000004.abandoned1"]


def test_what_a_killed_save_left_goes_with_the_next_one(engine: Any, disk: SimpleNamespace, tmp_path: Path) -> None:
    """The resumed run may never come to that step again, so that each such save would take its room for good."""
    (tmp_path / "checkpoints" / "step-00000000.partial").mkdir(parents=True)
    disk.free.set()
    checkpoint.save(tmp_path, engine, {}, {}, keep=9)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


@pytest.mark.parametrize(
    "number, lasts", [(errno.ENOSPC, True), (errno.EACCES, True), (errno.EIO, False), (errno.ESTALE, False)]
)
def test_a_disk_that_fails_may_be_tried_again(
    number: int, lasts: bool, engine: Any, tmp_path: Path, monkeypatch
) -> None:
    """Under `restarts`, a user's mistake is final; a Fault is not."""

    words = f"I/O error: {os.strerror(number)} (os error {number})"  # as safetensors says it
    for error in (OSError(number, os.strerror(number)), SafetensorError(words)):
        monkeypatch.setattr(checkpoint, "save_file", mock.Mock(side_effect=error))
        with pytest.raises(UserError, match=os.strerror(number)) as refused:
            checkpoint.save(tmp_path, engine, {}, {}, keep=9)
        assert isinstance(refused.value, Fault) is not lasts


def train(engine: Any) -> None:
    """Changes everything that a checkpoint holds, in place."""
    engine.step = engine.updates = engine.updates + 1
    for master, moments in engine.optimizers["shared"].state.items():
        for tensor in (master, *moments.values()):
            tensor.add_(1)


def test_a_checkpoint_holds_the_step_at_which_it_began(engine: Any, disk: SimpleNamespace, tmp_path: Path) -> None:
    """Training goes on at once; the folder appears whole, after the disk is done; the next save waits for it."""
    state, folder = {"history": [1]}, tmp_path / "checkpoints"
    with checkpoint.Saver(tmp_path, keep=9) as saver:
        saver.begin(engine, state, {}, best=True)
        state["history"].append(2)
        train(engine)
        assert os.listdir(folder) == ["step-00000001.partial"] and not saver.failed
        threading.Timer(0.2, disk.free.set).start()
        saver.begin(engine, state, {})
        assert checkpoint.find(tmp_path, "best") == folder / "step-00000001", (
            "the first is whole before the second begins"
        )
    saved = [checkpoint.verify(folder / f"step-0000000{step}") for step in (1, 2)]
    assert [(run["updates"], run["history"]) for run in saved] == [(1, [1]), (2, [1, 2])]
    first, second = (load_file(folder / f"step-0000000{step}" / "shard-00000.safetensors") for step in (1, 2))
    assert first["shared/0/master"].tolist() == [1, 2, 3] and first["shared/0/step"].tolist() == [1]
    assert all(torch.equal(first[key] + 1, second[key]) for key in first), "the copies' memory is used again"
    assert not list(folder.glob("*.partial"))


def test_a_checkpoint_holds_what_a_step_leaves_when_it_is_settled(
    engine: Any, disk: SimpleNamespace, tmp_path: Path
) -> None:
    """Until then a language's masters and moments may be on their way to host memory."""
    disk.free.set()
    engine.settle = lambda: engine.spaces["shared"].masters[0].fill_(7)
    checkpoint.save(tmp_path, engine, {}, {}, keep=9)
    assert load_file(checkpoint.find(tmp_path) / "shard-00000.safetensors")["shared/0/master"].tolist() == [7, 7, 7]


def test_all_of_a_checkpoint_is_on_the_disk_before_an_older_one_goes(
    engine: Any, disk: SimpleNamespace, tmp_path: Path, monkeypatch: Any
) -> None:
    """And one that another program still reads, which cannot be removed, does not end the run."""
    disk.free.set()
    checkpoint.save(tmp_path, engine, {}, {}, keep=1)
    folder, flushed = tmp_path / "checkpoints", []
    train(engine)

    def flush(path: Path) -> None:
        flushed.append((path.name, sorted(found.name for found in folder.glob("step-*"))))

    monkeypatch.setattr(checkpoint, "flush", flush)
    checkpoint.save(tmp_path, engine, {}, {}, keep=1)
    assert flushed == [
        ("complete.json", ["step-00000001", "step-00000002.partial"]),
        ("checkpoints", ["step-00000001", "step-00000002"]),
    ]
    assert os.listdir(folder) == ["step-00000002"]
    train(engine)

    def busy(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    monkeypatch.setattr(os, "rmdir", busy)
    checkpoint.save(tmp_path, engine, {}, {}, keep=1)
    assert checkpoint.find(tmp_path).name == "step-00000003"


def test_training_waits_where_a_copy_would_take_too_much_memory(
    engine: Any, disk: SimpleNamespace, tmp_path: Path, monkeypatch: Any
) -> None:
    """On a CPU; then no tensor is copied, and a failure is told as ever."""
    monkeypatch.setattr(checkpoint, "MOST_COPIED", 11)  # the master alone has 12 bytes
    with checkpoint.Saver(tmp_path, keep=9) as saver:
        threading.Timer(0.2, disk.free.set).start()
        saver.begin(engine, {}, {})
        assert disk.free.is_set() and not saver._copies
        train(engine)
    shard = load_file(checkpoint.find(tmp_path) / "shard-00000.safetensors")
    assert shard["shared/0/master"].tolist() == [1, 2, 3] and engine.spaces["shared"].masters[0].tolist() == [2, 3, 4]
    disk.full = True
    saver.begin(engine, {}, {})
    with pytest.raises(UserError, match="No space left"):
        saver.finish()


def test_a_failed_write_is_known_at_the_next_step_and_told_once(
    engine: Any, disk: SimpleNamespace, tmp_path: Path
) -> None:
    saver = checkpoint.Saver(tmp_path, keep=9)
    disk.full = True
    saver.begin(engine, {}, {})
    assert not saver.failed
    disk.free.set()
    saver._writing.thread.join()  # type: ignore[union-attr]
    assert saver.failed
    with pytest.raises(UserError, match=r"could not save .*step-00000001: rank 0: .*No space left.*free some space"):
        saver.finish()
    assert not saver.failed and not os.listdir(tmp_path / "checkpoints"), "nothing half-written stays"
    disk.full = False
    saver.begin(engine, {}, {})
    saver.finish()
    assert checkpoint.verify(checkpoint.find(tmp_path))["updates"] == 1


def test_a_folder_that_cannot_be_made_is_told_at_once(engine: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    with pytest.raises(UserError, match="could not save .*rank 0: "), checkpoint.Saver(tmp_path, keep=9) as saver:
        saver.begin(engine, {}, {})


def test_a_run_that_fails_meanwhile_still_completes_its_checkpoint(
    engine: Any, disk: SimpleNamespace, tmp_path: Path
) -> None:
    disk.free.set()
    with pytest.raises(ZeroDivisionError), checkpoint.Saver(tmp_path, keep=9) as saver:
        saver.begin(engine, {}, {})
        raise ZeroDivisionError
    assert checkpoint.verify(checkpoint.find(tmp_path))["updates"] == 1
