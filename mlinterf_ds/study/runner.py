"""Run a study's jobs on this machine, as many at once as its accelerators or cores allow, each after those it needs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mlinterf_ds.errors import UserError
from mlinterf_ds.runtime.restarts import free_port
from mlinterf_ds.runtime.signals import Signals
from mlinterf_ds.study import folders
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.study.folders import Outcome, blocked_by, failures, is_finished, last_error, read_record
from mlinterf_ds.study.jobs import Job
from mlinterf_ds.study.worker import STARTED

POLL = 0.2  # seconds between looks at the running jobs
GRACE = 60.0  # seconds that jobs which are asked to end have for it


@dataclass
class Slot:
    """The cores and accelerators for one job at a time, and the job that runs on them."""

    cores: list[int]
    accelerators: dict[str, str] = field(default_factory=dict)  # the environment variable that names them; {} on a CPU
    process: subprocess.Popen[bytes] | None = None
    job: Job | None = None
    log: Any = field(default=None, repr=False)
    log_begin: int = 0  # bytes of the log, which is appended to, that earlier attempts wrote


def slots(config: StudyConfig) -> list[Slot]:
    """This machine's cores and accelerators, shared out evenly, so that jobs do not compete for them.

    With more jobs at once than accelerators (`parallel`), several jobs share one. UserError if a job's ranks have too few.
    """
    cores = sorted(os.sched_getaffinity(0))
    variable, devices = accelerators()
    if devices and config.ranks > len(devices):
        raise UserError(
            f"ranks={config.ranks}: this machine has {len(devices)} accelerators; a rank needs one of its own"
        )
    count = config.parallel or max(1, len(devices or cores) // config.ranks)
    size = max(1, len(cores) // count)
    shares = []
    for number in range(count):
        own = [devices[(number * config.ranks + k) % len(devices)] for k in range(config.ranks)] if devices else []
        own_cores = [cores[(number * size + k) % len(cores)] for k in range(size)]
        shares.append(Slot(own_cores, {variable: ",".join(own)} if own else {}))
    return shares


def accelerators() -> tuple[str, list[str]]:
    """The environment variable that names the accelerators which a process may use, and their names; no names on a CPU."""
    if not torch.accelerator.is_available():
        return "", []
    from deepspeed.accelerator import get_accelerator  # takes seconds

    device = get_accelerator()
    variable = device.visible_devices_envs()[0]
    if device.device_name() == "cpu":  # DS_ACCELERATOR=cpu
        return variable, []
    count = device.device_count()
    names = os.environ.get(variable, "").split(",") if os.environ.get(variable) else [str(k) for k in range(count)]
    return variable, names[:count]


def run(jobs: Sequence[Job], config: StudyConfig, output: Path, write: Callable[[Job], Path]) -> list[Outcome]:
    """Run all jobs that are not finished; the outcome of each. KeyboardInterrupt if the study was asked to end.

    write: writes a job's folder before the job starts, and returns it.
    """
    outcomes = {job.name: Outcome(job, "finished" if is_finished(job, output) else "waiting") for job in jobs}
    workplaces = slots(config)
    with Signals() as signals:
        while True:
            for slot in workplaces:
                if slot.process is None and (job := _next(jobs, outcomes)):
                    command = folders.launch_command(write(job), config.ranks, str(free_port()))
                    _start(slot, job, command, output, config.ranks)
                    outcomes[job.name].state = "running"
            if not any(slot.process for slot in workplaces):
                break
            if signals.received:
                _stop(workplaces)
                raise KeyboardInterrupt
            time.sleep(POLL)
            for slot in workplaces:
                if slot.process is not None and slot.process.poll() is not None:
                    _announce(_end(slot, outcomes, output), outcomes)
    for outcome in outcomes.values():
        if outcome.state == "finished" and not outcome.seconds:
            outcome.seconds = float(read_record(output / outcome.job.folder).get("seconds", 0.0))
    return list(outcomes.values())


def _next(jobs: Sequence[Job], outcomes: dict[str, Outcome]) -> Job | None:
    """The first waiting job whose needs are met; jobs before it that need a failed one become blocked."""
    for job in jobs:
        if outcomes[job.name].state != "waiting":
            continue
        if reason := blocked_by(job, outcomes):
            outcomes[job.name] = Outcome(job, "blocked", reason)
        elif all(outcomes[need.name].state == "finished" for need in job.needs):
            return job
    return None


def _start(slot: Slot, job: Job, command: list[str], output: Path, ranks: int) -> None:
    slot.job, slot.log = job, (output / job.folder / "launch.log").open("ab")
    slot.log_begin = slot.log.tell()
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(slot.cores) // ranks)))
    slot.process = subprocess.Popen(
        command, stdout=slot.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        env=os.environ | slot.accelerators | {"OMP_NUM_THREADS": threads, STARTED: str(time.time())},
    )  # fmt: skip
    os.sched_setaffinity(slot.process.pid, slot.cores)


def _end(slot: Slot, outcomes: dict[str, Outcome], output: Path) -> Outcome:
    """The outcome of a slot's job whose process has ended; the slot is free again."""
    assert slot.process and slot.job
    slot.log.close()
    outcome, folder = outcomes[slot.job.name], output / slot.job.folder
    record = read_record(folder)
    outcome.seconds = float(record.get("seconds", 0.0))
    outcome.state = "finished" if is_finished(slot.job, output) else "failed"
    if outcome.state == "failed":
        error = failures(record) or last_error(folder / "launch.log", slot.log_begin)
        outcome.reason = error or f"exit status {slot.process.returncode}; see {folder}/launch.log"
    slot.process = slot.job = None
    return outcome


def _announce(outcome: Outcome, outcomes: dict[str, Outcome]) -> None:
    count = sum(known.state not in ("waiting", "running") for known in outcomes.values())
    detail = f"{outcome.seconds:.0f} s" if outcome.state == "finished" else outcome.reason
    print(f"[{count}/{len(outcomes)}] {outcome.job.name}: {outcome.state}, {detail}")


def _stop(slots: Sequence[Slot]) -> None:
    """Ask all running jobs to save and end, and end those that do not within the grace time."""
    processes = [slot.process for slot in slots if slot.process]
    for number, grace in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 0)):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)  # the launcher and its ranks
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(POLL)
