"""The tracker against a real SQLite store, read back with MLflow's own client."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlinterf_ds import tracking
from mlinterf_ds.tracking import Tracker, dataset, environment_facts
from mlinterf_ds.tracking.__main__ import main
from mlinterf_ds.tracking.facts import clean_name, flatten, is_secret, scrub, sqlite_path, sqlite_uri, tracking_uri
from mlinterf_ds.tracking.spool import SENT, SPOOL, SpoolWriter, read_spool
from mlinterf_ds.tracking.store import create_database
from tests.commands import wait_until
from tests.mlflow_server import empty_store, points, runs_of

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ["en", "sw", "zh-hans", "sr_latn", "x0", "ar"]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    return tmp_path


def start(folder: str = "out", **options: Any) -> Tracker:
    given: dict[str, Any] = {"enabled": True, "experiment": "tests", "name": "a run", "parameters": {}, "tags": {}}
    return Tracker.start(folder=Path(folder), **(given | options))


def client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri())


def history(run_id: str | None, name: str) -> list[tuple[int, float]]:
    return points(client(), run_id, name)


def test_a_run_reads_back(workplace: Path) -> None:
    parameters = {"model": {"layers": 2, "width": 128}, "languages": LANGUAGES, "corpus": None}
    tracker = start(parameters=parameters, tags={"variant": "adpt", "git_commit": "abc"})
    for step in range(1, 1001):
        tracker.log({f"train/loss/{language}": 1.0 / step for language in LANGUAGES}, step)
    (workplace / "curves.png").write_bytes(b"picture")
    tracker.artifact(workplace / "curves.png", "figures")
    tracker.close()
    run = client().get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "a run"
    assert run.info.end_time >= run.info.start_time > 0
    model = {"model.layers": "2", "model.width": "128"}
    assert run.data.params == model | {"languages": json.dumps(LANGUAGES), "corpus": "None"}
    assert run.data.tags["variant"] == "adpt" and run.data.tags["mlflow.source.git.commit"] == "abc"
    assert set(run.data.metrics) == {f"train/loss/{language}" for language in LANGUAGES}, "codes are kept as they are"
    assert history(tracker.run_id, "train/loss/zh-hans") == [(step, 1.0 / step) for step in range(1, 1001)]
    assert [file.path for file in client().list_artifacts(tracker.run_id, "figures")] == ["figures/curves.png"]
    assert list((workplace / "mlruns").rglob("curves.png")), "artifacts lie beside the database"
    assert tracker.browse().startswith("mlflow ui --backend-store-uri sqlite:///mlflow.db  # http://127.0.0.1:5000")


def test_a_run_has_a_description_its_data_and_the_use_of_its_host(workplace: Path, monkeypatch) -> None:
    monkeypatch.setattr(tracking, "SAMPLED", 0.0)
    data = dataset(Path("corpora/en-sw"), "0123456789abcdef" * 4, "training")
    tracker = start(about="what it is", datasets=[data])
    spool = workplace / "out" / SPOOL
    wait_until(lambda: "system/cpu_utilization_percentage" in spool.read_text())
    tracker.close(timeout=120)
    run = client().get_run(tracker.run_id)
    (entry,) = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("en-sw", data["digest"][:36])
    assert json.loads(entry.dataset.source) == {"uri": "corpora/en-sw"} and entry.tags[0].value == "training"
    assert run.data.tags["mlflow.note.content"] == "what it is"
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= run.data.metrics.keys()


def test_the_stores_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new%20?" / "folder" / "mlflow.db"
    create_database(sqlite_uri(path))
    assert path.is_file() and [file.name for file in path.parent.iterdir()] == ["mlflow.db"]


def test_a_store_is_made_without_hard_links_and_while_its_folder_is_removed(tmp_path: Path, monkeypatch) -> None:
    """As on a memory stick; and as at the end of a process, which removes the folder while MLflow writes there."""

    class Client:
        def __init__(self, uri: str) -> None:
            self.path = sqlite_path(uri)

        def search_experiments(self, max_results: int) -> None:
            assert self.path and max_results == 1
            (self.path.parent / "journal").mkdir()
            self.path.write_text("a store")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def written_meanwhile(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr("mlflow.MlflowClient", Client)
    monkeypatch.setattr(os, "link", refuse)
    create_database(sqlite_uri(tmp_path / "stick" / "mlflow.db"))
    assert [(file.name, file.read_text()) for file in (tmp_path / "stick").iterdir()] == [("mlflow.db", "a store")]
    monkeypatch.setattr(os, "rmdir", written_meanwhile)
    create_database(sqlite_uri(tmp_path / "stick" / "other.db"))
    assert (tmp_path / "stick" / "other.db").read_text() == "a store"


def test_off_does_nothing(workplace: Path) -> None:
    (workplace / "mlflow.db").unlink()
    for tracker in (Tracker.off(), start(enabled=False)):
        with tracker:
            tracker.log({"a": 1.0}, 1)
            tracker.tag({"a": "b"})
            tracker.artifact(workplace)
        tracker.close("FAILED")
        assert tracker.run_id is None and tracker.browse() == ""
    assert list(workplace.iterdir()) == []


def test_start_costs_nothing_and_leaving_without_a_word_is_a_failure() -> None:
    code = (
        "tracker.log({'a': 1.0}, 1); print(time.perf_counter() - began)"
        "\nwhile tracker.run_id.startswith('pending'): time.sleep(0.1)"
        "\nsys.exit(3)"
    )
    process = job(code, "one")
    output, errors = process.communicate(timeout=120)
    assert float(output) < 2.0, "MLflow, which takes longer, is imported in the background"
    assert errors == "", "MLflow's start-up chatter is not shown"
    run = only_run()
    assert process.returncode == 3 and run.info.status == "FAILED" and run.data.metrics == {"a": 1.0}
    assert "without closing" in run.data.tags["failure"]


def test_what_is_not_a_number(caplog: pytest.LogCaptureFixture) -> None:
    tracker = start()
    tracker.log({"x": math.nan, "y": math.inf, "z": -math.inf, "ok": 1.0}, 1)
    tracker.log({"x": "many"}, 2)  # type: ignore[dict-item]
    tracker.log({"x": 3.0}, -1)
    tracker.log({"x": 3.0}, 2**70)
    tracker.log({"bad name: ünï/ç=%$": 1.0, "../up": 2.0, "": 3.0, "a" * 400: 4.0}, 3)
    tracker.log({"x": 5.0}, 4)
    tracker.close()
    metrics = client().get_run(tracker.run_id).data.metrics
    assert all(math.isnan(metrics[name]) for name in "yz"), "not 1.8e308, which would flatten every chart"
    (first, last) = history(tracker.run_id, "x")
    assert first[0] == 1 and math.isnan(first[1]) and last == (4, 5.0)
    assert metrics["ok"] == 1.0 and metrics["up"] == 2.0 and metrics["a" * 250] == 4.0
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 3


def test_many_and_long_parameters() -> None:
    parameters = {f"key{i}": i for i in range(250)} | {"long": "ж" * 9000, "n" * 300: 1}
    tracker = start(parameters=parameters)
    tracker.log({f"m{i}": float(i) for i in range(2500)}, 1)
    tracker.close()
    data = client().get_run(tracker.run_id).data
    assert len(data.params) == 252 and data.params["key249"] == "249"
    assert len(data.params["long"]) == 6000 and data.params["long"].endswith("…")
    assert len(data.metrics) == 2500


def test_secrets_are_never_recorded(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    monkeypatch.setenv("SOME_API_KEY", "k3y-in-the-environment")
    url = "https://ann:hush-2@example.org/x?token=hush-3&page=7"
    parameters: dict[str, Any] = {"hf_token": "hush-1", "data": {"url": url, "apiKey": "hush-4", "password": 1234567}}
    parameters |= {"note": "uses k3y-in-the-environment", "sources": [{"secret": "hush-5"}]}
    parameters |= {"tokenizer": "bpe", "mask_token_id": 4}
    with pytest.raises(ValueError, match="hush"), start(parameters=parameters, tags={"auth_key": "hush-6"}) as tracker:
        raise ValueError("no answer from http://ann:hush-7@example.org")
    run = client().get_run(tracker.run_id)
    everything = str(run.data.params) + str(run.data.tags) + (workplace / "out" / SPOOL).read_text("utf-8")
    for secret in ("hush", "k3y-in", "1234567"):
        assert secret not in everything
    assert run.data.params["data.url"] == "https://example.org/x?token=***&page=7"
    assert run.data.params["tokenizer"] == "bpe" and run.data.params["mask_token_id"] == "4"


@pytest.mark.parametrize(
    ("error", "status", "failure"),
    [
        (None, "FINISHED", None),
        (RuntimeError("no memory\nmore"), "FAILED", "RuntimeError: no memory"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt"),
        (SystemExit(143), "KILLED", "SystemExit: 143"),
        (SystemExit(2), "FAILED", "SystemExit: 2"),
        (SystemExit(0), "FINISHED", None),
    ],
)
def test_how_it_ended(error: BaseException | None, status: str, failure: str | None) -> None:
    tracker = start()
    try:
        with tracker:
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    run = client().get_run(tracker.run_id)
    assert (run.info.status, run.data.tags.get("failure")) == (status, failure)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


JOB = """
import pathlib, sys, time
from mlinterf_ds.tracking import Tracker
began = time.perf_counter()
options = dict(enabled=True, experiment="jobs", name=sys.argv[1], parameters={"p": sys.argv[1]}, tags={})
tracker = Tracker.start(folder=pathlib.Path(sys.argv[1]), **options)
"""


def job(code: str, name: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", JOB + code, name], env=environment, text=True, stdout=-1, stderr=-1)


def only_run(experiment: str = "jobs") -> Any:
    (run,) = runs_of(client(), experiment)
    return run


def test_sigterm() -> None:
    code = """with tracker:
    while tracker.run_id.startswith("pending"):
        time.sleep(0.1)
    tracker.log({"a": 1.0}, 1)
    print("up", flush=True)
    time.sleep(60)
