"""The folder of a job: how the job is started from it, what became of the job by the files in it, and the lock that keeps
two processes from writing there.

<job>/job.json    what to run, written by the study
<job>/done.json   what became of each unit: {"units": {name: {"state", "reason", "seconds"}}, "seconds", "startup"}
<job>/launch.log  the output of the launcher and of all ranks
<job>/UNIT/       the output of a run, with its summary.json
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlinterf_ds.files import lock, read_json, write_json
from mlinterf_ds.runtime.output import writing
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.study.jobs import Job

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "study.py"
DONE = "done.json"
REASON_LENGTH = 400  # characters of an error that are kept
State = Literal["waiting", "running", "finished", "failed", "blocked"]


# --- how a job is started -----------------------------------------------------------------------------------------------
def write_job(job: Job, config: StudyConfig, output: Path, deepspeed_config: str, parent: str | None) -> Path:
    """Write the job's folder and job.json; the folder. The failures of the last attempt leave its done.json.

    parent: id of the study's run in MLflow, under which the job's runs are nested.
    """
    folder = output / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / DONE).is_file():
        write_json(folder / DONE, {"units": finished_units(folder)})
    settings = [f"tracking.enabled={config.tracking.enabled}", f"tracking.experiment={config.tracking.experiment}"]
    settings += [f"tracking.parent={parent}"] * bool(parent)
    checkpoints = [
        f"checkpoint={output / need.folder / need.units[0].name}"
        for need in job.needs
        if need.kind == "pretrain" and need.model == job.model
    ]
    units = []
    for unit in job.units:
        words = [word.replace("{output}", str(output)) for word in unit.arguments]
        tags = {"study": config.name, "pair": "-".join(job.model.languages)} | unit.facts
        names = ("study", "set", "pair", "seed", "variant", "control", "task", "train", "analysis")
        tagged = [f"tracking.tags.{name}={tags[name]}" for name in names if tags.get(name, "") != ""]
        words += [word for setting in (*settings, *tagged, *checkpoints) for word in ("--set", setting)]
        units.append({"name": unit.name, "arguments": ["--deepspeed_config", deepspeed_config, *words]})
    write_json(folder / "job.json", {"name": job.name, "kind": job.kind, "tensor": 1, "units": units})
    return folder


def launch_command(folder: Path, ranks: int, port: str) -> list[str]:
    """The command that starts a job's ranks, which meet at a free port of this machine; one rank is started without a launcher.

    torchrun leaves the accelerators to the environment (CUDA_VISIBLE_DEVICES), by which `runner` and Slurm share them out;
    DeepSpeed's launcher would take the machine's first ones for every job.
    """
    script = [str(SCRIPT), "--job", str(folder)]
    if ranks == 1:
        variables = ["RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1"]  # whatever started the study
        return ["env", *variables, sys.executable, "-u", *script]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [sys.executable, *torchrun, "--master-addr", "127.0.0.1", "--master-port", port, *script]


# --- what became of a job ----------------------------------------------------------------------------------------------
@dataclass
class Outcome:
    """The state of a job; a blocked one needs a job that failed."""

    job: Job
    state: State
    reason: str = ""
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """The job's row in records.json."""
        return {
            "job": self.job.name, "kind": self.job.kind, "state": self.state, "reason": self.reason,
            "seconds": self.seconds, "folder": self.job.folder,
        }  # fmt: skip


def is_complete(folder: Path) -> bool:
    """Whether a unit's summary.json is there and reports the end of the run."""
    try:
        return bool(read_json(folder / "summary.json").get("finished", True))
    except (OSError, ValueError):
        return False


def is_finished(job: Job, output: Path) -> bool:
    """Whether every unit of the job has its results."""
    return all(is_complete(output / job.folder / unit.name) for unit in job.units)


def read_outcome(job: Job, output: Path, outcomes: Mapping[str, Outcome]) -> Outcome:
    """The outcome of a job that another process ran. outcomes: by name, of the jobs it needs."""
    folder = output / job.folder
    record = read_record(folder)
    if is_finished(job, output):
        return Outcome(job, "finished", seconds=float(record.get("seconds", 0.0)))
    if reason := blocked_by(job, outcomes):
        return Outcome(job, "blocked", reason)
    if reason := failures(record) or last_error(folder / "launch.log"):
        with try_lock(folder) as free:  # a job that holds its folder is being tried again
            if free:
                return Outcome(job, "failed", reason)
    return Outcome(job, "waiting")


def blocked_by(job: Job, outcomes: Mapping[str, Outcome]) -> str:
    """Which needed jobs will not finish, as a reason; '' if none."""
    lost = [need.name for need in job.needs if outcomes[need.name].state in ("failed", "blocked")]
    return f"needs {', '.join(lost)}" if lost else ""


def last_known(job: Job, output: Path) -> Job:
    """The job, or if it was never started, its last version that was, from other code, settings or data.

    Of several earlier versions the last complete one is taken, else the last.
    """
    if (output / job.folder).is_dir():
        return job
    folders = (output / "jobs").glob(f"{job.name}-{'[0-9a-f]' * 10}")
    oldest_first = sorted(folders, key=lambda folder: folder.stat().st_mtime)
    earlier = [replace(job, digest=folder.name[-10:]) for folder in oldest_first]
    complete = [version for version in earlier if is_finished(version, output)]
    return [job, *earlier, *complete][-1]


def read_record(folder: Path) -> dict[str, Any]:
    """The job's done.json; without units if it is missing or damaged."""
    try:
        return dict(read_json(folder / DONE))
    except (OSError, ValueError):
        return {"units": {}}


def finished_units(folder: Path) -> dict[str, Any]:
    """The units of a job that have finished, by its done.json; those that failed are tried again."""
    units = read_record(folder).get("units", {})
    return {name: facts for name, facts in units.items() if facts["state"] == "finished"}


def failures(record: Mapping[str, Any]) -> str:
    """Says which units failed and why, by the job's done.json; '' if none did."""
    units = record.get("units", {}).items()
    return "; ".join(f"{name}: {facts['reason']}" for name, facts in units if "reason" in facts)


def last_error(log: Path, begin: int = 0) -> str:
    """The last line of a job's log that reports an error, after the first `begin` bytes; '' if there is none."""
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines() if log.is_file() else []
    told = [line for line in lines if line.startswith("error:")]
    raised = [
        line for line in lines if "Error" in line and "ChildFailedError" not in line
    ]  # torchrun's, which names no reason
    return (told or raised or [""])[-1].strip()[:REASON_LENGTH]


# --- locks -------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Hold the folder of a job or a study if no other process does; whether it is held. UserError if it can't be written."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("wb")
    with file:
        yield lock(file, wait=False)


@contextlib.contextmanager
def wait_for_lock(folder: Path, rank: int = 0) -> Iterator[None]:
    """Hold a job's folder on this rank, after any other process that does: a killed study leaves its jobs running.

    Each rank waits for the same rank of the other process, and does so before the ranks wait for each other in a process
    group, where waiting has a time limit.
    """
    with (folder / (f".lock{rank}" if rank else ".lock")).open("wb") as file:
        lock(file, wait=True)
        yield
