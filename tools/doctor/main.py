"""Checks this machine, or every host of a hostfile, before a run starts; says what is wrong and what to do about it.

    python tools/doctor.py
    python tools/doctor.py --hostfile launch/cluster/hostfile --master_addr node-1

Each line is a check: OK; WARN if a run works, or if only some things do not; FAIL if a run would not start or would break.
The exit code is 1 if a check failed. The doctor runs on other hosts through ssh, with the same Python in the same folder, as
DeepSpeed's launcher runs ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from mlinterf_ds.errors import ready_streams
from mlinterf_ds.runtime.launchers import find_home
from tools.doctor import hosts, machine, network, software
from tools.doctor.check import Check


def examine(options: argparse.Namespace) -> list[Check]:
    """All checks of this machine; a check that breaks counts as failed."""
    groups: dict[str, Callable[[], list[Check]]] = {
        "versions": software.versions,
        "accelerator": machine.accelerator,
        "network": lambda: network.network(options.master_addr, options.master_port),
        "storage": lambda: machine.storage(options.output),
        "locks": software.locks,
        "mlflow": network.mlflow_server,
    }
    checks: list[Check] = []
    for name, group in groups.items():
        try:
            checks += group()
        except Exception as error:
            checks.append(Check(name, "FAIL", f"{type(error).__name__}: {error}", "pip install -e . and try again"))
    return checks


def show(checks: list[Check]) -> None:
    """Prints a line for each check, by host, and how many failed."""
    width = max(len(check.name) for check in checks)
    for host in dict.fromkeys(check.host for check in checks):
        if host:
            print(f"{host}:")
        for check in (check for check in checks if check.host == host):
            remedy = f" -- {check.remedy}" if check.remedy else ""
            print(f"  {check.status:<4}  {check.name:<{width}}  {check.found}{remedy}")
    failed, warned = (sum(check.status == status for check in checks) for status in ("FAIL", "WARN"))
    print(f"{len(checks)} checks: {failed} failed, {warned} warnings")


def port_number(word: str) -> int:
    if not (word.isdigit() and 0 < int(word) < 65536):
        raise argparse.ArgumentTypeError(f"expected a port, 1 to 65535, found {word!r} (the default is MASTER_PORT)")
    return int(word)


def ssh_words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hostfile", type=Path, help="check every host of this DeepSpeed hostfile by ssh")
    parser.add_argument("--ssh-args", type=ssh_words, default=[], help="more arguments for ssh, e.g. '-p 2222 -i key'")
    parser.add_argument("--master_addr", default=os.environ.get("MASTER_ADDR"), help="the host where ranks will meet")
    parser.add_argument(
        "--master_port", type=port_number, default=os.environ.get("MASTER_PORT", "29500"), help="the port they will use"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs"), help="the folder for runs, to check its free space"
    )
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    """Prints the checks that the command line asks for; returns the exit code."""
    ready_streams()
    find_home()
    options = arguments(words)
    if options.hostfile:
        checks = hosts.check_hosts(options)
    else:
        kept = os.dup(1)
        os.dup2(2, 1)  # packages print to stdout when they are imported, which would spoil the report
        checks = examine(options)
        sys.stdout.flush()
        os.dup2(kept, 1)
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        show(checks)
    return int(any(check.status == "FAIL" for check in checks))
