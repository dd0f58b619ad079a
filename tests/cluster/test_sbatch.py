"""launch/cluster/pretrain.sbatch without Slurm: what it asks srun for (the real thing: tests/cluster/slurm.sh)."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def asked(folder: Path, **variables: str) -> str:
    """The words that the script gives to srun."""
    for name, script in (("srun", 'echo "$@"'), ("scontrol", "echo node-1")):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    (folder / "summary.json").write_text("{}")
    job = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-1"}
    usual = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    line = ["bash", "launch/cluster/pretrain.sbatch", str(folder), "--recipe", "tiny"]
    done = subprocess.run(line, cwd=ROOT, env=usual | job | variables, capture_output=True, text=True, timeout=30)
    return done.stdout


def test_a_task_keeps_the_processors_that_the_job_asked_for(tmp_path: Path) -> None:
    assert "--kill-on-bad-exit=1 --cpus-per-task=8 bash " in asked(tmp_path, SLURM_CPUS_PER_TASK="8")
    assert "--kill-on-bad-exit=1 bash " in asked(tmp_path), "where the job asked for none"
