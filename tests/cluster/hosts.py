"""Two hosts on one machine: network namespaces with addresses of their own, a cable between them, an sshd in each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

FIRST, SECOND = (f"mlint-{os.getpid()}-{letter}" for letter in "ab")  # another run of the tests has its own
ADDRESSES = {FIRST: "10.77.0.1", SECOND: "10.77.0.2"}
CABLE = "net0"  # the same name at both ends, so that one GLOO_SOCKET_IFNAME serves both
SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
MaxStartups 50
"""


def why_not() -> str:
    """Why such hosts cannot be made here ('' if they can)."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "sshd", "ssh", "ssh-keygen", "pdsh") if not _which(name)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: iproute2 openssh-server openssh-client pdsh)"
    tried = subprocess.run(["ip", "netns", "add", f"mlint-{os.getpid()}-try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", f"mlint-{os.getpid()}-try"], capture_output=True)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def _which(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def inside(host: str, *words: str) -> list[str]:
    """The command line that runs `words` on a host."""
    return ["ip", "netns", "exec", host, *words]


def processes(host: str) -> list[int]:
    """What runs on a host."""
    return [int(pid) for pid in subprocess.check_output(["ip", "netns", "pids", host], text=True).split()]


def cable(host: str, state: str) -> None:
    """Plug ('up') or cut ('down') a host's cable."""
    subprocess.run(inside(host, "ip", "link", "set", CABLE, state), check=True)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[str]:
    """Inside, both hosts are up; gives the arguments with which ssh enters them."""
    for key in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    Path("/run/sshd").mkdir(exist_ok=True)
    daemons = []
    try:
        for host in ADDRESSES:
            ip("netns", "add", host)
        ip("link", "add", CABLE, "netns", FIRST, "type", "veth", "peer", "name", CABLE, "netns", SECOND)
        for host, address in ADDRESSES.items():
            ip("-n", host, "addr", "add", f"{address}/24", "dev", CABLE)
            for device in (CABLE, "lo"):
                ip("-n", host, "link", "set", device, "up")
            sshd = inside(host, str(_which("sshd")), "-D", "-e", "-f", str(folder / "sshd_config"))
            daemons.append(subprocess.Popen(sshd, stderr=(folder / f"sshd-{host}.log").open("w")))
        options = f"-i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        _await_ssh(options)
        yield options
    finally:
        for host in ADDRESSES:
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in processes(host):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", host], capture_output=True)
        for daemon in daemons:
            daemon.wait()


def _await_ssh(options: str) -> None:
    for address in ADDRESSES.values():
        deadline = time.monotonic() + 30
        line = inside(FIRST, "ssh", *options.split(), "-o", "ConnectTimeout=5", address, "true")
        while subprocess.run(line, capture_output=True).returncode:
            assert time.monotonic() < deadline, f"no ssh to {address}"
            time.sleep(0.5)
