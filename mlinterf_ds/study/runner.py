"""Run a study's jobs on this machine: as many at once as its cores allow, each after those it needs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mlinterf_ds.errors import UserError
from mlinterf_ds.files import read_json, write_json
from mlinterf_ds.runtime import session
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.study.plan import Job
from mlinterf_ds.study.worker import DONE, STARTED, finished, read_done

State = Literal["waiting", "running", "finished", "failed", "blocked"]
SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "study.py"
GRACE = 60.0  # seconds between asking jobs to end and ending them
REASON = 400  # characters


@dataclass
class Outcome:
    """What became of a job."""

    job: Job
    state: State
    reason: str = ""
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        return {
            "job": self.job.name, "kind": self.job.kind, "state": self.state, "reason": self.reason,
            "seconds": self.seconds, "folder": self.job.folder,
        }  # fmt: skip


@dataclass
class Slot:
    """A place for one job at a time, with cores of its own."""

    cores: list[int]
    process: subprocess.Popen[bytes] | None = None
    job: Job | None = None
    log: Any = field(default=None, repr=False)
    begin: int = 0  # where this attempt's log starts: it is appended to


@contextlib.contextmanager
def alone(output: Path) -> Iterator[bool]:
    """Hold a folder of a study or a job against other processes; whether it was free."""
    with session.writing(output):
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def is_finished(job: Job, output: Path) -> bool:
    """Whether every unit of the job has its results."""
    return all(finished(output / job.folder / unit.name) for unit in job.units)


def last_known(job: Job, output: Path) -> Job:
    """The job; if it was never started, the last of its name that was, by other code, settings or data."""
    if (output / job.folder).is_dir():
        return job
    places = sorted((output / "jobs").glob(f"{job.name}-{'[0-9a-f]' * 10}"), key=lambda place: place.stat().st_mtime)
    earlier = [replace(job, digest=place.name[-10:]) for place in places]
    whole = [each for each in earlier if is_finished(each, output)]
    return [job, *earlier, *whole][-1]


def outcome_of(job: Job, output: Path, known: Mapping[str, Outcome]) -> Outcome:
    """What became of a job that another process ran, by its folder; `known`: of the jobs it needs."""
    folder = output / job.folder
    record = _record(folder)
    if is_finished(job, output):
        return Outcome(job, "finished", seconds=float(record.get("seconds", 0.0)))
    if lost := [need.name for need in job.needs if known[need.name].state in ("failed", "blocked")]:
        return Outcome(job, "blocked", f"needs {', '.join(lost)}")
    if reason := reasons(record) or error_of(folder / "launch.log"):
        with alone(folder) as free:  # else it is tried again just now
            if free:
                return Outcome(job, "failed", reason)
    return Outcome(job, "waiting")


def write_job(job: Job, config: StudyConfig, output: Path, deepspeed_config: str, parent: str | None) -> Path:
    """The job's folder with its job.json, and without the last attempt's reasons in its done.json."""
    folder = output / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / DONE).is_file():
        write_json(folder / DONE, {"units": read_done(folder)})
    places = [
        output / need.folder / need.units[0].name
        for need in job.needs
        if need.kind == "pretrain" and need.model == job.model
    ]
    tracking = [f"tracking.enabled={config.tracking.enabled}", f"tracking.experiment={config.tracking.experiment}"]
    tracking += [f"tracking.parent={parent}"] * bool(parent)
    units = []
    for unit in job.units:
        tags = {
            "study": config.name,
            "set": job.model.set,
            "pair": "-".join(job.model.languages),
            "seed": job.model.seed,
        }
        tags["variant"] = job.model.variant
        tags |= {name: unit.facts[name] for name in ("control", "task", "train", "analysis") if unit.facts.get(name)}
        settings = [*tracking, *(f"tracking.tags.{name}={value}" for name, value in tags.items())]
        settings += [f"checkpoint={place}" for place in places]
        words = [word.replace("{output}", str(output)) for word in unit.arguments]
        arguments = ["--deepspeed_config", deepspeed_config, *words]
        units.append({"name": unit.name, "arguments": [*arguments, *(w for s in settings for w in ("--set", s))]})
    write_json(folder / "job.json", {"name": job.name, "kind": job.kind, "tensor": 1, "units": units})
    return folder


def launch_command(folder: Path, ranks: int) -> list[str]:
    """The real launcher, on ports of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    deepspeed = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if deepspeed is None:
        raise UserError(
            f"no deepspeed beside {sys.executable} or on PATH: install the package's requirements, or activate the "
            "environment that has them"
        )
    start = [deepspeed, "--num_gpus", str(ranks), "--master_port", str(port)]
    return [*start, str(SCRIPT), "--job", str(folder)]


