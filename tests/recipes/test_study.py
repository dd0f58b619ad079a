"""The smallest study through the real launcher, killed on the way; and what MLflow has of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlinterf_ds.results.records import Records
from mlinterf_ds.study.main import main
from tests.commands import call, flags
from tests.mlflow_server import empty_store
from tests.ranks import pool

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(1800)  # the first test waits for the whole study


def command(*more: str) -> list[str]:
    recipe = [sys.executable, str(ROOT / "launch/study.py"), "--recipe", str(ROOT / "launch/recipes/study_ci.toml")]
    return [*recipe, "--set", "mono=false", "--set", "output=study", *more]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was killed with all its jobs, after the first checkpoint of one of them, and started again."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "mlflow.db").write_bytes(empty_store())
    with open(folder / "first.log", "w") as log:
        first = subprocess.Popen(command(), cwd=folder, env=environment(folder), stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    saved = "study/jobs/pretrain.*/*/checkpoints/step-*/complete.json"
    while time.monotonic() < deadline and first.poll() is None and not list(folder.glob(saved)):
        time.sleep(0.02)
    assert first.poll() is None, "it must be killed before it ends"
    first.send_signal(signal.SIGKILL)
    first.wait()
    kill_jobs(folder)
    again = subprocess.run(command(), cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=1200)
    (folder / "again.log").write_text(again.stdout)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    return folder


def kill_jobs(folder: Path) -> None:
    """Launchers and ranks: a job's folder is among their arguments."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"--job" in words and str(folder).encode() in words[words.index(b"--job") + 1]:
                os.kill(int(process.name), signal.SIGKILL)


def test_the_killed_model_is_as_if_it_had_not_been(folder: Path, tmp_path: Path) -> None:
    """What the tables are made of, to the last bit: the first job's run once more, without a break."""
    (job,) = folder.glob("study/jobs/pretrain.joint.*")
    ((unit, wanted),) = ((path.parent.name, json.loads(path.read_text())) for path in job.glob("*/summary.json"))
    words = json.loads((job / "job.json").read_text())["units"][0]["arguments"]
    own = flags("tracking.enabled=false", f"output={tmp_path / unit}")
    assert pool(1).run(call, "pretrain.main", str(folder), [*words, *own]) == [""]
    found = json.loads((tmp_path / unit / "summary.json").read_text())
    assert found["history"] == wanted["history"] and len(found["history"]["syn"]) > 1
    assert (tmp_path / unit / "train.csv").read_text() == (job / unit / "train.csv").read_text()


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}


def test_it_ends_with_tables_and_a_page(folder: Path) -> None:
    records = Records.load(folder / "study/records.json")
    assert {row["state"] for row in records.status} == {"finished"} and len(records.status) == 4
    assert {(m.variant, m.steps) for m in records.models} == {("joint", 20), ("adpt", 20)}
    assert all(m.early_loss and m.early_loss > 3 for m in records.models)
    assert {(s.variant, s.train, s.language) for s in records.scores} == {
        (variant, *pair)
        for variant in ("joint", "adpt")
        for pair in (("syn", "syn"), ("syn", "syn-close"), ("syn-close", "syn-close"))
    }
    assert all(len(s.counts) == 1 and Path(s.counts[0]).is_file() for s in records.scores)
    assert "| + adpt |" in (folder / "study/tables/table2.md").read_text()
    assert "<h1>study_ci</h1>" in (folder / "study/report.html").read_text()


def test_started_again_it_does_nothing_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("study/jobs/*/*/summary.json")}
    assert len(stamps) == 6
    assert main(command()[2:]) == 0 and "4 launches, 0 to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.glob("study/jobs/*/*/summary.json")} == stamps


def test_mlflow_nests_jobs_under_the_study(folder: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("mlinterf_ds")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    top = json.loads((folder / "study/study.json").read_text())["run_id"]
    named = {run.info.run_name: run for run in runs.values()}
    assert set(named) == {"study_ci"} | {
        f"{unit}{variant}.close.seed0" for unit in ("", "pos-syn.", "pos-syn-close.") for variant in ("joint", "adpt")
    }
    parents = {
        name: runs[p].info.run_name if (p := run.data.tags.get("mlflow.parentRunId")) else ""
        for name, run in named.items()
    }
    assert parents["joint.close.seed0"] == "study_ci" and runs[top].info.run_name == "study_ci"
    assert parents["pos-syn.joint.close.seed0"] == "joint.close.seed0"
    tags = named["pos-syn-close.adpt.close.seed0"].data.tags
    wanted = {
        "study": "study_ci",
        "variant": "adpt",
        "pair": "syn-syn-close",
        "seed": "0",
        "task": "pos",
        "train": "syn-close",
    }
    assert wanted.items() <= tags.items()
    assert named["study_ci"].info.status == "FINISHED"
    names = {artifact.path for artifact in client.list_artifacts(top)}
    assert {"report.html", "findings.md", "records.json"} <= names


def test_the_best_model_is_registered_and_fills_masks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow
    import pandas

    uri = f"sqlite:///{folder}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(folder)  # where the artifacts are
    client = mlflow.MlflowClient(uri)
    version = max(client.search_model_versions("name='study_ci'"), key=lambda found: int(found.version))
    assert version.tags["variant"] in ("joint", "adpt") and "departs from the paper" in version.description
    model = mlflow.pyfunc.load_model(f"models:/study_ci/{version.version}")
    assert [column.name for column in model.metadata.signature.inputs.inputs] == ["text", "language"]
    given = pandas.DataFrame({"text": ["<mask> .", "."], "language": ["syn", "syn-close"]})
    filled = model.predict(given)
    assert len(filled) == 2 and "<mask>" not in filled[0] and filled[1] == "."