"""
    process = job(code, "one")
    assert process.stdout and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    run = only_run()
    assert (run.info.status, run.data.tags["failure"]) == ("KILLED", "SystemExit: 143")
    assert run.data.metrics == {"a": 1.0}


def test_two_jobs_at_once_on_a_new_database(workplace: Path) -> None:
    (workplace / "mlflow.db").unlink()
    code = "for i in range(300): tracker.log({'a': i * 1.0}, i)\ntracker.close(timeout=100)"
    processes = [job(code, name) for name in ("one", "two")]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and errors == ""
    runs = runs_of(client(), "jobs")
    assert sorted(run.info.run_name for run in runs) == ["one", "two"]
    assert all(len(history(run.info.run_id, "a")) == 300 and run.info.status == "FINISHED" for run in runs)


def test_a_process_that_changes_its_directory(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spool stays the job's own, also where the new directory has an `out` with another job's."""
    tracker = start()
    tracker.log({"a": 1.0}, 1)
    elsewhere = workplace / "elsewhere"
    (elsewhere / "out").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    tracker.log({"a": 2.0}, 2)
    tracker.close()
    assert not any((elsewhere / "out").iterdir()), "nothing is read or noted there"
    assert main([str(workplace / "out")]) == 0 and Path.cwd() == elsewhere, "sending goes there and comes back"
    monkeypatch.chdir(workplace)
    assert history(tracker.run_id, "a") == [(1, 1.0), (2, 2.0)] and only_run("tests").info.status == "FINISHED"