def run(
    jobs: Sequence[Job],
    config: StudyConfig,
    output: Path,
    write: Callable[[Job], Path],
    say: Callable[[str], None] = print,
    started_with: Callable[[Path, int], list[str]] = launch_command,
) -> list[Outcome]:
    """Run all jobs that are not finished; what became of each. KeyboardInterrupt if the study was asked to end."""
    outcomes = {job.name: Outcome(job, "finished" if is_finished(job, output) else "waiting") for job in jobs}
    places = slots(config)
    with session.Signals() as signals:
        while True:
            for slot in places:
                if slot.process is None and (job := _next(jobs, outcomes)):
                    _start(slot, job, started_with(write(job), config.ranks), output, config.ranks)
                    outcomes[job.name].state = "running"
            if not any(slot.process for slot in places):
                break
            if signals.received:
                _stop(places)
                raise KeyboardInterrupt
            time.sleep(0.2)
            for slot in places:
                if slot.process is not None and slot.process.poll() is not None:
                    found = _end(slot, outcomes, output)
                    count = sum(o.state not in ("waiting", "running") for o in outcomes.values())
                    took = f"{found.seconds:.0f} s" if found.state == "finished" else found.reason
                    say(f"[{count}/{len(jobs)}] {found.job.name}: {found.state}, {took}")
    for outcome in outcomes.values():
        if outcome.state == "finished" and not outcome.seconds:
            outcome.seconds = float(_record(output / outcome.job.folder).get("seconds", 0.0))
    return list(outcomes.values())


def slots(config: StudyConfig) -> list[Slot]:
    """Cores are shared out, so that the jobs' threads don't wait for each other's."""
    cores = sorted(os.sched_getaffinity(0))
    count = config.parallel or max(1, len(cores) // config.ranks)
    each = max(1, len(cores) // count)
    return [Slot([cores[(number * each + k) % len(cores)] for k in range(each)]) for number in range(count)]


def _next(jobs: Sequence[Job], outcomes: dict[str, Outcome]) -> Job | None:
    """The first job whose needs are met; jobs that need a failed one are marked on the way."""
    for job in jobs:
        if outcomes[job.name].state != "waiting":
            continue
        states = {need.name: outcomes[need.name].state for need in job.needs}
        if lost := [name for name, state in states.items() if state in ("failed", "blocked")]:
            outcomes[job.name] = Outcome(job, "blocked", f"needs {', '.join(lost)}")
        elif set(states.values()) <= {"finished"}:
            return job
    return None


def _start(slot: Slot, job: Job, words: list[str], output: Path, ranks: int) -> None:
    folder = output / job.folder
    slot.job, slot.log = job, (folder / "launch.log").open("ab")
    slot.begin = slot.log.tell()
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(slot.cores) // ranks)))
    slot.process = subprocess.Popen(
        words, stdout=slot.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": threads, STARTED: str(time.time())},
    )  # fmt: skip
    os.sched_setaffinity(slot.process.pid, slot.cores)


def _end(slot: Slot, outcomes: dict[str, Outcome], output: Path) -> Outcome:
    assert slot.process and slot.job
    slot.log.close()
    outcome, folder = outcomes[slot.job.name], output / slot.job.folder
    record = _record(folder)
    outcome.seconds = float(record.get("seconds", 0.0))
    outcome.state = "finished" if is_finished(slot.job, output) else "failed"
    if outcome.state == "failed":
        said = error_of(folder / "launch.log", slot.begin)
        outcome.reason = reasons(record) or said or f"exit status {slot.process.returncode}; see {folder}/launch.log"
    slot.process = slot.job = None
    return outcome


def _record(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(folder / DONE)
    except (OSError, ValueError):
        return {"units": read_done(folder)}
    return found


def reasons(record: dict[str, Any]) -> str:
    """Why units of a job failed, by its done.json."""
    units = record.get("units", {}).items()
    return "; ".join(f"{name}: {facts['reason']}" for name, facts in units if "reason" in facts)


def error_of(log: Path, begin: int = 0) -> str:
    """The last error that a job's log tells of, from byte `begin` on."""
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines() if log.is_file() else []
    errors = [line.strip() for line in lines if line.startswith("error:") or "Error" in line]
    return errors[-1][:REASON] if errors else ""


def _stop(slots: Sequence[Slot]) -> None:
    """Ask all jobs to save and end; end those that don't."""
    alive = [slot for slot in slots if slot.process]
    for slot in alive:
        _signal(slot, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and any(slot.process and slot.process.poll() is None for slot in alive):
        time.sleep(0.2)
    for slot in alive:
        _signal(slot, signal.SIGKILL)


def _signal(slot: Slot, number: int) -> None:
    """To the whole session: launcher and ranks."""
    assert slot.process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(slot.process.pid, number)
