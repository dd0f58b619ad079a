"""Submit a study's jobs to Slurm: each starts when the jobs it needs have succeeded, and the report follows all."""

from __future__ import annotations

import getpass
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mlinterf_ds.errors import UserError
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.study.folders import is_finished
from mlinterf_ds.study.jobs import Job
from mlinterf_ds.study.launch import SCRIPT, launch_command
from mlinterf_ds.study.worker import STARTED

ID_FILE = "slurm.id"  # holds the id of the batch job last submitted from its folder


def submit(
    jobs: Sequence[Job], config: StudyConfig, output: Path, write: Callable[[Job], Path], own_arguments: Sequence[str]
) -> dict[str, str]:
    """Submit all jobs that are neither finished nor queued; the ids of all batch jobs by name, the "report" among them.

    Each id is written beside its job at once, so that an error midway loses none.
    write: writes a job's folder, and returns it. own_arguments: of this study's command, which the report's job repeats.
    """
    ids: dict[str, str] = {}
    missing = [job for job in jobs if not is_finished(job, output)]
    submitted = {job.name: _submitted_id(output / job.folder) for job in missing}
    queued = _queued() if any(submitted.values()) else set()
    for job in missing:
        if submitted[job.name] in queued:
            ids[job.name] = submitted[job.name]
            continue
        after = [ids[need.name] for need in job.needs if need.name in ids]
        dependency = f"afterok:{':'.join(after)}" if after else ""
        ids[job.name] = _sbatch(job.name, _command(write(job), config.ranks), config, output / job.folder, dependency)
    report_id = _submitted_id(output)
    if ids and {*ids.values(), report_id} <= queued:
        return ids | {"report": report_id}
    report = [sys.executable, str(SCRIPT), *own_arguments, "--report"]
    dependency = f"afterany:{':'.join(ids.values())}" if ids else ""
    return ids | {"report": _sbatch("report", shlex.join(report), config, output, dependency)}


def _command(folder: Path, ranks: int) -> str:
    """The shell command of a job; its port follows from the batch job's id, since a port that is free here may not be there."""
    words = launch_command(folder, ranks)
    port = words[words.index("--master_port") + 1]
    return shlex.join(words).replace(f"--master_port {port}", "--master_port $((20000 + SLURM_JOB_ID % 20000))")


def _sbatch(name: str, command: str, config: StudyConfig, folder: Path, dependency: str) -> str:
    """Write the batch script and submit it; its id."""
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"--job-name={config.name}.{name}", f"--output={folder.resolve()}/launch.log", "--open-mode=truncate"]
    options += ["--nodes=1", "--ntasks=1", f"--cpus-per-task={config.ranks}", *config.sbatch]
    script = folder / "submit.sbatch"
    head = "\n".join(f"#SBATCH {option}" for option in options)
    script.write_text(
        f"#!/bin/bash\n{head}\ncd {shlex.quote(str(Path.cwd()))}\nexport {STARTED}=$(date +%s)\nexec {command}\n",
        "utf-8",
    )
    words = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
    words += [f"--dependency={dependency}"] * bool(dependency)
    try:
        done = subprocess.run([*words, str(script)], capture_output=True, encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(
            "--executor slurm: no sbatch on PATH; run on a host of the cluster, or with --executor local"
        ) from None
    if done.returncode:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip()}; see the recipe's sbatch options")
    job_id = done.stdout.strip().partition(";")[0]  # a federated cluster's name may follow
    (folder / ID_FILE).write_text(job_id, "utf-8")
    return job_id


def _submitted_id(folder: Path) -> str:
    """The id of the batch job that was last submitted from this folder; '' if none was."""
    return (folder / ID_FILE).read_text("utf-8").strip() if (folder / ID_FILE).is_file() else ""


def _queued() -> set[str]:
    """The ids of this user's batch jobs that wait or run."""
    words = ["squeue", "--noheader", "--format=%A", f"--user={getpass.getuser()}"]
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError("--executor slurm: no squeue on PATH, which lists the jobs that are still queued") from None
    if done.returncode:
        raise UserError(
            f"squeue: {done.stderr.strip()}; without it jobs that are still queued would be submitted again"
        )
    return set(done.stdout.split())
