"""The same jobs as dependent batch jobs: each starts when those it needs have ended well; the report follows all."""

from __future__ import annotations

import getpass
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mlinterf_ds.errors import UserError
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.study.plan import Job
from mlinterf_ds.study.runner import SCRIPT, is_finished, launch_command
from mlinterf_ds.study.worker import STARTED

ID = "slurm.id"  # of the batch job, beside its script


def submit(
    jobs: Sequence[Job], config: StudyConfig, output: Path, write: Callable[[Job], Path], again: Sequence[str]
) -> dict[str, str]:
    """Submit all jobs that are neither finished nor queued; the id of each by name, and of the "report".

    Each id is kept beside its job at once, so that an error midway loses none. again: the arguments of this study, which the
    report's job is started with.
    """
    ids: dict[str, str] = {}
    missing = [job for job in jobs if not is_finished(job, output)]
    before = {job.name: _id(output / job.folder) for job in missing}
    queued = _queued() if any(before.values()) else set()
    for job in missing:
        if before[job.name] in queued:
            ids[job.name] = before[job.name]
            continue
        words = launch_command(write(job), config.ranks)
        place = words.index("--master_port") + 1
        line = shlex.join(words).replace(
            f"--master_port {words[place]}", "--master_port $((20000 + SLURM_JOB_ID % 20000))"
        )
        after = [ids[need.name] for need in job.needs if need.name in ids]
        ids[job.name] = _sbatch(
            job.name, line, config, output / job.folder, f"afterok:{':'.join(after)}" if after else ""
        )
    if ids and {*ids.values(), _id(output)} <= queued:
        return ids | {"report": _id(output)}
    report = [sys.executable, str(SCRIPT), *again, "--report"]
    dependency = f"afterany:{':'.join(ids.values())}" if ids else ""
    return ids | {"report": _sbatch("report", shlex.join(report), config, output, dependency)}


def _sbatch(name: str, line: str, config: StudyConfig, folder: Path, dependency: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"--job-name={config.name}.{name}", f"--output={folder.resolve()}/launch.log", "--open-mode=truncate"]
    options += ["--nodes=1", "--ntasks=1", f"--cpus-per-task={config.ranks}", *config.sbatch]
    script = folder / "submit.sbatch"
    head = "\n".join(f"#SBATCH {option}" for option in options)
    script.write_text(
        f"#!/bin/bash\n{head}\ncd {shlex.quote(str(Path.cwd()))}\nexport {STARTED}=$(date +%s)\nexec {line}\n"
    )
    words = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
    words += [f"--dependency={dependency}"] * bool(dependency)
    try:
        done = subprocess.run([*words, str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            "--executor slurm: no sbatch on PATH; run on a host of the cluster, or with --executor local"
        ) from None
    if done.returncode:
        raise UserError(f"sbatch refused {script}: {done.stderr.strip()}; see the recipe's sbatch options")
    found = done.stdout.strip().partition(";")[0]
    (folder / ID).write_text(found)
    return found


def _id(folder: Path) -> str:
    """Of the batch job that was last submitted from this folder; '' if none was."""
    return (folder / ID).read_text().strip() if (folder / ID).is_file() else ""


def _queued() -> set[str]:
    """Ids of this user's batch jobs that wait or run."""
    words = ["squeue", "--noheader", "--format=%A", f"--user={getpass.getuser()}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("--executor slurm: no squeue on PATH, which tells what is still queued") from None
    if done.returncode:
        raise UserError(
            f"squeue: {done.stderr.strip()}; without it jobs that are still queued would be submitted again"
        )
    return set(done.stdout.split())
