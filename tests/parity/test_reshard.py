"""A checkpoint of any layout has one canonical form, bit for bit, and goes on from it at any layout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.reshard import reshard
from mlinterf_ds.errors import UserError
from tests.parity import bodies, reshard_bodies
from tests.ranks import pool

KINDS = ("plain", "meta")
LAYOUTS = [(tensor, data, stage) for tensor in (1, 2) for data in (1, 2) for stage in (1, 2, 3)]
STEP = f"checkpoints/step-{reshard_bodies.SAVED_AT:08d}"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory):
    """kind -> (checkpoint folder, truth, stepped spaces, losses to come)."""
    found = {}
    for kind in KINDS:
        out = tmp_path_factory.mktemp(kind)
        found[kind] = (out / STEP, *pool(1).run(reshard_bodies.original, kind, str(out))[0])
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def canonical(originals, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """kind -> the canonical form of the original, by file."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("canonical") / kind
        reshard(originals[kind][0], folder, 1)
        found[kind] = contents(folder)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_canonical_form_holds_what_the_model_and_the_optimizer_held(
    originals, canonical, kind: str, tmp_path
) -> None:
    """Read with safetensors alone: every parameter whole, in its own tensor; languages never stepped included."""
    source, truth, stepped, _ = originals[kind]
    reshard(source, tmp_path / "one", 1)
    assert checkpoint.verify(tmp_path / "one")["updates"] == reshard_bodies.SAVED_AT
    with safe_open(tmp_path / "one" / "shard-00000.safetensors", framework="pt") as file:
        rows = json.loads(file.metadata()["segments"])
        assert sorted(row["name"] for row in rows) == sorted(truth["master"])
        for row in rows:
            key = f"{row['space']}/{row['shard']}"
            for number, values in truth.items():
                assert torch.equal(file.get_tensor(f"{key}/{number}"), values[row["name"]].reshape(-1)), (row, number)
            expected = reshard_bodies.SAVED_AT if row["space"] == "shared" else row["space"] in stepped
            assert (file.get_tensor(f"{key}/step").item() > 0) == bool(expected)
    assert {row["space"] for row in rows} == {"shared", *bodies.LANGUAGES} > stepped, "one language was never stepped"


@pytest.mark.parametrize("tensor, data, stage", LAYOUTS)
def test_every_layout_to_one_form_and_back(originals, canonical, tmp_path, tensor: int, data: int, stage: int) -> None:
    sources = {kind: str(originals[kind][0]) for kind in KINDS}
    losses = pool(tensor * data).run(reshard_bodies.through, f"zero{stage}", tensor, sources, str(tmp_path))
    for kind in KINDS:
        assert contents(tmp_path / kind / "canonical") == canonical[kind], "as saved at this layout"
        reshard(tmp_path / kind / "again" / STEP, tmp_path / kind / "again" / "canonical", 1)
        assert contents(tmp_path / kind / "again" / "canonical") == canonical[kind], "after going back to this layout"
        for found in losses:
            assert found[kind] == pytest.approx(originals[kind][3], rel=2e-5)
    if (tensor, data, stage) == (2, 2, 3):
        check_two_shards(tmp_path / "plain", canonical["plain"])


def check_two_shards(folder: Path, wanted: dict[str, bytes]) -> None:
    """The form for two tensor-parallel ranks is the same from a shattered checkpoint and from the canonical one."""
    reshard(folder / "saved" / STEP, folder / "direct", 2)
    reshard(folder / "canonical", folder / "indirect", 2)
    assert contents(folder / "direct") == contents(folder / "indirect")
    assert "shard-00001.safetensors" in contents(folder / "direct")
    reshard(folder / "direct", folder / "back", 1)
    assert contents(folder / "back") == wanted


def test_it_never_overwrites_and_leaves_nothing_half_done(originals, tmp_path: Path, monkeypatch) -> None:
    source = originals["plain"][0]
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="taken exists and is never overwritten"):
        reshard(source, tmp_path / "taken", 1)
    with pytest.raises(UserError, match=r"--tp 3: does not divide dimension 0 of .*"):
        reshard(source, tmp_path / "three", 3)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlinterf_ds.engine.reshard.digests", full)
    with pytest.raises(UserError, match=r"could not write .*No space left on device.*untouched"):
        reshard(source, tmp_path / "full", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_the_command_refuses_a_damaged_source_and_needs_no_deepspeed(originals, tmp_path: Path) -> None:
    tool = str(Path(__file__).resolve().parents[2] / "tools" / "reshard.py")
    watched = f"import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path({tool!r}, run_name='__main__'); " \
        "print(sorted({'deepspeed', 'megatron', 'mlflow'} & sys.modules.keys()))"  # fmt: skip
    source = originals["plain"][0]
    done = subprocess.run(
        [sys.executable, "-c", watched, tool, str(source), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "(step 2) is now" in done.stdout and done.stdout.endswith("[]\n"), done.stderr
    shard = tmp_path / "out" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = subprocess.run(
        [sys.executable, tool, str(tmp_path / "out"), str(tmp_path / "next")], capture_output=True, text=True
    )
    assert done.returncode == 2 and "truncated?" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "next").exists()
