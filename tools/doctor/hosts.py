"""Checks of several hosts by ssh: the doctor on each of them, whether they agree, and whether they reach each other."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.doctor.check import ROOT, Check

HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*")  # cannot begin with a dash: ssh would take it for an option
SLOTS = re.compile(r"slots=[0-9]+")
SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10"]

# Runs on the first host: listens on the given port and on a free one, prints both, and ends when its input closes.
LISTEN = """import socket, sys
servers = [socket.create_server(("", port), backlog=1024) for port in (int(sys.argv[1]), 0)]
print(*(server.getsockname()[1] for server in servers), flush=True)
sys.stdin.read()"""
# Runs on the other hosts: connects to an address at each of the given ports.
CONNECT = """import socket, sys
for port in sys.argv[2:]:
    socket.create_connection((sys.argv[1], int(port)), timeout=10)"""


def check_hosts(options: argparse.Namespace) -> list[Check]:
    """All checks of the hosts of `--hostfile`, in the order of the file."""
    hosts = read_hostfile(options.hostfile)
    with ThreadPoolExecutor(32) as workers:
        checks = [check for part in workers.map(lambda host: remote(host, options), hosts) for check in part]
    checks += agreement(checks)
    if options.master_addr and len(hosts) > 1:
        checks += reachable(hosts, options)
    return checks + starters(options.hostfile, len(hosts))


def starters(hostfile: Path, count: int) -> list[Check]:
    """Checks of what `deepspeed --hostfile` needs on this machine: a file that DeepSpeed reads, and pdsh for several hosts."""
    checks = []
    if hostfile.read_bytes()[:1] > b"\x7f":
        remedy = f"DeepSpeed would take it for a part of the first host's name: save {hostfile} as UTF-8 without it"
        checks.append(Check("hostfile", "FAIL", "begins with a byte-order mark", remedy, "this machine"))
    if count > 1:
        pdsh = shutil.which("pdsh")
        remedy = "`deepspeed --hostfile` starts the hosts with it: apt install pdsh (dnf install pdsh), or use mpirun or Slurm"
        status = "OK" if pdsh else "WARN"
        checks.append(Check("pdsh", status, pdsh or "not installed", "" if pdsh else remedy, "this machine"))
    return checks


def read_hostfile(path: Path) -> list[str]:
    """The hosts of a DeepSpeed hostfile, whose lines are `host slots=N`."""
    try:
        data = path.read_bytes()
        text = data.decode(json.detect_encoding(data)).removeprefix("\ufeff")
        lines = [line.partition("#")[0].split() for line in text.splitlines()]
    except OSError as error:
        sys.exit(f"error: --hostfile {path}: {error.strerror}; launch/cluster/hostfile is an example")
    except UnicodeDecodeError:
        sys.exit(f"error: --hostfile {path}: not a text file; launch/cluster/hostfile is an example")
    for number, words in enumerate(lines, 1):
        if words and not (len(words) == 2 and HOST.fullmatch(words[0]) and SLOTS.fullmatch(words[1])):
            sys.exit(f"error: {path}, line {number}: expected `host slots=N`, found {' '.join(words)!r}")
    if not any(lines):
        sys.exit(f"error: --hostfile {path}: the file names no host; expected lines `host slots=N`")
    return [words[0] for words in lines if words]


def remote(host: str, options: argparse.Namespace) -> list[Check]:
    """The checks of another host, made by this tool, Python and folder on that host."""
    from mlinterf_ds.tracking.facts import scrub

    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), "--json", "--output", str(options.output.resolve())]
    if options.master_addr:
        command += ["--master_addr", options.master_addr, "--master_port", str(options.master_port)]
    forwarded = [
        f"{name}={scrub(value)}"  # without passwords: all users of a host can read its command lines
        for name, value in os.environ.items()
        if name.startswith(("MLFLOW_TRACKING_URI", "PYTHON"))
    ]
    line = f"cd {shlex.quote(str(Path.cwd()))} && {shlex.join(['env', *forwarded, *command])}"
    try:
        done = subprocess.run(
            [*SSH, *options.ssh_args, host, line], capture_output=True, encoding="utf-8", errors="replace", timeout=180
        )
        return [Check(**row | {"host": host}) for row in json.loads(done.stdout)]
    except subprocess.TimeoutExpired:
        return [Check("ssh", "FAIL", "no answer within 180 s", f"does `ssh {host} true` end?", host)]
    except OSError as error:
        return [Check("ssh", "FAIL", f"ssh: {error.strerror}", "install an ssh client on this machine", host)]
    except ValueError:
        remedy = f"`ssh {host}` must work without a password, and that host needs this Python and this folder"
        return [Check("ssh", "FAIL", last_line(done.stderr, done.returncode), remedy, host)]


def agreement(checks: list[Check]) -> list[Check]:
    """A failed check for everything that differs between hosts although it must be alike.

    Hosts with different versions of a package compute different things, or wait for each other for ever.
    """
    hosts: dict[str, dict[str, list[str]]] = {}  # check -> what it saw -> the hosts that saw it
    for check in checks:
        if check.alike:
            hosts.setdefault(check.name, {}).setdefault(check.found, []).append(check.host)
    return [
        Check(name, "FAIL", "; ".join(f"{version} on {', '.join(by[version])}" for version in by),
              "make all hosts the same", "between hosts")
        for name, by in hosts.items()
        if len(by) > 1
    ]  # fmt: skip


def reachable(hosts: Sequence[str], options: argparse.Namespace) -> list[Check]:
    """Checks that every other host reaches the first at the rendezvous and at a free port, as ranks do on both."""

    def ssh(host: str, code: str, *words: str) -> list[str]:
        return [*SSH, *options.ssh_args, host, shlex.join([sys.executable, "-c", code, *words])]

    address, port = options.master_addr, str(options.master_port)
    try:
        line, pipe = ssh(hosts[0], LISTEN, port), subprocess.PIPE
        server = subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace")
    except OSError:
        return []  # there is no ssh on this machine, as the check of every host already says

    def connect(host: str) -> Check:
        goal = f"{address}, ports {' and '.join(ports)}"
        try:
            done = subprocess.run(
                ssh(host, CONNECT, address, *ports), capture_output=True, encoding="utf-8", errors="replace", timeout=60
            )
            reason = last_line(done.stderr, done.returncode)
        except subprocess.TimeoutExpired:
            reason = "no answer within 60 s"
        else:
            if not done.returncode:
                return Check("reach", "OK", goal, host=host)
        remedy = f"is {address} an address of {hosts[0]}? Open all ports between the hosts (routes, firewalls)"
        return Check("reach", "FAIL", f"{goal}: {reason}", remedy, host)

    assert server.stdout
    ports = server.stdout.readline().split()  # empty if it could not listen
    try:
        if ports:
            with ThreadPoolExecutor(32) as workers:
                return list(workers.map(connect, hosts[1:]))
    finally:
        _, errors = server.communicate()  # closes the server's input, which ends it
    reason = last_line(errors, server.returncode)
    remedy = "mend ssh, or choose another --master_port"
    return [Check("reach", "FAIL", f"cannot listen on port {port}: {reason}", remedy, hosts[0])]


def last_line(errors: str, status: int) -> str:
    """The last line that a command printed to stderr, or its exit code if it printed none."""
    return (errors.strip().splitlines() or [f"exit code {status}"])[-1]
