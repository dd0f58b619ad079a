"""Odd folders and machines: addresses of databases, commands that can be pasted, device lists, byte-order marks."""

from __future__ import annotations

import errno
import fcntl
import io
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from mlinterf_ds import predict
from mlinterf_ds.errors import UserError, check_surroundings, resumption, setting
from mlinterf_ds.files import replacing
from mlinterf_ds.runtime import session
from mlinterf_ds.study.folders import try_lock, wait_for_lock
from mlinterf_ds.tasks import TASKS
from mlinterf_ds.tasks.columns import in_memory
from mlinterf_ds.tracking import facts
from tools.doctor.hosts import read_hostfile, starters
from tools.doctor.machine import unlaunchable


@pytest.mark.parametrize("name", ["plain", "a%20b", "%41", "what?", "a b#;&", "größer", "50%"])
def test_the_default_store_lies_in_the_working_directory(name: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = facts.tracking_uri()
    assert make_url(uri).database == str(tmp_path / name / "mlflow.db")
    assert facts.sqlite_path(uri) == tmp_path / name / "mlflow.db"


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*result\.json'$"),
        replacing(tmp_path / "result.json"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_hints_can_be_pasted() -> None:
    assert shlex.split(setting("resume", "my runs/it's")) == ["--set", "resume=my runs/it's"]
    assert shlex.split(resumption("a b"))[-4:] == ["--set", "output=a b", "--set", "resume=auto"]
    assert resumption("runs/en") == "go on with --set output=runs/en --set resume=auto"


@pytest.mark.parametrize("devices, bad", [(None, False), ("", False), ("0,1", False), ("-1", True), ("GPU-8f3", True)])
def test_device_lists_that_deepspeeds_launcher_cannot_read(devices: str | None, bad: bool) -> None:
    check = unlaunchable(devices)
    assert bool(check) == bad and (check is None or (check.status == "WARN" and "--num_gpus" in check.remedy))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_hostfiles_as_editors_save_them(encoding: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "hostfile"
    path.write_text("node-1 slots=8\nnode-2 slots=8\n", encoding=encoding)
    assert read_hostfile(path) == ["node-1", "node-2"]
    checks = {check.name: check for check in starters(path, 2)}
    assert ("hostfile" in checks) == (encoding != "utf-8"), "DeepSpeed itself takes the mark for a part of the name"
    assert checks["pdsh"].status == "WARN" and "apt install pdsh" in checks["pdsh"].remedy


def test_two_runs_in_one_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    """The second is refused while the first holds the folder; where there are no locks, none is, with a warning."""
    lock = tmp_path / "run" / "log" / "lock"
    with session.alone(lock):
        pass
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout and other.stdout.readline()
        with pytest.raises(UserError, match=r"run: another run is writing there: wait for it"), session.alone(lock):
            pass
        other.communicate("\n")
    with session.alone(lock):
        pass

    def without(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", without)
    monkeypatch.setattr(fcntl, "flock", without)
    with session.alone(lock):
        pass
    with try_lock(tmp_path / "study") as held:
        assert held
    with wait_for_lock(tmp_path / "study"):
        pass
    said = capsys.readouterr().err
    assert said.count("this file system has no locks: see that no two programs write") == 3


def test_predictions_on_standard_output_are_utf8_whatever_the_encoding_of_the_terminal(
    tmp_path: Path, monkeypatch
) -> None:
    """A question mark in place of a letter would stay in the file to which they are sent."""
    sentences = in_memory([(["天地", "na", "é"], ["O", "B-PER", "O"])], tmp_path / "text")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "latin-1", "replace"))
    predict.write(TASKS["ner"], sentences, [["O", "B-PER", "O"]], None)
    assert raw.getvalue().decode() == "天地\tO\nna\tB-PER\né\tO\n"


def test_a_working_directory_that_was_removed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match=r"the working directory cannot be used \(No such file or directory\): `cd`"):
        check_surroundings()
