"""Submit a study's jobs to Slurm: each starts when the jobs it needs have succeeded, and the report follows all."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mlinterf_ds.errors import UserError
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.study.folders import SCRIPT, is_finished, launch_command
from mlinterf_ds.study.jobs import Job
from mlinterf_ds.study.worker import STARTED
from mlinterf_ds.tracking.facts import user_name

ID_FILE = "slurm.id"  # holds the id of the batch job last submitted from its folder
PORT = "$((20000 + SLURM_JOB_ID % 20000))"  # where a batch job's ranks meet, as the shell computes it


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
        command = shlex.join(launch_command(write(job), config.ranks, PORT)).replace(shlex.quote(PORT), PORT)
        ids[job.name] = _sbatch(job.name, command, config, output / job.folder, dependency)
    report_id = _submitted_id(output)
    if ids and {*ids.values(), report_id} <= queued:
        return ids | {"report": report_id}
    report = [sys.executable, str(SCRIPT), *own_arguments, "--report"]
    dependency = f"afterany:{':'.join(ids.values())}" if ids else ""
    return ids | {"report": _sbatch("report", shlex.join(report), config, output, dependency)}


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
    printed = _run([*words, str(script)], "see the recipe's sbatch options")
    job_id = printed.strip().partition(";")[0]  # a federated cluster's name may follow
    (folder / ID_FILE).write_text(job_id, "utf-8")
    return job_id


def _submitted_id(folder: Path) -> str:
    """The id of the batch job that was last submitted from this folder; '' if none was."""
    return (folder / ID_FILE).read_text("utf-8").strip() if (folder / ID_FILE).is_file() else ""


def _queued() -> set[str]:
    """The ids of this user's batch jobs that wait or run."""
    words = ["squeue", "--noheader", "--format=%A", f"--user={user_name()}"]
    return set(_run(words, "without it jobs that are still queued would be submitted again").split())


def _run(words: Sequence[str], remark: str) -> str:
    """What a command of Slurm prints. UserError, which ends in `remark`, if there is no such command or it fails."""
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(
            f"--executor slurm: no {words[0]} on PATH; run on a host of the cluster, or with --executor local"
        ) from None
    if done.returncode:
        raise UserError(f"{shlex.join(words)}: {done.stderr.strip()}; {remark}")
    return done.stdout
