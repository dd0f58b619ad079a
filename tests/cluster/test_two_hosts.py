"""The multi-node command over two hosts: TP 2 x DP 2 by ssh and pdsh, one host cut off, the job resumed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import hosts
from tests.commands import ROOT, flags

REASON = hosts.why_not()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.timeout(900)]
# The job must be down this long after a cut: a rank waits parallel.timeout (30 s), the launcher gives the other ranks
# of its host 30 s each to end, and ssh gives up on a silent host after 3 x 5 s.
BOUND = 30 + 2 * 30 + 15 + 45

SETTINGS = ["train.steps=4000", "train.batch=8", "train.warmup=2", "train.epoch_steps=4000", "train.save_steps=10"]
SETTINGS += ["model.width=32", "model.ffn=64", "data.eval_rows=8", "data.synthetic_sentences=600"]
SETTINGS += ["parallel.tensor=2", "parallel.timeout=0.5", "tracking.enabled=false", "output=runs/two"]


def line(*more: str) -> list[str]:
    """launch/cluster/README.md's command, run on the first host."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", "hostfile", "--no_ssh_check"]
    launcher += ["--master_addr", hosts.ADDRESSES[hosts.FIRST], "--master_port", "29611"]
    return hosts.inside(hosts.FIRST, *launcher, str(ROOT / "launch/pretrain.py"),
                        "--deepspeed_config", str(ROOT / "ds_configs/zero1.json"), *flags)  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory):
    """(working folder that both hosts see, environment of the launcher)."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "hostfile").write_text("".join(f"{address} slots=2\n" for address in hosts.ADDRESSES.values()))
    (folder / ".deepspeed_env").write_text(f"GLOO_SOCKET_IFNAME={hosts.CABLE}\nOMP_NUM_THREADS=1\n")
    with hosts.two_hosts(folder) as options:
        keepalive = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
        yield folder, os.environ | {"PDSH_SSH_ARGS_APPEND": f"{options} {keepalive}", "PYTHONPATH": str(ROOT)}


def newest(folder: Path) -> int:
    steps = [int(path.name[5:]) for path in (folder / "runs/two/checkpoints").glob("step-*") if path.name[5:].isdigit()]
    return max(steps, default=0)


def test_two_hosts_train_lose_one_and_go_on(ground) -> None:
    folder, environment = ground
    log = folder / "first.log"
    with log.open("w") as file:
        job = subprocess.Popen(line(), cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 400
        while newest(folder) < 20:
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        assert len([pid for pid in hosts.processes(hosts.SECOND) if b"pretrain.py" in cmdline(pid)]) >= 2, (
            "ranks on both"
        )
        hosts.cable(hosts.SECOND, "down")
        cut = time.monotonic()
        status = job.wait(timeout=BOUND + 60)
        assert status != 0 and time.monotonic() - cut < BOUND
    finally:
        job.kill()
        hosts.cable(hosts.SECOND, "up")
    said = log.read_text()
    assert "2 x 2 ranks (data x tensor), ZeRO 1" in said
    reasons = [text for text in said.splitlines() if "error: rank" in text]
    assert reasons and all("go on with --set output=runs/two --set resume=auto" in text for text in reasons), said[
        -3000:
    ]
    logs = {path.name for path in (folder / "runs/two/log").glob("rank-*.log")}
    assert logs == {f"rank-{rank}.log" for rank in range(4)}
    assert "failed first: " in (folder / "runs/two/log/failed").read_text()
    deadline = time.monotonic() + BOUND
    while any(b"pretrain.py" in cmdline(pid) for host in hosts.ADDRESSES for pid in hosts.processes(host)):
        assert time.monotonic() < deadline, "the cut host's ranks must end by themselves"
        time.sleep(1)

    saved = newest(folder)
    again = subprocess.run(line("resume=auto", f"train.steps={saved + 5}"), cwd=folder, env=environment,
                           capture_output=True, text=True, timeout=400)  # fmt: skip
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert f"resumed from runs/two/checkpoints/step-{saved:08d} at step {saved}" in again.stdout
    assert newest(folder) == saved + 5


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
