#!/usr/bin/env python
"""Check this machine, or every host of a hostfile, before a run is started; say what is wrong and what to do.

    python tools/doctor.py
    python tools/doctor.py --hostfile launch/cluster/hostfile --master_addr node-1

One line a check: OK, WARN (works, or only some things do not) or FAIL (a run would not start or not live). Exit code 1
if anything failed. On other hosts it runs through ssh, with this Python in this folder (as DeepSpeed's launcher does).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HOST, SLOTS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*"), re.compile(r"slots=[0-9]+")  # no host is an option of ssh
ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10"]

# What runs on the hosts to see whether they reach each other: listens until its input ends; connects.
LISTEN = """import socket, sys
servers = [socket.create_server(("", port), backlog=1024) for port in (int(sys.argv[1]), 0)]
print(*(server.getsockname()[1] for server in servers), flush=True)
sys.stdin.read()"""
CONNECT = """import socket, sys
for port in sys.argv[2:]:
    socket.create_connection((sys.argv[1], int(port)), timeout=10)"""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: str  # OK, WARN or FAIL
    found: str
    remedy: str = ""  # what to do; empty where all is well
    host: str = ""
    alike: bool = False  # must be the same on every host


def versions() -> list[Check]:
    """Python and every package of pyproject.toml, at the version it asks for."""
    import importlib.metadata

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["requires-python"].removeprefix(">=")
    here = ".".join(map(str, sys.version_info[:3]))
    enough = sys.version_info[:2] >= tuple(map(int, wanted.split(".")))
    remedy = "" if enough else f"install Python {wanted} or newer"
    checks = [Check("python", "OK" if enough else "FAIL", here, remedy, alike=True)]
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [*checks, Check("packages", "FAIL", "packaging is not installed", "pip install -e .")]
    for line in project["dependencies"]:
        requirement = Requirement(line)
        remedy = f"pip install '{line}'"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(requirement.name, "FAIL", "not installed", remedy))
            continue
        fits = requirement.specifier.contains(version, prereleases=True)  # 2.13.0+cpu is a 2.13.0
        found = version if fits else f"{version}, pyproject.toml asks for {requirement.specifier}"
        status = "OK" if fits else "FAIL"
        checks.append(Check(requirement.name, status, found, "" if fits else remedy, alike=True))
    return checks


def compiler() -> list[Check]:
    found = next(
        (path for name in (os.environ.get("CXX", "c++"), "g++", "clang++") if (path := shutil.which(name))), ""
    )
    remedy = "" if found else "only model.compile=true needs a C++ compiler: install g++ (Debian: apt install g++)"
    return [Check("compiler", "OK" if found else "WARN", found or "none", remedy)]


def accelerator() -> list[Check]:
    """What DeepSpeed computes on, and in which precisions."""
    try:
        from deepspeed.accelerator import get_accelerator

        from mlinterf_ds.engine.precision import bf16_arithmetic, choose_precision

        device = get_accelerator()
        kind, count = device.device_name(), device.device_count()
        fast = [name for name, has in (("fp16", device.is_fp16_supported()), ("bf16", bf16_arithmetic())) if has]
        choice = choose_precision("auto", {})[0]
    except Exception as error:  # a broken driver or package can raise anything: the report says which
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Check("accelerator", "FAIL", reason, "mend this first: import deepspeed must work")]
    checks = []
    if kind == "cpu" and shutil.which("nvidia-smi"):
        remedy = "this torch does not use the GPUs here: install a CUDA build of torch of the same version"
        checks.append(Check("accelerator", "WARN", "cpu, although nvidia-smi is here", remedy))
    else:
        checks.append(Check("accelerator", "OK", f"{count} x {kind}", alike=True))
    found = f"{', '.join([*fast, 'fp32'])}; train.precision=auto takes {choice}"
    slow = "" if fast else "no 16-bit arithmetic: steps take about twice as long as on a device that has it"
    return [*checks, Check("precision", "OK" if fast else "WARN", found, slow)]


def network(address: str | None, port: int) -> list[Check]:
    """Loopback; the rendezvous address resolves, and its port is free where it is ours."""
    checks = []
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            socket.create_connection(server.getsockname(), timeout=5).close()
        checks.append(Check("loopback", "OK", "127.0.0.1 answers"))
    except OSError as error:
        remedy = "bring up the interface `lo`: ip link set lo up; check firewall rules"
        checks.append(Check("loopback", "FAIL", str(error), remedy))
    if not address:
        return checks
    try:
        resolved = str(socket.getaddrinfo(address, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        remedy = "use an address or name that every host knows (DNS or /etc/hosts): --master_addr"
        return [*checks, Check("rendezvous", "FAIL", f"{address}: {error}", remedy)]
    try:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((resolved, port))
        found, mended = f"{address} is {resolved}, of this host; port {port} is free", ""
        status = "WARN" if resolved.startswith("127.") else "OK"
        if status == "WARN":
            mended = "other hosts cannot reach a loopback address: for several hosts give --master_addr an outer one"
    except OSError as error:
        if error.errno == 98:
            status, found = "FAIL", f"port {port} of {address} is taken"
            mended = "another job runs here: give this one a port of its own, --master_port"
        else:
            status, found, mended = "OK", f"{address} is {resolved}, of another host", ""
    return [*checks, Check("rendezvous", status, found, mended)]


def space(folder: Path, name: str, fail: float, warn: float, remedy: str) -> Check:
    """Free space where `folder` is or would be made."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    status = "FAIL" if free < fail else "WARN" if free < warn else "OK"
    return Check(name, status, f"{free:,.1f} GiB free in {folder}", "" if status == "OK" else remedy)


