"""Faults of a run: NaN losses, no room for a checkpoint, damaged checkpoints; ranks killed and stopped."""

import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.engine import PATIENCE
from mlinterf_ds.errors import UserError
from tests.commands import arguments
from tests.faults import fault_bodies, kill_many
from tests.parity import bodies
from tests.ranks import pool


@pytest.mark.parametrize("variant, json_name", [("adpt", "zero1"), ("adpt", "zero3"), ("meta_adpt", "zero2")])
def test_a_nan_on_one_rank_is_skipped_by_all_and_ends_a_lost_run(variant: str, json_name: str) -> None:
    results = pool(2).run(fault_bodies.poisoned, variant, json_name)
    for found in results:
        assert found["skipped"] == 1 and found["same"], "masters and moments are bit-identical after a skipped step"
        assert found["moved"] and found["after"] == found["after"], "the next step counts again"
        assert f"not finite for {PATIENCE} steps in a row" in found["said"] and "lower train.lr" in found["said"]
        assert found["step"] == 4 + PATIENCE
    assert results[0]["after"] == results[1]["after"]


@pytest.mark.parametrize(
    "settings, json_name",
    [
        (["variant=adpt", "train.precision=fp16"], "zero2"),
        (["variant=adpt"], "zero3"),
        (["variant=meta_adpt", "meta.radius=0.01"], "zero1"),
        (["variant=meta_adpt", "meta.radius=0.01", "meta.order=theta_first"], "zero2"),
        (["variant=joint", "data.mixed=true", "treatment=pcgrad"], "zero1"),
    ],
    ids=["fp16", "zero3", "meta", "theta_first", "pcgrad"],
)
def test_a_spike_on_one_rank_is_skipped_by_all_and_resume_decides_the_same(settings, json_name, tmp_path: Path) -> None:
    """Nothing moves, not the loss scale either; the next step counts; from a checkpoint before it, digit for digit the same."""
    whole = pool(2).run(fault_bodies.spiked, settings, json_name, str(tmp_path), None)
    for found in whole:
        assert found["unmoved"] and found["scale"] and found["skipped"] == 1 and "is usual" in found["said"]
        assert found["moved"] and found["said"] == whole[0]["said"]
    taken = [facts for number, facts in enumerate(whole[0]["facts"]) if number != fault_bodies.SPIKE]
    for language, (count, mean, _) in whole[0]["seen"].items():
        losses = [facts[f"loss/{language}"] for facts in taken if facts.get(f"loss/{language}", math.nan) > 0]
        assert count == len(losses) and math.isclose(mean, sum(losses) / count, rel_tol=1e-9)
    saved = tmp_path / "checkpoints" / f"step-{fault_bodies.SAVED:08d}"
    for rank, found in enumerate(pool(2).run(fault_bodies.spiked, settings, json_name, "", str(saved))):
        assert found["skipped"] == 1 and str(found["facts"]) == str(whole[rank]["facts"][fault_bodies.SAVED :])
        assert all(torch.equal(a, b) for a, b in zip(found["end"], whole[rank]["end"], strict=True))


def test_spikes_without_end_end_the_run_and_may_be_allowed(tmp_path: Path) -> None:
    for found in pool(2).run(fault_bodies.spiked, ["variant=adpt"], "zero1", str(tmp_path), None, "ever"):
        assert f"is usual) for {PATIENCE} steps in a row" in found["lost"] and "raise train.spike=10" in found["lost"]
        assert found["step"] == fault_bodies.SPIKE + PATIENCE
    for found in pool(2).run(fault_bodies.spiked, ["variant=adpt"], "zero1", str(tmp_path), None, "none"):
        assert not found["unmoved"] and found["skipped"] == 0 and not found["said"]


def test_no_room_for_a_checkpoint_leaves_the_earlier_one(tmp_path: Path) -> None:
    for found in pool(2).run(fault_bodies.save_without_room, str(tmp_path)):
        assert "could not save" in found["said"] and "rank 1: " in found["said"] and "rank 0: " not in found["said"]
        assert "free some space" in found["said"] and "--set output=above --set resume=auto" in found["said"]
        assert found["left"] == ["step-00000001"], "nothing half-written stays"
        assert checkpoint.verify(Path(found["first"]))["updates"] == 1
        assert checkpoint.verify(Path(found["second"]))["updates"] == 2, "with room again, the same run saves"


def test_a_clock_that_is_set_back_changes_no_figure(tmp_path: Path) -> None:
    settings = [*kill_many.SETTINGS, "train.steps=4", "train.epoch_steps=2", "variant=joint", "output=run"]
    assert pool(1).run(fault_bodies.with_a_clock_set_back, str(tmp_path), arguments(*settings)) == [""]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"] and summary["seconds"] > 0 and summary["tokens_per_second"] > 0
    assert checkpoint.verify(checkpoint.find(tmp_path / "run"))["updates"] == 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("saved")
    pool(2).run(bodies.train, ["variant=adpt", "model.width=16", "model.ffn=32"], "zero1", 1, str(out), 1)
    folder = out / "checkpoints" / "step-00000001"
    return folder, bodies.weights(folder)


