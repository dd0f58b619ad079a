"""MLflow's server away, killed, stopped, answering errors or nothing: training goes on and nothing is lost."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlinterf_ds.tracking import Tracker
from mlinterf_ds.tracking.__main__ import close_killed, main, send_rest
from mlinterf_ds.tracking.spool import SPOOL, Sender
from mlinterf_ds.tracking.store import NotYet
from tests import mlflow_server as mlflow
from tests.commands import wait_until
from tests.mlflow_server import empty_store, forwarding, free_port, mlflow_server, runs_of

TIMEOUT = 3  # seconds that MLflow waits for an answer


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("mlflow.db", "server.db", "later.db"):
        (tmp_path / name).write_bytes(empty_store())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TIMEOUT))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("mlinterf_ds.tracking.LONGEST_PAUSE", 1.0)
    monkeypatch.setattr("mlinterf_ds.tracking.INTERVAL", 0.2)
    return tmp_path


def start(name: str = "out", **options: Any) -> Tracker:
    common = {"enabled": True, "experiment": "faults", "parameters": {"a": 1}, "tags": {}}
    return Tracker.start(**common, name=name, folder=Path(name), **options)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def points(uri: str, run_id: str | None, name: str = "a") -> list[tuple[int, float]]:
    return mlflow.points(client_of(uri), run_id, name)


def only_run(uri: str, experiment: str = "faults") -> Any:
    (run,) = runs_of(client_of(uri), experiment)
    return run


def test_server_away_then_stopped_then_killed_then_back(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    workplace: Path,
) -> None:
    port = free_port()
    uri, store = f"http://127.0.0.1:{port}", f"sqlite:///{workplace}/server.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracker = start()
    tracker.log({"a": 0.0}, 0)
    wait_until(lambda: bool(warnings_in(caplog)))
    assert str(tracker.run_id).startswith("pending-") and tracker.browse() == uri
    with mlflow_server(behind := free_port()) as server:
        with forwarding(port, behind):
            wait_until(lambda: tracker._sender.unsent == 0)
            assert points(store, tracker.run_id) == [(0, 0.0)]
            assert tracker.browse().endswith(f"/runs/{tracker.run_id}?workflowType=machine_learning")
            os.killpg(server.pid, signal.SIGSTOP)  # slow: it takes requests and answers them much later
            tracker.log({"a": 1.0}, 1)
            time.sleep(2 * TIMEOUT)
            os.killpg(server.pid, signal.SIGCONT)
            wait_until(lambda: tracker._sender.unsent == 0)
        took = []  # and now no server has that port
        for step in range(2, 50):
            began = time.perf_counter()
            tracker.log({"a": float(step)}, step)
            took.append(time.perf_counter() - began)
        assert statistics.median(took) < 0.1, "no step waits for a server that is down"
        (workplace / "out" / "note.txt").write_text("hello")
        tracker.artifact(workplace / "out" / "note.txt")
        with forwarding(port, behind):
            tracker.close(timeout=60)
    assert points(store, tracker.run_id) == [(step, float(step)) for step in range(50)]
    run = only_run(store)
    assert run.info.status == "FINISHED" and run.info.run_id == tracker.run_id
    (note,) = (workplace / "server-artifacts").rglob("note.txt")
    assert note.read_text() == "hello" and tracker.run_id in note.parts
    assert capsys.readouterr().out == "", "MLflow does not write between the job's own lines"
    assert len(warnings_in(caplog)) == 1, "one warning for all of it"


class Refusing(BaseHTTPRequestHandler):
    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(500)
        self.end_headers()
        self.wfile.write(b"out of order")

    do_GET = do_POST = do_PATCH = do_PUT = answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_server_answers_errors_and_the_spool_is_sent_later(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    workplace: Path,
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:hush@127.0.0.1:{server.server_address[1]}")
    tracker = start()
    wait_until(lambda: bool(warnings_in(caplog)))
    for step in range(50):
        tracker.log({"a": float(step)}, step)
    began = time.monotonic()
    tracker.close(timeout=1.0)
    assert time.monotonic() - began < 5.0
    assert len(warnings_in(caplog)) == 2 and "python -m mlinterf_ds.tracking out" in warnings_in(caplog)[1]
    assert "52 MLflow records" in warnings_in(caplog)[1], "the run, its 50 points and its end"
    wait_until(lambda: not tracker._thread.is_alive())
    assert main(["out"]) == 1
    assert "52 of 52 records could not be sent" in capsys.readouterr().err
    server.shutdown()
    server.server_close()

    uri = f"sqlite:///{workplace}/later.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for _ in range(2):  # the second time there is nothing left to send
        assert main(["out"]) == 0
    assert "52 records sent" in capsys.readouterr().out
    run = only_run(uri)
    assert run.info.status == "FINISHED" and run.data.params == {"a": "1"}
    assert points(uri, run.info.run_id) == [(step, float(step)) for step in range(50)]
    written = caplog.text + "".join(path.read_text("utf-8") for path in Path("out").iterdir())
    assert "hush" not in written and "127.0.0.1" in written


def test_server_never_answers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker = start()
        began = time.monotonic()
        for step in range(500):
            tracker.log({"a": 1.0}, step)
        assert time.monotonic() - began < 5.0
        began = time.monotonic()
        tracker.close(timeout=1.0)
        assert time.monotonic() - began < 4.0
        assert "502 MLflow records" in warnings_in(caplog)[-1]
        wait_until(lambda: not tracker._thread.is_alive())
    assert len(Path("out", SPOOL).read_text("utf-8").splitlines()) == 502


def test_database_locked_by_another_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    tracker = start()
    wait_until(lambda: tracker._sender.unsent == 0)
    assert main(["out"]) == 1, "a running job sends its own spool"
    assert "another process is sending" in capsys.readouterr().err
    other = sqlite3.connect("mlflow.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    tracker.log({"a": 1.0}, 1)
    time.sleep(5.5)  # longer than SQLite waits by itself
    assert tracker._sender.unsent == 1
    other.execute("COMMIT")
    other.close()
    tracker.close()
    assert points(f"sqlite:///{workplace}/mlflow.db", tracker.run_id) == [(1, 1.0)]
    assert capsys.readouterr().err == "", "MLflow's tracebacks go to its log file"


def test_server_comes_back_with_an_empty_database(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    tracker = start()
    tracker.log({"a": 1.0}, 1)
    wait_until(lambda: tracker._sender.unsent == 0)
    first = tracker.run_id
    with sqlite3.connect("mlflow.db") as database:
        for table in ("metrics", "latest_metrics", "params", "tags", "runs", "experiment_tags", "experiments"):
            database.execute(f"DELETE FROM {table}")
    tracker.log({"a": 2.0}, 2)
    tracker.close()
    assert tracker.run_id != first
    assert points(f"sqlite:///{workplace}/mlflow.db", tracker.run_id) == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize(
    "close", [lambda: main(["out"]), lambda: close_killed(Path("out"))], ids=["command", "supervisor"]
)
def test_killed_job_is_marked_by_the_sending_command(workplace: Path, close: Callable[[], Any]) -> None:
    code = (
        "import pathlib, os, signal; from mlinterf_ds.tracking import Tracker;"
        "t = Tracker.start(enabled=True, experiment='e', name='n', folder=pathlib.Path('out'), parameters={}, tags={});"
        "t.log({'a': 1.0}, 1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False).returncode == -9
    assert not close()
    run = only_run(f"sqlite:///{workplace}/mlflow.db", "e")
    assert run.info.status == "KILLED" and run.data.metrics == {"a": 1.0}


def test_a_spool_is_locked_where_only_writable_files_can_be(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS locks by the rules of fcntl: a file that is open for reading alone takes no exclusive lock."""
    really = fcntl.flock

    def as_on_nfs(file: Any, operation: int) -> None:
        if not file.writable():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        really(file, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    (workplace / SPOOL).touch()
    first, second = (Sender(workplace, f"sqlite:///{workplace}/mlflow.db", print) for _ in range(2))
    first._acquire()
    with pytest.raises(NotYet, match="another process is sending"):
        second._acquire()
    first.release()
    second._acquire()
    second.release()


def test_wrong_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere"]) == 1
    assert "nowhere: no mlflow-spool.jsonl" in capsys.readouterr().err


def test_what_jobs_could_not_send_is_sent_after_them(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a study does at its end: a parent and its child whose server was away, then one that has nothing left."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    parent = start("parent")
    child = start("child", parent_id=parent.run_id)
    for tracker in (parent, child):
        tracker.close(timeout=0)
        tracker._thread.join(30)  # it lets go of the spool
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{workplace}/mlflow.db")
    warnings: list[str] = []
    for _ in range(2):
        send_rest([Path("parent").resolve(), Path("child").resolve(), workplace / "none"], warnings.append)
    runs = {run.info.run_name: run for run in runs_of(client_of(uri), "faults")}
    assert runs.keys() == {"parent", "child"} and {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["child"].data.tags["mlflow.parentRunId"] == runs["parent"].info.run_id and not warnings
