"""Finds out which rank this process is, under any launcher, and where the job's ranks meet."""

from __future__ import annotations

import datetime
import getpass
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from mlinterf_ds.errors import Fault, UserError

if TYPE_CHECKING:
    import torch.distributed as dist

# Set by whoever starts ranks and knows better than `rendezvous` where they meet.
ADDRESS = "MLINTERF_DS_RENDEZVOUS"
REMARK = 15.0  # seconds that rank 0 waits in silence for the others


def find_home() -> None:
    """Sets HOME and USER where the system knows neither a home nor a name of this user, as in some containers.

    Packages ask for both and end with an error where there are none.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(_private_folder())
    try:
        getpass.getuser()
    except (OSError, KeyError, ImportError):
        os.environ["USER"] = str(os.getuid())


def adopt() -> None:
    """Give ranks that plain `srun` or `mpirun` started the variables of torch's launchers (RANK, WORLD_SIZE, ...)."""
    variables = os.environ
    if "RANK" in variables:
        return _check_ranks()
    if {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"} <= variables.keys():
        for name, suffix in (("RANK", "RANK"), ("WORLD_SIZE", "SIZE"), ("LOCAL_RANK", "LOCAL_RANK")):
            variables[name] = variables[f"OMPI_COMM_WORLD_{suffix}"]
    elif _is_slurm_task():
        variables["RANK"], variables["WORLD_SIZE"] = variables["SLURM_PROCID"], variables["SLURM_STEP_NUM_TASKS"]
        variables["LOCAL_RANK"] = variables["SLURM_LOCALID"]
        if "MASTER_ADDR" not in variables and local_world() != int(variables["WORLD_SIZE"]):
            variables["MASTER_ADDR"] = _first_slurm_host()
        variables.setdefault("MASTER_PORT", str(20000 + int(variables["SLURM_JOB_ID"]) % 20000))
    else:
        if not variables.get("LOCAL_RANK", "0").isdecimal():
            raise UserError(
                f"LOCAL_RANK={variables['LOCAL_RANK']}: expected a number; `unset LOCAL_RANK` for one process"
            )
        if variables.get("WORLD_SIZE", "1") != "1":
            raise UserError(
                f"WORLD_SIZE={variables['WORLD_SIZE']} is set, but RANK is not, so that this process cannot tell which rank it "
                "is: start the ranks with deepspeed or torchrun, or `unset WORLD_SIZE` for one process"
            )
        return
    _check_ranks()
    variables.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in variables and local_world() != int(variables["WORLD_SIZE"]):
        raise UserError(
            f"{variables['WORLD_SIZE']} ranks on several hosts do not know where to meet: export MASTER_ADDR=<first host> "
            "to all of them (mpirun -x MASTER_ADDR=...), or start with launch/cluster/pretrain.mpirun"
        )


def _check_ranks() -> None:
    """UserError unless RANK is a number below WORLD_SIZE, and LOCAL_RANK is one; without them there is one rank, on its own host."""
    rank, world, local = os.environ["RANK"], os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_RANK", "0")
    numbers = all(text.isdecimal() for text in (rank, world, local))
    if not numbers or int(rank) >= int(world):
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={world} and LOCAL_RANK={local}: expected ranks from 0 to WORLD_SIZE - 1; start the ranks with "
            "deepspeed or torchrun, or `unset RANK WORLD_SIZE LOCAL_RANK` for one process"
        )


def _is_slurm_task() -> bool:
    """Whether srun started this process as a task.

    A batch script has Slurm's variables too, but no number of tasks; an interactive shell has all of them, and a terminal.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    return all(os.environ.get(name, "").isdecimal() for name in names) and "SLURM_PTY_PORT" not in os.environ


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


def local_share() -> tuple[int, int]:
    """Which share of the work that every host does once is this rank's: (part, parts); all of it where its neighbours are unknown."""
    count = local_world()
    return (int(os.environ["LOCAL_RANK"]), count) if count else (0, 1)


def _slurm_local() -> int:
    """Tasks of this step on this host, from e.g. SLURM_STEP_TASKS_PER_NODE=2(x3),1; 0 outside of srun."""
    counts: list[int] = []
    if not _is_slurm_task():
        return 0
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


def meet(address: str, rank: int, world: int, patience: datetime.timedelta) -> dist.Store:
    """Returns the ranks' common store once all have joined: on slow storage some start minutes later than others.

    Rank 0 says on the screen whom it waits for, after REMARK seconds. Raises UserError after `patience`.
    """
    import torch.distributed as dist  # no other part of torch or DeepSpeed is needed by a rank's supervisor

    source = "WORLD_SIZE: the launcher starts a process for each; for one process `unset RANK WORLD_SIZE`"
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        source = "SLURM_STEP_NUM_TASKS: srun starts a task for each; for one process begin the command with `env -u SLURM_PROCID`"
    about = f"rank {rank} waits for the others of {world} ranks, which may still be starting; their number comes from {source}"
    remark = threading.Timer(REMARK, lambda: print(f"\n{about}", file=sys.stderr, flush=True))
    remark.daemon = True
    if rank == 0:
        remark.start()
    try:
        store: dist.Store = next(iter(dist.rendezvous(address, rank, world, timeout=patience)))[0]
        store.set(f"arrived/{rank}", "")
        store.wait([f"arrived/{other}" for other in range(world)], patience)
    except ValueError as error:  # torch misses MASTER_ADDR or MASTER_PORT
        raise UserError(f"rank {rank} does not know where the ranks meet ({error}); {about}") from None
    except RuntimeError as error:  # DistStoreError, DistNetworkError
        minutes = patience.total_seconds() / 60
        raise Fault(
            f"not all ranks have come within {minutes:g} minutes; {about} ({str(error).splitlines()[0]})"
        ) from None
    finally:
        remark.cancel()
    return store


def _private_folder() -> Path:
    """A folder for temporary files that nobody else can have prepared or can read."""
    try:
        folder = Path(tempfile.gettempdir()) / f"mlinterf_ds-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"no folder for temporary files can be written ({error.strerror}): set TMPDIR to one that can, with some space"
        ) from None
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UserError(f"{folder} is not a folder that is yours alone (chmod 700): remove it, or set TMPDIR")
    return folder
