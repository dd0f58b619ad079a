"""MLflow as one job uses it: its store's creation, its client, the job's experiment and runs, and its monitors of the host.

MLflow is imported by the first use, which takes seconds: no method belongs in the training loop.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mlinterf_ds.tracking.facts import clean_name, first_line, scrub, sqlite_path, sqlite_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

CLIENT_LOG = "mlflow-client.log"
KEY_TAG = "mlinterf_ds.key"  # holds the key under which the spool knows the run
PENDING = "pending-"  # followed by the key: stands for MLflow's id of a run that MLflow does not have yet
# MLflow's list of experiments then shows ours as training, not as generated text.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

METRICS_PER_REQUEST = 1000  # MLflow's limit
VALUES_PER_REQUEST = 20  # MLflow allows 100, and 1 MB a request: 20 of the longest fit with every character escaped
SAMPLED = 30.0  # seconds between two samples of the host


class NotYet(Exception):
    """Raised when a record depends on one that is not sent yet; the sender tries again later."""


def set_client_defaults() -> None:
    """Makes MLflow's client give up soon (the sender tries again), stay quiet and send no usage data.

    Variables that the user has set keep their values.
    """
    defaults = {
        "HTTP_REQUEST_TIMEOUT": "20", "HTTP_REQUEST_MAX_RETRIES": "0", "ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "300",
        "LOGGING_LEVEL": "WARNING", "SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "DISABLE_TELEMETRY": "true",
    }  # fmt: skip
    for name, value in defaults.items():
        os.environ.setdefault(f"MLFLOW_{name}", value)


def error_code(error: Exception) -> str:
    """MLflow's own code of an error, or '' for an error of another library."""
    return str(getattr(error, "error_code", ""))


def create_database(uri: str) -> None:
    """Creates a missing SQLite store under a temporary name and renames it when it is complete.

    MLflow creates its tables by migrations that are not transactions: a second job that opens a half-made store, or a kill
    in the middle of a migration, would leave a store that nobody can open.
    """
    path = sqlite_path(uri)
    if path is None or path.exists():
        return
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    # A run that ends meanwhile removes the folder while MLflow still writes there.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent, ignore_cleanup_errors=True) as folder:
        complete = Path(folder) / path.name
        MlflowClient(sqlite_uri(complete)).search_experiments(max_results=1)
        try:
            os.link(complete, path)
        except FileExistsError:  # another job was faster; its store is complete too
            pass
        except OSError:  # a file system without hard links
            complete.replace(path)


