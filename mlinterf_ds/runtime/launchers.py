"""Finds out which rank this process is, under any launcher, and where the job's ranks meet."""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from pathlib import Path

from mlinterf_ds.errors import UserError

# Set by whoever starts ranks and knows better than `rendezvous` where they meet.
ADDRESS = "MLINTERF_DS_RENDEZVOUS"


def adopt() -> None:
    """Give ranks that plain `srun` or `mpirun` started the variables of torch's launchers (RANK, WORLD_SIZE, ...)."""
    variables = os.environ
    if "RANK" in variables:
        return
    if "OMPI_COMM_WORLD_RANK" in variables:
        for name, suffix in (("RANK", "RANK"), ("WORLD_SIZE", "SIZE"), ("LOCAL_RANK", "LOCAL_RANK")):
            variables[name] = variables[f"OMPI_COMM_WORLD_{suffix}"]
    # A batch script has Slurm's variables too, but is no task of srun.
    elif "SLURM_STEP_NUM_TASKS" in variables and "SLURM_PROCID" in variables:
        variables["RANK"], variables["WORLD_SIZE"] = variables["SLURM_PROCID"], variables["SLURM_STEP_NUM_TASKS"]
        variables["LOCAL_RANK"] = variables["SLURM_LOCALID"]
        if "MASTER_ADDR" not in variables and local_world() != int(variables["WORLD_SIZE"]):
            variables["MASTER_ADDR"] = _first_slurm_host()
        variables.setdefault("MASTER_PORT", str(20000 + int(variables["SLURM_JOB_ID"]) % 20000))
    else:
        return
    variables.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in variables and local_world() != int(variables["WORLD_SIZE"]):
        raise UserError(
            f"{variables['WORLD_SIZE']} ranks on several hosts do not know where to meet: export MASTER_ADDR=<first host> "
            "to all of them (mpirun -x MASTER_ADDR=...), or start with launch/cluster/pretrain.mpirun"
        )


def _first_slurm_host() -> str:
    """The first host of this Slurm step."""
    listed = os.environ.get("SLURM_STEP_NODELIST", "")
    try:
        return subprocess.check_output(
            ["scontrol", "show", "hostnames", listed], encoding="utf-8", errors="replace"
        ).split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise UserError(
            f"no host could be read from SLURM_STEP_NODELIST={listed!r}: export MASTER_ADDR before srun"
        ) from None


def local_world() -> int:
    """The number of ranks on this host, whichever launcher started them; 0 if it is not known."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")  # torch, DeepSpeed, Open MPI
    count = next((os.environ[name] for name in names if os.environ.get(name, "").isdigit()), None)
    return int(count or _slurm_local() or (os.environ.get("WORLD_SIZE", "1") == "1"))


def _slurm_local() -> int:
    """Tasks of this step on this host, from e.g. SLURM_STEP_TASKS_PER_NODE=2(x3),1; 0 outside of srun."""
    counts: list[int] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        count, _, times = part.partition("(x")
        if count.isdigit():
            counts += [int(count)] * int(times.rstrip(")") or 1)
    node = int(os.environ.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else 0


def rendezvous() -> str:
    """The address at which the ranks of this job meet.

    Ranks of one host that share a launcher meet in a file named after it, so that two jobs on one machine need no
    port of their own; across hosts torch's environment variables rule.
    """
    if ADDRESS in os.environ:
        return os.environ[ADDRESS]
    if local_world() != int(os.environ.get("WORLD_SIZE", 1)):
        return "env://"
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text("utf-8").rsplit(")", 1)[1].split()[19]
    except OSError:
        started = "0"
    name = f"{parent}-{started}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if os.environ.get("WORLD_SIZE", "1") == "1":
        name += f"-{os.getpid()}"
    return f"file://{_private_folder()}/{name}"


def _private_folder() -> Path:
    """A folder for temporary files that nobody else can have prepared or can read."""
    folder = Path(tempfile.gettempdir()) / f"mlinterf_ds-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UserError(f"{folder} is not a folder that is yours alone (chmod 700): remove it, or set TMPDIR")
    return folder