def test_killed_then_resumed_is_one_run_without_double_points(monkeypatch: pytest.MonkeyPatch) -> None:
    process = job("[tracker.log({'loss': i / 7}, i) for i in range(20)]; time.sleep(60)", "out")
    wait_until(lambda: Path("out", SENT).exists() and json.loads(Path("out", SENT).read_text())["runs"])
    wait_until(lambda: len(history(only_run().info.run_id, "loss")) == 20)
    process.kill()
    process.wait(60)
    killed = only_run()
    assert killed.info.status == "RUNNING", "SIGKILL leaves nobody to mark it"
    with open(Path("out", SPOOL), "ab") as spool:
        spool.write(b'{"run": "torn')
    tracker = start(experiment="jobs", run_id=killed.info.run_id, parameters={"p": "other", "q": 1})
    assert tracker.run_id == killed.info.run_id
    for step in range(10, 30):  # from its last checkpoint, bit-exactly
        tracker.log({"loss": step / 7}, step)
    tracker.close()
    run = only_run()
    assert run.info.status == "FINISHED"
    assert run.data.params == {"p": "out", "q": "1"} and run.data.tags["resumed.p"] == "other"
    assert history(run.info.run_id, "loss") == [(step, step / 7) for step in range(30)]


def test_lost_note_of_what_was_sent_doubles_nothing() -> None:
    tracker = start()
    tracker.log({"a": 1.0, "n": math.nan}, 1)
    tracker.close()
    Path("out", SENT).unlink()
    assert main(["out"]) == 0
    assert history(only_run("tests").info.run_id, "a") == [(1, 1.0)]
    assert len(history(tracker.run_id, "n")) == 1
    assert only_run("tests").info.status == "FINISHED"


