"""MLflow for tests: a real server on a loopback port, empty stores, and what a store holds."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def mlflow_server(port: int, store: str = "sqlite:///server.db") -> Iterator[subprocess.Popen[bytes]]:
    """A server in its own process group, which is always killed; database, artifacts and log lie in the working directory."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", "./server-artifacts"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open("server.log", "ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 150
        while True:
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"mlflow server does not start here: {Path('server.log').read_text()[-500:]}")
            time.sleep(0.1)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@contextlib.contextmanager
def forwarding(port: int, behind: int) -> Iterator[None]:
    """Has a port answer with the server behind another: to its clients the server starts, and then is killed.

    A real start takes tens of seconds of processor time.
    """

    def carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", behind))
                ends.extend((client, server))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=carry, args=pair, daemon=True).start()

    ends: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", port)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
            for end in ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@functools.cache
def empty_store() -> bytes:
    """The bytes of a fresh mlflow.db: creating its tables takes seconds, copying it does not."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"from mlflow import MlflowClient; MlflowClient('sqlite:///{folder}/mlflow.db').search_experiments()"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=400, capture_output=True)
        return Path(folder, "mlflow.db").read_bytes()


def points(client: Any, run_id: str | None, name: str) -> list[tuple[int, float]]:
    """A metric's (step, value) in order."""
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))


def runs_of(client: Any, experiment: str) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))