def storage(output: Path) -> list[Check]:
    remedy = "a checkpoint takes 12 bytes a parameter: free some space, or set output= to a larger disk"
    checks = [space(output.resolve(), "disk", 1, 20, remedy)]
    checks.append(space(Path(tempfile.gettempdir()), "temporary files", 0.1, 1, "free some space, or set TMPDIR"))
    if Path("/dev/shm").is_dir():
        remedy = "in a container start it with --shm-size=8g (collectives of one host pass through it)"
        checks.append(space(Path("/dev/shm"), "shared memory", 0.06, 1, remedy))
    return checks


def locks() -> list[Check]:
    from mlinterf_ds.runtime.session import stale_locks

    stale = stale_locks()
    if not stale:
        return [Check("build locks", "OK", "none left behind")]
    remedy = "every start would wait for ever; rm them (the launchers under launch/ do so by themselves)"
    return [Check("build locks", "WARN", ", ".join(map(str, stale)), remedy)]


def mlflow_server() -> list[Check]:
    """Whether MLflow's address answers (a server) or can be written (files)."""
    from mlinterf_ds.tracking.facts import first_line, scrub, tracking_uri

    uri = tracking_uri()
    shown = scrub(uri)
    remedy = "start it, or mend MLFLOW_TRACKING_URI; runs go on meanwhile and send their records later"
    if uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=5) as answer:
                return [Check("mlflow", "OK", f"{shown} answers {answer.status}")]
        except (urllib.error.URLError, OSError, ValueError) as error:
            return [Check("mlflow", "WARN", f"{shown}: {first_line(error)}", remedy)]
    if uri.startswith("sqlite:///"):
        place = Path(uri.removeprefix("sqlite:///"))
        writable = os.access(place if place.exists() else place.parent, os.W_OK)
        if not writable:
            return [
                Check("mlflow", "FAIL", f"{shown} cannot be written", "set MLFLOW_TRACKING_URI to a place of yours")
            ]
    return [Check("mlflow", "OK", shown)]


def examine(options: argparse.Namespace) -> list[Check]:
    """Every check on this machine; a check that breaks is a failed check."""
    parts: list[Callable[[], list[Check]]] = [
        versions, compiler, accelerator, lambda: network(options.master_addr, options.master_port),
        lambda: storage(options.output), locks, mlflow_server,
    ]  # fmt: skip
    checks: list[Check] = []
    for part in parts:
        try:
            checks += part()
        except Exception as error:  # a check that breaks is a finding
            name = getattr(part, "__name__", "check").strip("<>")
            checks.append(Check(name, "FAIL", f"{type(error).__name__}: {error}", "pip install -e . and try again"))
    return checks


