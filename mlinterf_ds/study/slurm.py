"""The same jobs as dependent batch jobs: each starts when those it needs have ended well; the report follows all."""

from __future__ import annotations

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


def submit(
    jobs: Sequence[Job], config: StudyConfig, output: Path, write: Callable[[Job], Path], again: Sequence[str]
) -> dict[str, str]:
    """Submit all jobs that are not finished; the id of each by name, and of the "report".

    again: the arguments of this study, which the report's job is started with.
    """
    ids: dict[str, str] = {}
    for job in jobs:
        if is_finished(job, output):
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
    report = [sys.executable, str(SCRIPT), *again, "--report"]
    dependency = f"afterany:{':'.join(ids.values())}" if ids else ""
    return ids | {"report": _sbatch("report", shlex.join(report), config, output, dependency)}


def _sbatch(name: str, line: str, config: StudyConfig, folder: Path, dependency: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"--job-name={config.name}.{name}", f"--output={folder.resolve()}/launch.log", "--open-mode=append"]
    options += ["--nodes=1", "--ntasks=1", *config.sbatch]
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
    return done.stdout.strip().partition(";")[0]