def damage(data: bytes, draw: random.Random) -> bytes:
    """Flip a bit, cut the end, repeat or drop a stretch, or put noise in."""
    kind, at = draw.choice(["flip", "cut", "repeat", "drop", "noise"]), draw.randrange(len(data))
    length = draw.randrange(1, 64)
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "repeat":
        return data[:at] + data[at : at + length] + data[at:]
    return data[:at] + (draw.randbytes(length) if kind == "noise" else b"") + data[at + length :]


def test_300_damaged_checkpoints_are_refused_or_still_right(saved, tmp_path: Path) -> None:
    source, truth = saved
    run_json = json.loads((source / "run.json").read_text())
    refused = 0
    for seed in range(300):
        draw = random.Random(seed)
        folder = tmp_path / "step-00000001"
        shutil.copytree(source, folder)
        file = folder / draw.choice(sorted(path.name for path in source.iterdir()))
        file.write_bytes(damage(file.read_bytes(), draw))
        try:
            state = checkpoint.verify(folder)
            found = bodies.weights(folder)
        except UserError as error:
            refused += 1
            assert str(folder) in str(error), (seed, error)
        else:
            assert state == run_json and found.keys() == truth.keys(), (seed, file.name)
            assert all(torch.equal(found[name], truth[name]) for name in truth), (seed, file.name)
        shutil.rmtree(folder)
    assert refused > 280, "a change inside white space or unread keys may pass, and little else"


@pytest.fixture()
def long_run(monkeypatch) -> None:
    """A run that saves at every step and declares a silent rank lost after 24 s."""
    settings = [*kill_many.SETTINGS[1:], "train.steps=3000", "train.save_steps=1", "parallel.timeout=0.4"]
    monkeypatch.setattr(kill_many, "SETTINGS", settings)


def wait_for(job, log: Path, ready, seconds: float):
    """What `ready()` gives as soon as it is true; the job must live till then."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline and job.poll() is None, log.read_text()[-3000:]
        time.sleep(0.005)
    return found


def test_a_rank_killed_inside_a_save(tmp_path: Path, long_run) -> None:
    """Down within 90 s, with the reason and the way on; what counts as a checkpoint is whole; the exit code tells."""
    job = kill_many.start(tmp_path, "saving", restarts=0)
    saved = tmp_path / "saving" / "checkpoints"

    def inside() -> bool:
        return any(saved.glob("*.partial")) and (saved / "step-00000002").is_dir()

    try:
        wait_for(job, tmp_path / "saving.log", inside, 300)
        os.kill(kill_many.carrying(f"{kill_many.MARK}={kill_many.mark('saving')}", "RANK=1")[0], signal.SIGKILL)
        assert job.wait(timeout=90) != 0
    finally:
        kill_many.end(job, "saving")
    assert checkpoint.verify(checkpoint.find(tmp_path / "saving"))["updates"] >= 2
    said = (tmp_path / "saving.log").read_text()
    reasons = [line for line in said.splitlines() if line.startswith("error: rank 0 failed: ")]
    assert reasons and "; go on with --set output=saving --set resume=auto" in reasons[-1], said[-3000:]
    assert "another rank, or the network to it, was lost (RuntimeError: " in reasons[-1] and "Traceback" not in said
    assert "Traceback" in (tmp_path / "saving" / "log" / "rank-0.log").read_text(), "a rank's log holds its failure"


def test_a_stopped_rank_is_declared_lost_and_the_run_goes_on(tmp_path: Path, long_run) -> None:
    """SIGSTOP: the others wait parallel.timeout, then all start again from the newest checkpoint."""
    log = tmp_path / "stopped.log"
    job = kill_many.start(tmp_path, "stopped", restarts=1)
    try:
        wait_for(job, log, lambda: (tmp_path / "stopped/checkpoints/step-00000002").is_dir(), 300)
        os.kill(kill_many.ranks("stopped", 0)[0], signal.SIGSTOP)
        wait_for(job, log, lambda: "starting all ranks again (1 of 1)" in log.read_text(), 0.4 * 60 + 60)
        wait_for(job, log, lambda: "resumed from stopped/checkpoints/step-" in log.read_text(), 300)
    finally:
        kill_many.end(job, "stopped")


@pytest.mark.timeout(1800)
def test_random_kills_end_as_the_run_left_alone(capsys) -> None:
    assert kill_many.main(["--kills", os.environ.get("KILLS", "2")]) == 0, capsys.readouterr().out