class Store:
    """One job's access to MLflow. Methods raise whatever MLflow and the network raise."""

    def __init__(self, uri: str, folder: Path, warn: Callable[[str], None]) -> None:
        self.uri, self.folder, self.warn = uri, folder, warn  # folder: the job's, which also gets the client's log
        self.experiment_id: str | None = None
        self.deleted: set[str] = set()  # ids of runs that somebody deleted in MLflow: nothing more is sent to them

    @functools.cached_property
    def client(self) -> MlflowClient:
        """MLflow's client, made on first use; what it logs goes to `mlflow-client.log` in the job's folder."""
        warnings.filterwarnings("ignore", module=r"(mlflow|alembic|sqlalchemy)\b")
        from mlflow import MlflowClient

        _redirect_logs(self.folder / CLIENT_LOG)
        create_database(self.uri)
        return MlflowClient(tracking_uri=self.uri)

    def open_run(self, key: str, known_id: str | None, at: int, start: Mapping[str, Any]) -> str:
        """Creates a run, or attaches to the one that exists, and logs its parameters and tags; returns its id.

        known_id: MLflow's id where the spool has it; at: the start, in milliseconds; start: the spool's `start` record.
        """
        parameters, tags = dict(start["parameters"]), dict(start["tags"])
        self.experiment_id = self._experiment(start["experiment"])
        run = self._existing_run(key, known_id, start.get("run_id"))
        if run is None:
            if parent := self._parent(start.get("parent_id")):
                tags["mlflow.parentRunId"] = parent
            run = self.client.create_run(self.experiment_id, at, tags | {KEY_TAG: key}, start["name"])
            self.log(run.info.run_id, parameters=parameters)
        else:
            self.client.update_run(run.info.run_id, status="RUNNING")
            logged = run.data.params
            # MLflow writes a parameter once; tags hold the values that a resumed run changed.
            tags |= {f"resumed.{k}"[:250]: v for k, v in parameters.items() if logged.get(k, v) != v}
            self.log(run.info.run_id, parameters={k: v for k, v in parameters.items() if k not in logged}, tags=tags)
        datasets = start.get("datasets")  # spools of earlier versions have none
        if datasets and run.info.run_id not in self.deleted:
            self._log_datasets(run.info.run_id, datasets)
        return str(run.info.run_id)

    def _log_datasets(self, run_id: str, datasets: Sequence[Mapping[str, str]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(one["name"][:500], one["digest"][:36], "local", json.dumps({"uri": one["source"]})),
                [InputTag("mlflow.data.context", one["context"])],
            )
            for one in datasets
        ]
        self.client.log_inputs(run_id, inputs)

    def log(
        self,
        run_id: str,
        records: Sequence[Mapping[str, Any]] = (),
        parameters: Mapping[str, str] = MappingProxyType({}),
        tags: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Logs the values of `metrics` records, parameters that the run does not have yet, and tags, which are replaced."""
        from mlflow.entities import Metric, Param, RunTag

        points = [Metric(name, value, r["t"], r["step"]) for r in records for name, value in r["metrics"].items()]
        self._log(run_id, "metrics", points, METRICS_PER_REQUEST)
        self._log(run_id, "params", [Param(k, v) for k, v in parameters.items()], VALUES_PER_REQUEST)
        self._log(run_id, "tags", [RunTag(k, v) for k, v in tags.items()], VALUES_PER_REQUEST)

    def log_artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        """Uploads a file, or a folder with all it holds."""
        upload = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        upload(run_id, str(path), folder)

    def _log(self, run_id: str, kind: str, values: list[Any], size: int) -> None:
        """Logs values of one kind, `size` a request. Values that MLflow refuses are singled out and left out."""
        if run_id in self.deleted:
            return
        for first in range(0, len(values), size):
            chunk = values[first : first + size]
            try:
                self.client.log_batch(run_id, synchronous=True, **{kind: chunk})
            except Exception as error:  # MLflow's stores raise many classes; only refused values are handled here
                if error_code(error) != "INVALID_PARAMETER_VALUE":
                    raise
                if self.client.get_run(run_id).info.lifecycle_stage == "deleted":
                    self.deleted.add(run_id)
                    return self.warn(f"run {run_id} was deleted in MLflow: nothing more is sent to it")
                if len(chunk) == 1:
                    self.warn(f"MLflow refused {kind[:-1]} {chunk[0].key!r}: {first_line(error)}")
                else:
                    self._log(run_id, kind, chunk, len(chunk) // 2)
        return None

    def _experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            # MLflow would take %xx in the name of its artifacts' folder for a character.
            folder = (Path.cwd() / "mlruns" / clean_name(name)).as_uri() if "%" in str(Path.cwd()) else None
            # Two jobs may start at once: the slower one fails here, and its next attempt finds the experiment.
            return str(self.client.create_experiment(name, folder if sqlite_path(self.uri) else None, EXPERIMENT_TAGS))
        experiment_id = str(experiment.experiment_id)
        if experiment.lifecycle_stage == "deleted":
            raise NotYet(f"MLflow's experiment {name!r} is deleted: `mlflow experiments restore -x {experiment_id}`")
        return experiment_id

    def _run_with_key(self, key: str, anywhere: bool = False) -> Run | None:
        experiments = [self.experiment_id or "0"]
        if anywhere:
            experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        runs = self.client.search_runs(experiments, f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return runs[0] if runs else None

    def _existing_run(self, key: str, known_id: str | None, resumed_id: str | None) -> Run | None:
        """The run that an earlier attempt or the resumed job created, by its id or else by the key in its tags."""
        run_id = known_id or (resumed_id if resumed_id and not resumed_id.startswith(PENDING) else None)
        if run_id:
            try:
                run = self.client.get_run(run_id)
                if run.info.lifecycle_stage != "deleted":
                    return run
            except Exception as error:  # MLflow's stores raise many classes; their code tells a missing run
                if error_code(error) not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        run = self._run_with_key(key)
        if run_id and run is None:
            self.warn(f"MLflow at {scrub(self.uri)} has no run {run_id}: this job continues in a new run")
        return run

    def _parent(self, parent_id: str | None) -> str | None:
        if not parent_id or not parent_id.startswith(PENDING):
            return parent_id
        parent = self._run_with_key(parent_id.removeprefix(PENDING), anywhere=True)
        if parent is None:
            raise NotYet(f"the parent run ({parent_id}) has not been sent yet")
        return str(parent.info.run_id)


def _redirect_logs(path: Path) -> None:
    """Sends what MLflow and its libraries log to a file, without secrets."""

    class Scrubbed(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return scrub(super().format(record))

    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(Scrubbed("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("mlflow", "alembic", "sqlalchemy.engine", "huey", "urllib3.connectionpool"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False


class SystemMetrics:
    """Use of the processors, memory, disk, network and GPUs of rank 0's host, by MLflow's monitors and under its names.

    The caller reads them: MLflow's own thread would send to the server past the spool.
    """

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[Any] = []
        self.samples = 0
        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() not in ("false", "0"):
            for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
                with contextlib.suppress(Exception):  # no GPU, no /proc, or a package that reads them is missing
                    self._monitors.append(kind())

    def sample(self) -> dict[str, float]:
        """The present values; what cannot be read is left out."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            with contextlib.suppress(Exception):  # drivers raise errors of any kind, and training must not feel them
                monitor.collect_metrics()
                values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
        self.samples += 1
        return values
