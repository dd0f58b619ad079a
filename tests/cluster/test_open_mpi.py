"""launch/cluster/pretrain.mpirun and rank.sh on one host: logs, exit codes, the reason last."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import ROOT, flags

pytestmark = pytest.mark.skipif(not shutil.which("mpirun"), reason="no mpirun (Debian: openmpi-bin)")
SETTINGS = ["train.steps=4", "train.batch=8", "train.warmup=2", "train.epoch_steps=4", "model.width=32", "model.ffn=64"]
SETTINGS += ["data.eval_rows=8", "data.synthetic_sentences=600", "tracking.enabled=false", "parallel.timeout=1"]


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "hostfile").write_text("# this one\nlocalhost slots=2\n")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "MPIRUN_ARGUMENTS": "--oversubscribe"}
    environment = os.environ | root | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [
        "bash",
        "launch/cluster/pretrain.mpirun",
        str(folder / "hostfile"),
        str(folder / "run"),
        *flags(*SETTINGS, *more),
    ]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_two_ranks_and_a_mistake(tmp_path: Path) -> None:
    done = run(tmp_path, "parallel.tensor=2")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "1 x 2 ranks (data x tensor)" in done.stdout, "rank 0 is on screen too"
    assert {path.name for path in tmp_path.glob("run/log/job-*/*")} == {"rank-0.log", "rank-1.log"}
    done = run(tmp_path, "train.speed=9")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and lines[-1] == "go on with the same command"
    assert lines[-2].startswith("error: rank 0 failed with exit code 2") and "rank-0.log" in lines[-2]
    assert any("unknown key" in line for line in lines[-8:])


RANK = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "command, status, how", [("exit 3", 3, "failed with exit code 3"), ("kill -9 $$", 137, "SIGKILL")]
)
def test_a_failing_rank_is_noted_and_explained(tmp_path: Path, command: str, status: int, how: str) -> None:
    cluster = ROOT / "launch" / "cluster"
    line = ["bash", str(cluster / "rank.sh"), str(tmp_path), "bash", "-c", f"echo because of $RANK; {command}"]
    assert subprocess.run(line, env=os.environ | RANK, timeout=30).returncode == status
    (tmp_path / "failed-0").write_text("9999999999.5 0 1\n")
    told = subprocess.run(["bash", str(cluster / "reason.sh"), str(tmp_path)], capture_output=True, text=True)
    said = told.stderr
    assert told.returncode == status
    assert "because of 1\n" in said and said.splitlines()[-1].startswith("error: rank 1 ") and how in said


def test_a_signal_reaches_the_rank_which_ends_well(tmp_path: Path) -> None:
    script = "trap 'echo saved; exit 0' TERM; echo ready; while true; do sleep 0.1; done"
    rank = ROOT / "launch" / "cluster" / "rank.sh"
    job = subprocess.Popen(["bash", str(rank), str(tmp_path), "bash", "-c", script], env=os.environ | RANK)
    log = tmp_path / "rank-1.log"
    while not (log.exists() and "ready" in log.read_text()):
        assert job.poll() is None
        time.sleep(0.02)
    job.terminate()
    assert job.wait(timeout=30) == 0 and "saved" in log.read_text() and not (tmp_path / "failed-1").exists()


def test_a_signal_while_the_rank_is_started_reaches_it(tmp_path: Path) -> None:
    """The folder of its log is a slow one: mkdir waits, and the signal comes meanwhile."""
    (tmp_path / "mkdir").write_text(
        '#!/bin/sh\ntouch "$2.waits"; while [ ! -e "$2.go" ]; do sleep 0.05; done; /bin/mkdir "$@"\n'
    )
    (tmp_path / "mkdir").chmod(0o755)
    logs, rank = tmp_path / "logs", ROOT / "launch" / "cluster" / "rank.sh"
    environment = os.environ | RANK | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", str(rank), str(logs), "sleep", "60"], env=environment)
    while not (tmp_path / "logs.waits").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.terminate()
    (tmp_path / "logs.go").touch()
    assert job.wait(timeout=30) == 143
