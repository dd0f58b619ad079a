"""`restarts=N`: all ranks start again together after a fault, and only then."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrain.config import load_run
from mlinterf_ds.runtime.restarts import Supervisor
from tests.commands import ROOT, wait_until
from tests.mlflow_server import free_port

# A rank that notes its start, meets nobody, and ends as told: STATUS_<rank>_<attempt>; "wait" waits for a signal.
RANK = """
import os, signal, sys, time
from pathlib import Path
rank, attempt = os.environ["RANK"], os.environ["MLINTERF_DS_ATTEMPT"]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
place = os.environ["MLINTERF_DS_RENDEZVOUS"].rpartition("/")[2].replace("-", "_")
Path(sys.argv[1], f"started-{rank}-{attempt}-{place}").touch()
end = os.environ.get(f"STATUS_{rank}_{attempt}", "0")
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60 if end == "wait" else 0)
sys.exit(0 if end == "wait" else int(end))
"""
SUPERVISOR = """
import sys
from mlinterf_ds.runtime.program import main
from mlinterf_ds.runtime.restarts import Supervisor
main(lambda line: Supervisor(2, 0.5, "go on with --set output=runs/x --set resume=auto").run(line), sys.argv[1:])
"""


def start(folder: Path, world: int, **ends: str) -> list[subprocess.Popen[str]]:
    script = folder / "rank.py"
    script.write_text(RANK)
    line = [sys.executable, "-c", SUPERVISOR, sys.executable, str(script), str(folder)]
    numbers = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "PYTHONPATH": str(ROOT)}
    numbers["MLINTERF_DS_RENDEZVOUS"] = f"file://{folder}/meeting"
    return [
        subprocess.Popen(line, env=numbers | dict(os.environ) | ends | {"RANK": str(rank)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(world)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    said = [process.communicate(timeout=90)[0] for process in processes]
    return [process.returncode for process in processes], "".join(said)


def starts(folder: Path) -> list[tuple[str, str]]:
    return sorted(tuple(path.name.split("-")[1:3]) for path in folder.glob("started-*"))


def test_a_killed_rank_starts_all_of_them_again(tmp_path: Path) -> None:
    codes, said = ended(start(tmp_path, 2, STATUS_1_0="kill", STATUS_0_0="wait"))
    assert codes == [0, 0] and {("1", "0"), ("0", "1"), ("1", "1")} <= set(starts(tmp_path))
    assert "rank 1 was killed by SIGKILL: starting all ranks again (1 of 2)" in said
    places = {path.name.split("-")[3] for path in tmp_path.glob("started-*")}
    assert places == {"meeting_attempt_0", "meeting_attempt_1"}, "ranks of an attempt meet where no other attempt's do"


def test_a_rank_that_is_killed_while_it_ends_is_named(tmp_path: Path) -> None:
    """After a scheduler's signal nothing is started again, and no other message says why the job failed."""
    script = tmp_path / "rank.py"
    kill = "import os, signal, time\nsignal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))\n"
    script.write_text(f"{kill}open({str(tmp_path / 'ready')!r}, 'w').close()\ntime.sleep(60)\n")
    line = [sys.executable, "-c", SUPERVISOR, sys.executable, str(script)]
    numbers = {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "PYTHONPATH": str(ROOT), "RANK": "0"}
    numbers["MLINTERF_DS_RENDEZVOUS"] = f"file://{tmp_path}/meeting"
    job = subprocess.Popen(
        line, env=dict(os.environ) | numbers, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not (tmp_path / "ready").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.terminate()
    codes, said = ended([job])
    assert codes == [9] and "rank 0 was killed by SIGKILL while it was ending: go on with --set output=runs/x" in said


def test_ranks_under_torchrun_do_not_look_for_its_own_store(tmp_path: Path, monkeypatch) -> None:
    """With this variable of torchrun's, torch has no rank listen at the port of an attempt, and all of them wait."""
    monkeypatch.setenv("MLINTERF_DS_RENDEZVOUS", f"file://{tmp_path}/meeting")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    supervisor = Supervisor(0, 0.5, "")
    supervisor.address = "env://"
    told = "import os, sys; sys.exit(3 + (os.environ['TORCHELASTIC_USE_AGENT_STORE'] == 'False'))"
    assert supervisor._attempt(0, [sys.executable, "-c", told]) == (0, 4)


def test_it_gives_up_with_the_reason_and_the_command_that_resumes(tmp_path: Path) -> None:
    codes, said = ended(start(tmp_path, 2, STATUS_0_0="1", STATUS_0_1="7", STATUS_0_2="9", STATUS_1_2="wait"))
    assert codes == [2, 2] and [("0", str(attempt)) for attempt in range(3)] == starts(tmp_path)[:3]
    assert "error: rank 0 failed with exit code 9, after 2 restarts: mend it, then go on with" in said
    assert "--set output=runs/x --set resume=auto" in said and "Traceback" not in said


@pytest.mark.parametrize("status, killed", [(-9, True), (-11, True), (0, False), (1, False), (2, False), (None, False)])
def test_only_a_child_that_was_killed_left_its_records_open(status: int | None, killed: bool) -> None:
    """A run that is refused because another writes in its folder, for one, must not close that one's records."""
    supervisor = object.__new__(Supervisor)
    supervisor.child = SimpleNamespace(returncode=status)
    assert supervisor.killed is killed
    supervisor.child = None
    assert not supervisor.killed


def test_a_users_mistake_is_not_tried_again(tmp_path: Path) -> None:
    codes, _ = ended(start(tmp_path, 2, STATUS_0_0="2", STATUS_1_0="wait"))
    assert codes == [2, 2] and ("0", "1") not in starts(tmp_path)


@pytest.mark.parametrize(
    "status, unseen, verdict", [(1, [False], (1, 7)), (2, [False], (0, 2)), (2, [], (0, 2))],
    ids=["the first stands", "a mistake is final", "and when it was not noted in time"],
)  # fmt: skip
def test_two_failures_at_once(status: int, unseen: list[bool], verdict: tuple, tmp_path: Path, monkeypatch) -> None:
    """Rank 1 is noted before this rank 0's child ends; `unseen`: but after its supervisor's look at the store."""
    monkeypatch.setenv("MLINTERF_DS_RENDEZVOUS", f"file://{tmp_path}/meeting")
    supervisor = Supervisor(1, 0.5, "")
    supervisor.store.set("attempt-0/failed", "1 7")
    looks = iter(unseen)

    def all_have(*keys: str) -> bool:
        assert supervisor.child
        return supervisor.child.poll() is not None and next(looks, supervisor.store.check(list(keys)))

    monkeypatch.setattr(supervisor, "_all_have", all_have)
    assert supervisor._attempt(0, [sys.executable, "-c", f"exit({status})"]) == verdict


def test_a_signal_between_attempts_reaches_the_next_rank(tmp_path: Path, monkeypatch) -> None:
    """It was asked for before there was a child to hand it to."""
    monkeypatch.setenv("MLINTERF_DS_RENDEZVOUS", f"file://{tmp_path}/meeting")
    supervisor = Supervisor(1, 0.5, "")
    supervisor.store.set("asked", "")
    began = time.monotonic()
    assert supervisor._attempt(1, [sys.executable, "-c", "import time; time.sleep(60)"]) == (0, -signal.SIGTERM)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_and_ends_the_job(number: int, tmp_path: Path) -> None:
    """Ctrl-C as SIGTERM: the terminal has sent the ranks a SIGINT already, and a second one would end them without saving."""
    processes = start(tmp_path, 2, STATUS_0_0="wait", STATUS_1_0="wait")
    wait_until(lambda: len(starts(tmp_path)) == 2, 120)
    for process in processes:
        process.send_signal(number)
    codes, said = ended(processes)
    assert codes == [0, 0] and len(starts(tmp_path)) == 2 and "again" not in said


def test_a_supervisor_without_rank_0s_host_ends_in_bounded_time(tmp_path: Path) -> None:
    """Rank 0's whole host dies: its supervisor, and the store with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(free_port()))
        patch.setenv("MLINTERF_DS_RENDEZVOUS", "env://")
        processes = start(tmp_path, 2, STATUS_0_0="wait", STATUS_1_0="wait")
    wait_until(lambda: len(starts(tmp_path)) == 2, 120)
    processes[0].kill()
    said = processes[1].communicate(timeout=60)[0]
    assert processes[1].returncode != 0 and "rank 0" in said and "resume=auto" in said


def test_what_a_restarted_run_resumes_from(tmp_path: Path) -> None:
    from mlinterf_ds.pretrain.main import resuming

    settings = [f"output={tmp_path}", "restarts=1", "resume=elsewhere/checkpoints/step-00000003"]
    config = load_run([], settings)
    assert resuming(config).resume.startswith("elsewhere"), "nothing of its own yet"
    assert resuming(load_run([], settings[:2])).resume == "auto"
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert resuming(config).resume == "auto"
    assert resuming(load_run([], settings[:1])).resume == "", "only where restarts were asked for"
    with pytest.raises(UserError, match=r"restarts=1 needs output"):
        load_run([], ["restarts=1"])
