"""Which rank we are, and where ranks meet, as each launcher says it."""

import datetime
import errno
import os
from pathlib import Path

import pytest

from mlinterf_ds.errors import UserError
from mlinterf_ds.runtime import launchers

KNOWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "2", "SLURM_NODEID": "1",
         "SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "SLURM_JOB_ID": "47", "SLURM_STEP_NODELIST": "node[1-3]"}  # fmt: skip


@pytest.fixture(autouse=True)
def bare(monkeypatch) -> None:
    """No launcher's variables, and what `adopt` sets is forgotten."""
    for name in list(os.environ):
        if name in KNOWN or name.startswith(("OMPI_", "SLURM_", "MLINTERF_DS_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))


def ranks() -> dict[str, str]:
    return {name: os.environ[name] for name in KNOWN if name in os.environ}


def test_no_launcher_is_one_rank() -> None:
    launchers.adopt()
    assert ranks() == {} and launchers.local_world() == 1 and launchers.rendezvous().startswith("file://")


def test_half_of_open_mpis_variables_are_left_over() -> None:
    os.environ["OMPI_COMM_WORLD_RANK"] = "0"
    launchers.adopt()
    assert ranks() == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOENT])
def test_without_a_folder_for_temporary_files(number: int, monkeypatch) -> None:
    def fail() -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(launchers.tempfile, "gettempdir", fail)
    with pytest.raises(UserError, match=f"temporary files can be written .{os.strerror(number)}.: set TMPDIR"):
        launchers.rendezvous()


def test_a_rank_that_is_told_everything_is_left_alone() -> None:
    os.environ |= SLURM | {"RANK": "0", "WORLD_SIZE": "1"}
    launchers.adopt()
    assert ranks() == {"RANK": "0", "WORLD_SIZE": "1"}


def test_a_rank_whose_neighbours_are_unknown_does_all_of_its_hosts_work() -> None:
    os.environ |= {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launchers.local_world() == 0 and launchers.local_share() == (0, 1)
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    assert launchers.local_share() == (3, 4)


def test_a_batch_script_is_no_task_of_srun() -> None:
    os.environ |= {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "47", "SLURM_NTASKS_PER_NODE": "4"}
    launchers.adopt()
    assert ranks() == {} and launchers.local_world() == 1


@pytest.mark.parametrize("node, local", [("0", 3), ("1", 3), ("2", 1)])
def test_slurm(monkeypatch, node: str, local: int) -> None:
    monkeypatch.setattr(launchers, "_first_slurm_host", lambda: "node1")
    os.environ |= SLURM | {"SLURM_NODEID": node}
    launchers.adopt()
    wanted = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "20047"}
    assert ranks() == wanted and launchers.local_world() == local and launchers.rendezvous() == "env://"


@pytest.mark.parametrize("left_over", [{"SLURM_JOB_ID": None}, {"SLURM_PTY_PORT": "4711"}, {"SLURM_PROCID": None}])
def test_what_an_interactive_step_leaves_is_no_task_of_srun(left_over: dict[str, str | None]) -> None:
    os.environ |= {name: value for name, value in (SLURM | left_over).items() if value}
    launchers.adopt()
    assert ranks() == {} and launchers.local_world() == 1 and launchers.rendezvous().startswith("file://")


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: expected a number; `unset LOCAL_RANK`"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK is not.*unset WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2 and LOCAL_RANK=0: expected ranks from 0"),
        ({"RANK": "1"}, "RANK=1, WORLD_SIZE=1 and"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE= and"),
        ({"RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK=x: expected"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x"),
    ],
)
def test_ranks_that_cannot_be(variables: dict[str, str], words: str) -> None:
    os.environ |= variables
    with pytest.raises(UserError, match=words):
        launchers.adopt()


def test_rank_0_says_whom_it_waits_for_and_gives_up_with_a_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(launchers, "REMARK", 0.1)
    os.environ |= SLURM
    with pytest.raises(UserError, match="not all ranks have come within .*env -u SLURM_PROCID"):
        launchers.meet(f"file://{tmp_path}/meeting", 0, 4, datetime.timedelta(seconds=1))
    assert "rank 0 waits for the others of 4 ranks" in capsys.readouterr().err


def test_a_user_without_home_and_name_gets_both(tmp_path: Path, monkeypatch) -> None:
    def nobody(*_: object) -> str:
        raise KeyError("uid not found")

    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        os.environ.pop(name, None)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(launchers.tempfile, "gettempdir", lambda: str(tmp_path))
    launchers.find_home()
    assert Path(os.environ["HOME"]).is_dir() and os.environ["USER"] == str(os.getuid())


def test_slurm_without_its_own_command_says_what_to_export() -> None:
    os.environ |= SLURM | {"PATH": "/nowhere"}
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST='node.*export MASTER_ADDR before srun"):
        launchers.adopt()


def test_open_mpi() -> None:
    os.environ |= OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    launchers.adopt()
    assert ranks() == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}
    assert launchers.local_world() == 8 and launchers.rendezvous().startswith("file://"), "one host needs no port"


def test_open_mpi_over_several_hosts_needs_an_address() -> None:
    os.environ |= OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    with pytest.raises(UserError, match=r"mpirun -x MASTER_ADDR"):
        launchers.adopt()
    os.environ["MASTER_ADDR"] = "node-1"
    launchers.adopt()
    assert launchers.rendezvous() == "env://"


def test_who_starts_ranks_may_say_where_they_meet() -> None:
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", launchers.ADDRESS: "env://"}
    assert launchers.rendezvous() == "env://"


@pytest.mark.skipif(not Path("/sys/class/net/lo").exists(), reason="needs Linux")
def test_a_loopback_network_that_is_down_is_said(monkeypatch) -> None:
    """As `unshare -n` leaves it: gloo's own error names neither the network's state nor a remedy."""
    from mlinterf_ds.runtime import parallel

    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    assert parallel.is_up("lo")
    parallel.use_loopback("gloo")
    monkeypatch.setattr(parallel, "is_up", lambda _: False)
    parallel.use_loopback("nccl")
    with pytest.raises(UserError, match="loopback network.* is down.*ip link set lo up"):
        parallel.use_loopback("gloo")
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    parallel.use_loopback("gloo")  # the user has chosen