def test_nested_runs_and_pending_ids() -> None:
    parent = start("study")
    child = start("study/child", name="child", parent_id=parent.run_id)
    child.close()
    parent.close()
    tags = client().get_run(child.run_id).data.tags
    assert tags["mlflow.parentRunId"] == parent.run_id
    assert not str(parent.run_id).startswith("pending-")


def test_run_that_mlflow_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    tracker = start(run_id="f" * 32)
    tracker.log({"a": 1.0}, 1)
    tracker.close()
    assert tracker.run_id != "f" * 32 and history(tracker.run_id, "a") == [(1, 1.0)]
    assert "has no run" in caplog.text


def test_a_run_deleted_meanwhile_and_a_missing_artifact(caplog: pytest.LogCaptureFixture) -> None:
    tracker = start()
    tracker.artifact(Path("nothing.png"))
    wait_until(lambda: tracker._sender.unsent == 0)
    client().delete_run(tracker.run_id)
    for step in range(5):
        tracker.log({"a": 1.0}, step)
    tracker.close()
    assert [("no longer exists" in m, "was deleted" in m) for m in caplog.messages] == [(True, False), (False, True)]


def test_one_refused_name_keeps_the_others(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(tracking, "clean_name", lambda name: name)
    tracker = start()
    tracker.log({"good": 1.0, "b@d": 2.0, "fine": 3.0}, 1)
    tracker.close()
    assert client().get_run(tracker.run_id).data.metrics == {"good": 1.0, "fine": 3.0}
    assert caplog.text.count("refused metric 'b@d'") == 1


def test_full_disk_and_unwritable_folder(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    Path("file").write_text("")
    start("file/out").log({"a": 1.0}, 1)  # no such folder can be made
    assert caplog.text.count("tracking is off") == 1
    tracker = start()

    class Full:
        def write(self, data: bytes) -> int:
            real.write(data[:5])
            return 5

    real, tracker._spool._file = tracker._spool._file, Full()  # type: ignore[assignment]
    tracker.log({"a": 1.0}, 1)
    tracker.log({"a": 2.0}, 2)
    tracker._spool._file = real
    tracker.log({"a": 3.0}, 3)
    tracker.close()
    assert history(tracker.run_id, "a") == [(3, 3.0)], "half a line does not swallow the next"
    assert caplog.text.count("metrics are lost") == 1


def test_spool_lines(workplace: Path) -> None:
    path = workplace / SPOOL
    path.write_bytes(b'{"run": "k", "t": 1}\nnot json\n[1]\n{"run": "k", "t": 2}\n{"run": "k"')
    assert [record and record["t"] for _, record in read_spool(path)] == [1, None, None, 2]
    SpoolWriter(workplace, "k").append({"t": 3})
    assert [record and record["t"] for _, record in read_spool(path)] == [1, None, None, 2, None, 3]
    offsets = [offset for offset, _ in read_spool(path)]
    assert [record and record["t"] for _, record in read_spool(path, offsets[2])] == [2, None, 3]


def test_secret_names() -> None:
    assert all(map(is_secret, ["hf_token", "apiKey", "AWS_SECRET_ACCESS_KEY", "db.password", "token"]))
    plain = ["tokenizer", "tokens_per_second", "train.seed", "key", "keyboard", "PWD", "monkey"]
    assert not any(map(is_secret, plain))


def test_text_helpers() -> None:
    assert scrub("see http://u:p@ss@host:5000/x and sqlite:///a.db") == "see http://host:5000/x and sqlite:///a.db"
    assert flatten({"a": {}, "b": {"c": [1, {"d": 2}]}}) == {"a": "{}", "b.c": '[1, {"d": 2}]'}
    names = {"valid/perplexity/sw": "valid/perplexity/sw", "a//b": "a/b", "/x": "x", "": "_", "..": "_", "a=b": "a_b"}
    assert {name: clean_name(name) for name in names} == names


def test_environment_facts() -> None:
    code = "import sys; from mlinterf_ds.tracking import environment_facts as f; f(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
    facts = environment_facts()
    assert facts["python"].count(".") == 2 and facts["host"] and facts["mlflow"][0].isdigit()
    assert all(isinstance(value, str) for value in facts.values())
    if (ROOT / ".git").exists():
        done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
        assert facts["git_commit"] == done.stdout.strip() and facts["git_dirty"] in ("true", "false")
    else:
        assert "git_commit" not in facts
