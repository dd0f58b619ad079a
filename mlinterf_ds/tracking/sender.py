"""Sends a run's spool to MLflow: in order, in batches, once, whatever the server does meanwhile.

`mlflow-spool.sent` beside the spool holds how far the sending got. A batch sent twice (a crash between the answer and that
note) is the same points with the same timestamps: MLflow's database stores keep them once. The spool's key is a tag of the
run, so a creation whose answer was lost is found again instead of repeated.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlinterf_ds.errors import UserError
from mlinterf_ds.tracking.facts import first_line, scrub, tracking_uri
from mlinterf_ds.tracking.spool import SPOOL, Record, read_spool

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, Run, RunTag

    Entity = Metric | Param | RunTag

SENT = "mlflow-spool.sent"
CLIENT_LOG = "mlflow-client.log"
KEY_TAG = "mlinterf_ds.key"
# Lists of experiments show it as training, not as generated text.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
PENDING = "pending-"

METRICS_PER_BATCH = 1000  # MLflow's limit
VALUES_PER_BATCH = 20  # its limit is 100, and 1 MB a request: this many of the longest, every character escaped, fit
LINES_PER_READ = 2000


class NotYet(Exception):
    """Something this depends on has not been sent: try again later."""


def bound_mlflow() -> None:
    """Let MLflow's client give up soon (we try again ourselves), stay quiet and send no usage data; users' own win."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "300")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def load_client(uri: str, log_folder: Path) -> MlflowClient:
    """MLflow's client, imported here because that takes seconds; its chatter goes to `mlflow-client.log`."""
    warnings.filterwarnings("ignore", module=r"(mlflow|alembic|sqlalchemy)\b")
    from mlflow import MlflowClient

    class Scrubbed(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return scrub(super().format(record))

    handler = logging.FileHandler(log_folder / CLIENT_LOG, encoding="utf-8", delay=True)
    handler.setFormatter(Scrubbed("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("mlflow", "alembic", "sqlalchemy.engine", "huey", "urllib3.connectionpool"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    make_database(uri)
    return MlflowClient(tracking_uri=uri)


def make_database(uri: str) -> None:
    """Make a new SQLite store beside its place and move it there whole.

    MLflow makes its tables by migrations that are not transactions: another job that meets one, or a kill in the midst of one,
    would leave a store that nobody can open.
    """
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if not uri.startswith("sqlite:///") or path.exists():
        return
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # another job's, whole too
            os.link(new, path)


class Sender:
    """Everything that talks to MLflow about one output folder. Not thread-safe: one thread drives it."""

    def __init__(self, folder: Path, uri: str, warn: Callable[[str], None]) -> None:
        self.folder, self.uri, self.warn = folder, uri, warn
        self.offset = 0  # bytes of the spool that MLflow has
        self.runs: dict[str, str] = {}  # our key -> MLflow's run id
        self.later: list[Record] = []  # artifacts that failed: they must not hold up the metrics behind them
        self.experiment_id: str | None = None
        self._deleted: set[str] = set()
        self._rewound = False
        self._lock: Any = None
        self._client_: MlflowClient | None = None
        self._load()

    @property
    def unsent(self) -> int:
        """Records that MLflow does not have yet."""
        path = self.folder / SPOOL
        lines = read_spool(path, self.offset) if path.exists() else ()
        return len(self.later) + sum(1 for _, record in lines if record)

    def drain(self) -> None:
        """Send all there is now. Raises whatever went wrong; what was sent till then is noted."""
        self._acquire()
        while batch := list(read_spool(self.folder / SPOOL, self.offset, LINES_PER_READ)):
            for _, group in itertools.groupby(batch, self._group):
                items = list(group)
                try:
                    self._send([record for _, record in items if record])
                except Exception as error:  # any: sorted by MLflow's error code
                    if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST" or self._rewound:
                        raise
                    # The server came back with an empty database: it gets the whole story again.
                    self._rewound, self.offset, self.runs = True, 0, {}
                    break
                self.offset = items[-1][0]
                self._save()
        waiting, self.later = self.later, []
        for record in waiting:
            self._artifact(record)
        self._save()
        if self.later:
            raise NotYet(self.later[0]["why"])

    def release(self) -> None:
        """Let another process send this spool."""
        if self._lock:
            self._lock.close()
            self._lock = None

    # --- where we are -------------------------------------------------------------------------------------------

    def _load(self) -> None:
        try:
            state = json.loads((self.folder / SENT).read_text("utf-8"))
            size = (self.folder / SPOOL).stat().st_size
            # Another server, or another spool: what this one needs is everything.
            if state["uri"] == scrub(self.uri) and state["offset"] <= size:
                self.offset, self.runs, self.later = state["offset"], state["runs"], state["later"]
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def _save(self) -> None:
        state = {"uri": scrub(self.uri), "offset": self.offset, "runs": self.runs, "later": self.later}
        temporary = self.folder / (SENT + ".new")
        try:
            temporary.write_text(json.dumps(state), "utf-8")
            os.replace(temporary, self.folder / SENT)
        except OSError:
            pass  # a full disk: at worst something is sent twice, and MLflow keeps it once

    def _acquire(self) -> None:
        if self._lock:
            return
        lock = open(self.folder / SPOOL, "rb")  # noqa: SIM115 (held until release)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise NotYet(f"another process is sending {self.folder / SPOOL}") from None
        except OSError:
            pass  # a file system without locks
        self._lock = lock
        self._load()  # another process may have sent something meanwhile

    def _group(self, item: tuple[int, Record | None]) -> tuple[str, str] | int:
        """Neighbouring metrics of one run go together; anything else goes alone (its offset is unique)."""
        offset, record = item
        return (record["run"], "metrics") if record and "metrics" in record else offset

    # --- one record, or neighbouring metrics of one run -----------------------------------------------------------

    @property
    def _client(self) -> MlflowClient:
        self._client_ = self._client_ or load_client(self.uri, self.folder)
        return self._client_

    def _send(self, records: list[Record]) -> None:
        if not records:
            return
        from mlflow.entities import Metric, RunTag

        key, first = records[0]["run"], records[0]
        if "start" in first:
            return self._open(key, first["t"], first["start"])
        run_id = self.runs.get(key)
        if run_id is None or run_id in self._deleted:
            return None  # its start was lost with a damaged line, or somebody deleted the run
        if "metrics" in first:
            points = [Metric(k, v, r["t"], r["step"]) for r in records for k, v in r["metrics"].items()]
            self._log(run_id, points)
        elif "tags" in first:
            self._log(run_id, [RunTag(k, v) for k, v in first["tags"].items()])
        elif "artifact" in first:
            self._artifact(first)
        elif "end" in first:
            self._client.set_terminated(run_id, first["end"], first["t"])
        return None

    def _log(self, run_id: str, entities: list[Any]) -> None:
        """Log metrics, parameters or tags (one kind) in batches; what MLflow finds invalid is singled out and left."""
        from mlflow.entities import Metric, Param

        if not entities or run_id in self._deleted:
            return
        kind = {Metric: "metrics", Param: "params"}.get(type(entities[0]), "tags")
        size = METRICS_PER_BATCH if kind == "metrics" else VALUES_PER_BATCH
        for at in range(0, len(entities), size):
            chunk = entities[at : at + size]
            try:
                self._client.log_batch(run_id, synchronous=True, **{kind: chunk})
            except Exception as error:  # MLflow's stores raise their own kinds; only refused values are ours to sort
                if getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE":
                    raise
                if self._client.get_run(run_id).info.lifecycle_stage == "deleted":
                    self._deleted.add(run_id)
                    return self.warn(f"run {run_id} was deleted in MLflow: nothing more is sent to it")
                if len(chunk) == 1:
                    self.warn(f"MLflow refused {kind[:-1]} {chunk[0].key!r}: {first_line(error)}")
                else:
                    self._log(run_id, chunk[: len(chunk) // 2])
                    self._log(run_id, chunk[len(chunk) // 2 :])
        return None

    def _artifact(self, record: Record) -> None:
        path, run_id = self.folder / record["artifact"], self.runs.get(record["run"])
        if not path.exists() or run_id is None:
            return self.warn(f"{path} is gone: it could not be added to the MLflow run")
        try:
            send = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            send(run_id, str(path), record.get("folder"))
        except Exception as error:  # storage back ends raise anything
            self.later.append(record | {"why": first_line(error)})
        return None

    # --- opening a run ------------------------------------------------------------------------------------------

    def _open(self, key: str, at: int, start: Record) -> None:
        """Create the run, or attach to the one that exists; then its parameters and tags."""
        from mlflow.entities import Param, RunTag

        client, parameters, tags = self._client, start["parameters"], dict(start["tags"])
        self.experiment_id = self._experiment(start["experiment"])
        run = self._existing(key, start.get("run_id"))
        if run is None:
            if parent := self._parent(start.get("parent_id")):
                tags["mlflow.parentRunId"] = parent
            run_id = client.create_run(self.experiment_id, at, tags | {KEY_TAG: key}, start["name"]).info.run_id
            tags = {}
        else:
            run_id = run.info.run_id
            client.update_run(run_id, status="RUNNING")
            known = run.data.params
            changed = {k: v for k, v in parameters.items() if known.get(k, v) != v}
            # MLflow's parameters are written once; what a resumed run changed is told by tags.
            tags |= {f"resumed.{k}"[:250]: v for k, v in changed.items()}
            parameters = {k: v for k, v in parameters.items() if k not in known}
        self.runs[key] = run_id
        self._log(run_id, [Param(k, v) for k, v in parameters.items()])
        self._log(run_id, [RunTag(k, v) for k, v in tags.items()])

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            # Two jobs may start at once; the loser's failure is mended by the next attempt, which finds it.
            return str(self._client.create_experiment(name, tags=EXPERIMENT_TAGS))
        if found.lifecycle_stage == "deleted":
            raise NotYet(
                f"MLflow's experiment {name!r} is deleted: `mlflow experiments restore -x {found.experiment_id}`"
            )
        return str(found.experiment_id)

    def _find(self, key: str) -> Run | None:
        found = self._client.search_runs([self.experiment_id or "0"], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return found[0] if found else None

    def _existing(self, key: str, run_id: str | None) -> Run | None:
        wanted = self.runs.get(key) or (run_id if run_id and not run_id.startswith(PENDING) else None)
        if wanted:
            try:
                run = self._client.get_run(wanted)
                if run.info.lifecycle_stage != "deleted":
                    return run
            except Exception as error:  # any: sorted by MLflow's error code
                if getattr(error, "error_code", "") not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        found = self._find(key)
        if wanted and found is None:
            self.warn(f"MLflow at {scrub(self.uri)} has no run {wanted}: this job goes on in a new run")
        return found

    def _parent(self, parent_id: str | None) -> str | None:
        if not parent_id or not parent_id.startswith(PENDING):
            return parent_id
        parent = self._find(parent_id.removeprefix(PENDING))
        if parent is None:
            raise NotYet(f"the parent run ({parent_id}) has not been sent yet")
        return str(parent.info.run_id)


def send_rest(folders: Iterable[Path], warn: Callable[[str], None]) -> None:
    """Send what ended jobs could not in time (a busy machine, a server that was away); parents first, please."""
    for folder in folders:
        try:
            if (folder / SPOOL).is_file() and Sender(folder, tracking_uri(), warn).unsent:
                send_folder(folder, warn)
        except UserError as error:
            warn(str(error))


def send_folder(folder: Path, warn: Callable[[str], None]) -> str:
    """Send the spool that a job left in `folder`; a run that never ended (its job is dead) is marked KILLED."""
    path = folder / SPOOL
    last = {record["run"]: record for _, record in read_spool(path) if record}
    starts = [record["start"] for _, record in read_spool(path) if record and "start" in record]
    if not starts:
        raise UserError(f"{path} holds no run: nothing to send")
    uri = tracking_uri() if os.environ.get("MLFLOW_TRACKING_URI") else starts[-1]["uri"]
    folder = folder.resolve()
    path = folder / SPOOL
    there = starts[-1]["cwd"]  # MLflow puts a database's artifacts under the working directory
    with contextlib.chdir(there if os.path.isdir(there) else "."):
        count = _send_all(Sender(folder, uri, warn), path, last)
    return f"{path}: {count} records sent to {scrub(uri)}"


def _send_all(sender: Sender, path: Path, last: Mapping[str, Record]) -> int:
    """Send a spool and the ends that its dead runs lack (`last`: the last record of each); how many records there were."""
    count = sender.unsent
    try:
        sender.drain()
        for key in (key for key, record in last.items() if "end" not in record and key in sender.runs):
            with open(path, "ab") as file:
                file.write(json.dumps({"run": key, "t": last[key]["t"], "end": "KILLED"}).encode() + b"\n")
        sender.drain()
    except Exception as error:  # stores and networks raise anything: told as one line with the way on
        raise UserError(
            f"{path}: {sender.unsent} of {count} records could not be sent to {scrub(sender.uri)} "
            f"({first_line(error)}). Set MLFLOW_TRACKING_URI if the server moved, and try again"
        ) from error
    finally:
        sender.release()
    return count