def read_hostfile(path: Path) -> list[str]:
    """The hosts of a DeepSpeed hostfile (`name slots=N` a line)."""
    try:
        lines = [line.partition("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        sys.exit(f"error: --hostfile {path}: {error.strerror}; launch/cluster/hostfile is an example")
    except UnicodeDecodeError:
        sys.exit(f"error: --hostfile {path}: not a text file; launch/cluster/hostfile is an example")
    for number, words in enumerate(lines, 1):
        if words and not (len(words) == 2 and HOST.fullmatch(words[0]) and SLOTS.fullmatch(words[1])):
            sys.exit(f"error: {path}, line {number}: expected `host slots=N`, found {' '.join(words)!r}")
    if not any(lines):
        sys.exit(f"error: --hostfile {path}: no host in it; expected `host slots=N` a line")
    return [words[0] for words in lines if words]


def remote(host: str, options: argparse.Namespace) -> list[Check]:
    """The checks of another host, through ssh."""
    from mlinterf_ds.tracking.facts import scrub

    command = [sys.executable, str(Path(__file__).resolve()), "--json", "--output", str(options.output.resolve())]
    if options.master_addr:
        command += ["--master_addr", options.master_addr, "--master_port", str(options.master_port)]
    forwarded = {
        name: scrub(value)  # words of a command are for all users of a host to see
        for name, value in os.environ.items()
        if name.startswith(("MLFLOW_TRACKING_URI", "PYTHON"))
    }
    words = ["env", *(f"{name}={value}" for name, value in forwarded.items()), *command]
    try:
        done = subprocess.run(
            [*SSH, *options.ssh_args, host, f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(words)}"],
            capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        return [Check(**row | {"host": host}) for row in json.loads(done.stdout)]
    except subprocess.TimeoutExpired:
        return [Check("ssh", "FAIL", "no answer within 180 s", f"does `ssh {host} true` end?", host)]
    except OSError as error:
        return [Check("ssh", "FAIL", f"ssh: {error.strerror}", "install an ssh client here", host)]
    except ValueError:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        remedy = f"`ssh {host}` must work without a password, and this Python and folder must be there too"
        return [Check("ssh", "FAIL", reason, remedy, host)]


def reachable(hosts: Sequence[str], options: argparse.Namespace) -> list[Check]:
    """Every other host reaches the first at the rendezvous, and at a port of the system's choice: ranks talk on those."""

    def ssh(host: str, code: str, *words: str) -> list[str]:
        return [*SSH, *options.ssh_args, host, shlex.join([sys.executable, "-c", code, *words])]

    address, port = options.master_addr, str(options.master_port)
    try:
        server = subprocess.Popen(
            ssh(hosts[0], LISTEN, port),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    except OSError:
        return []  # no ssh here: said of every host already
    assert server.stdout  # for mypy

    def connect(host: str) -> Check:
        try:
            done = subprocess.run(ssh(host, CONNECT, address, *ports), capture_output=True, text=True, timeout=60)
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            reason = "no answer within 60 s"
        else:
            if not done.returncode:
                return Check("reach", "OK", f"{address}, ports {' and '.join(ports)}", host=host)
        remedy = f"is {address} an address of {hosts[0]}? Open all ports between the hosts (routes, firewalls)"
        return Check("reach", "FAIL", f"{address}, ports {' and '.join(ports)}: {reason}", remedy, host)

    ports = server.stdout.readline().split()  # empty when it could not listen
    try:
        if ports:
            with ThreadPoolExecutor(32) as workers:
                return list(workers.map(connect, hosts[1:]))
    finally:
        _, said = server.communicate()  # closes its input, which ends it
    reason = (said.strip().splitlines() or [f"exit code {server.returncode}"])[-1]
    return [Check("reach", "FAIL", f"cannot listen on port {port}: {reason}", "mend ssh, or --master_port", hosts[0])]


def agreement(checks: list[Check]) -> list[Check]:
    """Hosts with different versions of a package compute different things, or wait for each other for ever."""
    found: dict[str, dict[str, list[str]]] = {}
    for check in checks:
        if check.alike:
            found.setdefault(check.name, {}).setdefault(check.found, []).append(check.host)
    told = {
        name: "; ".join(f"{version} on {', '.join(hosts)}" for version, hosts in by.items())
        for name, by in found.items()
        if len(by) > 1
    }
    return [Check(name, "FAIL", what, "make all hosts the same", "between hosts") for name, what in told.items()]


def show(checks: list[Check]) -> None:
    width = max(len(check.name) for check in checks)
    for host in dict.fromkeys(check.host for check in checks):
        if host:
            print(f"{host}:")
        for check in (check for check in checks if check.host == host):
            print(
                f"  {check.status:<4}  {check.name:<{width}}  {check.found}{' -- ' if check.remedy else ''}{check.remedy}"
            )
    failed, warned = (sum(check.status == status for check in checks) for status in ("FAIL", "WARN"))
    print(f"{len(checks)} checks: {failed} failed, {warned} warnings")


def port_number(word: str) -> int:
    if not (word.isdigit() and 0 < int(word) < 65536):
        raise argparse.ArgumentTypeError(f"expected a port, 1 to 65535, found {word!r} (its default is MASTER_PORT's)")
    return int(word)


def ssh_words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hostfile", type=Path, help="check every host of this DeepSpeed hostfile, by ssh")
    parser.add_argument("--ssh-args", type=ssh_words, default=[], help="more arguments for ssh, e.g. '-p 2222 -i key'")
    parser.add_argument("--master_addr", default=os.environ.get("MASTER_ADDR"), help="where the ranks will meet")
    parser.add_argument("--master_port", type=port_number, default=os.environ.get("MASTER_PORT", "29500"))
    parser.add_argument("--output", type=Path, default=Path("runs"), help="where runs will be written (disk space)")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    if options.hostfile:
        hosts = read_hostfile(options.hostfile)
        with ThreadPoolExecutor(32) as workers:
            checks = [check for found in workers.map(lambda host: remote(host, options), hosts) for check in found]
        checks += agreement(checks)
        if options.master_addr and len(hosts) > 1:
            checks += reachable(hosts, options)
    else:
        kept = os.dup(1)
        os.dup2(2, 1)  # what packages print when imported is not the report
        checks = examine(options)
        sys.stdout.flush()
        os.dup2(kept, 1)
    rows: list[dict[str, Any]] = [asdict(check) for check in checks]
    print(json.dumps(rows, indent=1)) if options.json else show(checks)
    return int(any(check.status == "FAIL" for check in checks))


if __name__ == "__main__":
    sys.exit(main())
