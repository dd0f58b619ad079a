"""What every launcher shares: stale build locks, signals, how errors end."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from mlinterf_ds.errors import UserError
from mlinterf_ds.runtime import session
from mlinterf_ds.runtime.launchers import rendezvous
from mlinterf_ds.runtime.output import remove_stale_locks
from mlinterf_ds.runtime.program import PeerFailed, noted
from mlinterf_ds.runtime.signals import Signals, StopVote
from mlinterf_ds.sections import ParallelConfig
from tests.ranks import pool


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_lock_nobody_holds_is_removed_and_one_in_use_is_kept(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, used = tmp_path / "one" / "lock", tmp_path / "two" / "lock"
    for path in (stale, used):
        path.parent.mkdir()
        path.touch()
    with used.open():
        assert remove_stale_locks() == [stale]
    assert used.exists() and not stale.exists()
    assert str(stale) in capsys.readouterr().err


def test_signals_ask_and_the_second_interrupt_interrupts() -> None:
    with Signals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def votes(late: bool) -> list[str]:
    """What this rank is answered after each of five steps: a signal reaches rank 1 in step 2, and a save fails on rank 0 in step 3."""
    signals, rank = Signals(), int(os.environ["RANK"])
    vote, answers = StopVote(signals, torch.device("cpu"), late), []
    for step in range(5):
        if (step, rank) == (2, 1):
            signals.received = "SIGTERM"
        answers.append(vote.reason({"too late": False, "a failed save": step == 3 and rank == 0}))
        if step == 2 and rank == 1 and not late:
            signals.received = None
    return answers


@pytest.mark.parametrize("late", [False, True])
def test_all_ranks_stop_at_one_step(late: bool) -> None:
    """At once, or a step later where the answer would have to be waited for."""
    first, second = pool(2).run(votes, late)
    step = 2 + late
    assert [bool(reason) for reason in first[: step + 1]] == [False] * step + [True]
    assert first[step] == "a signal to another rank" and first[:step] == second[:step]
    assert second[step] == "SIGTERM"
    if not late:
        assert first[3] == second[3] == "a failed save"


@pytest.mark.parametrize("waits, fails, left", [(True, True, 0), (False, True, 1), (True, False, 1)])
def test_a_rank_that_fails_does_not_wait_in_its_clean_up(
    waits: bool, fails: bool, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL would have it wait for the ranks that are inside a collective, so that its error would end nobody for minutes."""
    done: list[str] = []
    group = types.SimpleNamespace(waits_to_leave=waits, leave=lambda: done.append("left"))
    monkeypatch.setattr(session, "Group", lambda *_, **__: group)
    with contextlib.suppress(RuntimeError), session.own_group(ParallelConfig()):
        if fails:
            raise RuntimeError("planted")
    assert len(done) == left


def copies_of_a_vote() -> list[bool | None]:
    """How the votes of a step are copied to the device: without waiting or not (in a rank of a pool)."""
    copied: list[bool | None] = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, kinds: Any, arguments: Any = (), named: Any = None) -> Any:
            if function is torch.Tensor.to:
                copied.append((named or {}).get("non_blocking"))
            return function(*arguments, **(named or {}))

    with Watched():
        StopVote(Signals(), torch.device("cpu")).reason()
    return copied


def test_a_vote_is_sent_without_waiting_for_the_device() -> None:
    assert pool(2).run(copies_of_a_vote) == [[True]] * 2


def test_a_closed_terminal_ends_a_run_as_sigterm_does() -> None:
    """A rank on a terminal of its own, which is closed: it still prints and goes on to its end."""
    code = (
        "import os, sys, time; from mlinterf_ds.runtime.signals import Signals\n"
        "with Signals() as signals:\n"
        "    print('ready', flush=True)\n"
        "    while not signals.received: time.sleep(0.05)\n"
        "    print('saving', flush=True); open(sys.argv[1], 'w').write(signals.received)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "received"
        process, terminal = pty.fork()
        if process == 0:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup pytest` has the system ignore
            os.execv(sys.executable, [sys.executable, "-c", code, str(path)])
        assert b"ready" in os.read(terminal, 100)
        os.close(terminal)
        assert os.waitpid(process, 0)[1] == 0 and path.read_text() == "SIGHUP"


def test_nohup_is_respected() -> None:
    code = "from mlinterf_ds.runtime.signals import ending_signals; print(*map(int, ending_signals()))"
    done = subprocess.run(["nohup", sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(int(signal.SIGTERM)), str(int(signal.SIGINT))]


ENDING = """
import ctypes, os, signal, sys, time
from mlinterf_ds.runtime.program import main
from mlinterf_ds.runtime.signals import Signals
def run(_):
    with Signals("go on so", grace=0.2):
        if sys.argv[1] == "failing":
            raise RuntimeError("a peer is gone")
        print("ready", flush=True)
        lock = ctypes.create_string_buffer(64)
        for _ in range(2):  # the second waits for ever, outside of Python, as a collective does
            ctypes.CDLL(None).pthread_mutex_lock(lock)
def ended(*words):
    try:
        return run(*words)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher's, while the failure is on its way out
main(ended, [])
"""


def test_a_failing_rank_says_why_though_the_launcher_ends_it() -> None:
    line = [sys.executable, "-c", ENDING, "failing"]
    done = subprocess.run(
        line, capture_output=True, text=True, env=os.environ | {"RANK": "3", "WORLD_SIZE": "4"}, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "error: rank 3 failed: RuntimeError: a peer is gone"


def test_a_rank_that_is_told_to_end_inside_a_collective_says_the_way_on() -> None:
    line, rank = [sys.executable, "-c", ENDING, "waiting"], os.environ | {"RANK": "3", "WORLD_SIZE": "4"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=rank) as job:
        try:
            assert job.stdout and job.stderr and job.stdout.readline() == "ready\n"
            job.terminate()
            said = job.stderr.readline() + job.stderr.readline()
            assert "rank 3, told to end" in said and "go on so" in said
        finally:
            job.kill()


def test_the_first_failure_is_told_by_all(tmp_path: Path) -> None:
    logs = [tmp_path / f"rank-{rank}.log" for rank in range(4)]
    first = f"rank 3 failed first: KeyError: 'a word'; its log: {logs[3]}"
    with pytest.raises(KeyError), noted(logs[3]):
        raise KeyError("a word")
    with pytest.raises(PeerFailed) as told, noted(logs[0]):
        raise RuntimeError("a peer is gone")
    assert str(told.value) == f"RuntimeError: a peer is gone; {first}"
    with pytest.raises(UserError, match=r"^use a file$"), noted(logs[1]):
        raise UserError("use a file")  # found by all ranks: said as one rank alone would say it
    for rank, error in ((3, "KeyError: 'a word'"), (0, "RuntimeError: a peer is gone"), (1, "UserError: use a file")):
        assert logs[rank].read_text().startswith("Traceback") and error in logs[rank].read_text()


@pytest.mark.parametrize(
    "raised, status, said",
    [
        ("UserError('use a file')", 2, "error: use a file"),
        ("Fault('the network fails')", 1, "error: the network fails"),
        ("RuntimeError('broken')", 1, "error: rank 3 failed: RuntimeError: broken"),
        (
            "RuntimeError('[gloo/device.cc] epoll_create: Too many open files')",
            1,
            "error: rank 3 failed: RuntimeError: [gloo/device.cc] epoll_create: Too many open files; allow more open files first: "
            "`ulimit -n 4096`",
        ),
        ("PeerFailed('gone; rank 1 failed first')", 1, "error: rank 3 failed: gone; rank 1 failed first"),
        ("KeyboardInterrupt", 130, "interrupted"),
    ],
)
def test_how_a_launcher_ends(raised: str, status: int, said: str) -> None:
    code = (
        "from mlinterf_ds.runtime.program import PeerFailed, main\nfrom mlinterf_ds.errors import Fault, UserError\n"
        f"def run(_):\n    raise {raised}\nmain(run, [])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"RANK": "3", "WORLD_SIZE": "4"},
        timeout=60,
    )
    assert done.returncode == status
    assert done.stderr.strip().splitlines()[-1] == said, "the reason comes last"
    assert ("Traceback" in done.stderr) == ("broken" in raised), "only where nothing else tells the reason"


def test_a_run_that_succeeds_ends_its_process_without_taking_the_interpreter_apart() -> None:
    """Its threads are waited for and its exit functions run; a thread that asks for the interpreter later can't abort it."""
    code = (
        "import atexit, threading, time\nfrom mlinterf_ds.runtime.program import main\n"
        "class Part:\n    def __del__(self):\n        print('taken apart')\n"
        "part = Part()\natexit.register(print, 'at exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('joined'))).start()\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nmain(lambda _: 0, [])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "joined\nat exit\n", "")


def test_figures_are_drawn_as_files_whatever_a_notebook_left_behind() -> None:
    """matplotlib refuses the name of a backend that it does not know as it is imported."""
    code = (
        "from mlinterf_ds.runtime.program import main\n"
        "def run(_):\n    import matplotlib; print(matplotlib.get_backend()); return 0\nmain(run, [])"
    )
    left = os.environ | {"MPLBACKEND": "nonsense"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=left, timeout=60)
    assert (done.returncode, done.stdout) == (0, "agg\n"), done.stderr


def test_a_first_failure_that_is_just_being_written_is_waited_for(tmp_path: Path) -> None:
    told = tmp_path / "failed"
    told.touch()
    writer = threading.Timer(0.3, told.write_text, ["rank 3 failed first: KeyError"])
    writer.start()
    with (
        pytest.raises(PeerFailed, match="gone; rank 3 failed first: KeyError"),
        noted(tmp_path / "rank-0.log"),
    ):
        raise RuntimeError("gone")
    writer.join()


@pytest.mark.parametrize(
    "reason",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6. This is "
        "typically caused by a remote worker crashing. Check the logs of the remote worker before reporting an error.",
        "[/pytorch/gloo/transport/tcp/unbound_buffer.cc:82] Timed out waiting 30000ms for recv operation to complete",
    ],
)
def test_a_rank_that_was_killed_or_stopped_is_told_by_its_neighbour(tmp_path: Path, reason: str) -> None:
    """It could write no reason itself; the neighbour's trace, of a collective, says nothing more: it is in the log."""
    log = tmp_path / "rank-0.log"
    with (
        pytest.raises(PeerFailed, match="another rank, or the network to it, was lost") as told,
        noted(log),
    ):
        raise RuntimeError(reason)
    assert "typically" not in str(told.value) and str(told.value).endswith(f"; its log: {log}")
    assert "Traceback" in log.read_text() and (tmp_path / "failed").read_text().startswith("rank 0 failed first: ")
    with pytest.raises(RuntimeError, match="^shapes differ$"), noted(tmp_path / "other" / "rank-0.log"):
        raise RuntimeError("shapes differ")


def test_two_jobs_on_one_machine_meet_in_different_places(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    first = rendezvous()
    monkeypatch.setattr(os, "getppid", lambda: os.getpid())
    assert first.startswith("file://") and rendezvous() != first
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert rendezvous() == "env://", "ranks on other hosts meet by the launcher's address"


def test_a_lost_peer_keeps_the_way_on(tmp_path: Path) -> None:
    def fail() -> None:
        error = RuntimeError("Connection reset by peer")
        error.add_note("go on with --set resume=auto")
        raise error

    with pytest.raises(PeerFailed) as caught, noted(tmp_path / "rank-0.log"):
        fail()
    assert caught.value.__notes__ == ["go on with --set resume=auto"]


def test_a_rank_does_not_load_what_it_never_uses() -> None:
    """torch's compiler would cost every start three seconds; MLflow, which one rank alone writes to, and the figures three more."""
    code = (
        "import sys, mlinterf_ds.pretrain.main, mlinterf_ds.finetune.main, mlinterf_ds.evaluate, deepspeed, torch\n"
        "heavy = 'torch._inductor', 'mlflow', 'matplotlib', 'scipy', 'pandas'\n"
        "print([name for name in heavy if name in sys.modules], torch.compile.__module__)\n"
        "import mlflow\nassert mlflow.MlflowClient"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.splitlines()[-1] == "[] torch", done.stderr[-2000:]
