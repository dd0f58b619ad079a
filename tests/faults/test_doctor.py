"""tools/doctor.py: every check with the failure that it looks for, made here."""

import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tools.doctor import hosts, machine, network, software
from tools.doctor.check import Check
from tools.doctor.main import arguments, main

TOOL = Path(__file__).resolve().parents[2] / "tools" / "doctor.py"


def named(name: str, checks: list[Check]) -> Check:
    """The only check of this name."""
    (check,) = [check for check in checks if check.name == name]
    return check


def test_versions_are_held_against_pyproject(monkeypatch) -> None:
    assert {check.status for check in software.versions()} == {"OK"}, "what the tests run with is what is asked for"
    installed = importlib.metadata.version

    def altered(name: str) -> str:
        if name == "mlflow":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "deepspeed" else installed(name)

    monkeypatch.setattr(importlib.metadata, "version", altered)
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    checks = software.versions()
    assert named("mlflow", checks).status == "FAIL" and "pip install 'mlflow" in named("mlflow", checks).remedy
    assert named("deepspeed", checks).found == "0.1, pyproject.toml asks for ==0.19.8"
    assert named("python", checks).status == "FAIL" and named("torch", checks).status == "OK"


def test_accelerator(monkeypatch) -> None:
    from deepspeed.accelerator import get_accelerator

    fine = machine.accelerator()
    assert named("accelerator", fine).status == "OK" and "train.precision=auto takes" in named("precision", fine).found
    monkeypatch.setattr("mlinterf_ds.engine.precision.bf16_arithmetic", lambda: False)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    assert named("precision", machine.accelerator()).status == "WARN"
    monkeypatch.setattr(get_accelerator(), "device_count", lambda: 1 // 0)
    assert named("accelerator", machine.accelerator()).found.startswith("ZeroDivisionError")


def test_network(monkeypatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert named("rendezvous", network.network("127.0.0.1", port)).status == "FAIL"
        assert "--master_port" in named("rendezvous", network.network("127.0.0.1", port)).remedy
    assert "loopback address" in named("rendezvous", network.network("127.0.0.1", port)).remedy
    unknown = named("rendezvous", network.network("no-such-host.invalid", port))
    assert unknown.status == "FAIL" and "--master_addr" in unknown.remedy
    assert "of another host" in named("rendezvous", network.network("192.0.2.1", port)).found

    def refuse(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    (loopback,) = network.network(None, port)
    assert loopback.status == "FAIL" and "ip link set lo up" in loopback.remedy


def test_space(monkeypatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**39))
    assert {check.status for check in machine.storage(tmp_path / "yet" / "to" / "be")} == {"OK"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 5 * 2**30))
    assert [check.status for check in machine.storage(tmp_path)][:2] == ["WARN", "OK"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**20))
    assert {check.status for check in machine.storage(tmp_path)} == {"FAIL"}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_stale_locks_are_named_and_left(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert [check.status for check in software.locks()] == ["OK"]
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    (check,) = software.locks()
    assert check.status == "WARN" and check.found == str(lock) and lock.exists()


def test_mlflow(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hidden-word@127.0.0.1:9")
    (check,) = network.mlflow_server()
    assert check.status == "WARN" and "hidden-word" not in check.found + check.remedy
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert network.mlflow_server()[0].status == "OK"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert network.mlflow_server()[0].status == "FAIL"


FAKE_SSH = """#!/bin/sh
while [ "$1" != "${1#-}" ]; do [ "$1" = -o ] && shift; shift; done
case "$1" in
good) echo '[{"name": "torch", "status": "OK", "found": "2.13.0", "alike": true}]' ;;
old) echo '[{"name": "torch", "status": "OK", "found": "2.12.0", "alike": true}]' ;;
*) echo "ssh: connect to host $1 port 22: Connection refused" >&2; exit 255 ;;
esac
"""


def test_every_host_of_a_hostfile_and_what_differs_between_them(monkeypatch, tmp_path: Path, capsys) -> None:
    (tmp_path / "ssh").write_text(FAKE_SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("good slots=2\n# a comment\nold slots=2\ngone slots=2\n")
    assert main(["--hostfile", str(hostfile)]) == 1
    printed = capsys.readouterr().out
    assert "Connection refused -- `ssh gone` must work without a password" in printed
    assert "2.13.0 on good; 2.12.0 on old" in printed and re.search("5 checks: 2 failed, [01] warnings", printed)
    hostfile.write_text("good slots=2\ngood2\n")
    with pytest.raises(SystemExit, match="line 2: expected `host slots=N`"):
        main(["--hostfile", str(hostfile)])


RUN_HERE = """#!/bin/sh
while [ "$1" != "${1#-}" ]; do [ "$1" = -o ] && shift; shift; done
case "$1" in
walled) exec sh -c "$(echo "$2" | sed 's/[0-9][0-9]*$/1/')" ;;
*) exec sh -c "$2" ;;
esac
"""


def test_hosts_that_do_not_reach_the_rendezvous(monkeypatch, tmp_path: Path) -> None:
    """The ssh of this test runs everything here; the host "walled" reaches no port but the rendezvous."""
    (tmp_path / "ssh").write_text(RUN_HERE)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        taken.listen()
        options = arguments(["--master_addr", "127.0.0.1", "--master_port", str(port)])
        (check,) = hosts.reachable(["first", "second"], options)
        assert check.status == "FAIL" and check.host == "first" and "Address already in use" in check.found
    second, walled = hosts.reachable(["first", "second", "walled"], options)
    assert (second.host, second.status) == ("second", "OK") and f"ports {port} and " in second.found
    assert (walled.host, walled.status) == ("walled", "FAIL") and "ConnectionRefusedError" in walled.found
    assert "firewalls" in walled.remedy


def test_no_ssh_here(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "hostfile").write_text("one slots=2\ntwo slots=2\n")
    assert main(["--hostfile", str(tmp_path / "hostfile"), "--master_addr", "one"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("No such file or directory -- install an ssh client on this machine") == 2


def test_arguments_that_mean_nothing(monkeypatch, tmp_path: Path, capsys) -> None:
    (tmp_path / "hostfile").write_text("# node-1 slots=8\n\n")
    with pytest.raises(SystemExit, match="the file names no host; expected lines `host slots=N`"):
        main(["--hostfile", str(tmp_path / "hostfile")])
    with pytest.raises(SystemExit):
        main(["--ssh-args", "-o 'x"])
    assert 'argument --ssh-args: "-o \'x": No closing quotation' in capsys.readouterr().err
    monkeypatch.setenv("MASTER_PORT", "a few")
    with pytest.raises(SystemExit):
        main([])
    assert "expected a port, 1 to 65535, found 'a few'" in capsys.readouterr().err


def test_a_check_that_breaks_is_a_failed_check(monkeypatch, capfd) -> None:
    checks = {software: ("versions", "locks"), machine: ("accelerator", "storage"), network: ("network",)}
    for module, name in ((module, name) for module, names in checks.items() for name in names):
        monkeypatch.setattr(module, name, lambda *_: [Check("fine", "OK", "")])
    monkeypatch.setattr(network, "mlflow_server", lambda: {}["nothing"])
    assert main(["--json"]) == 1
    rows = json.loads(capfd.readouterr().out)
    assert [(row["name"], row["status"]) for row in rows] == [("fine", "OK")] * 5 + [("mlflow", "FAIL")]


def test_the_command_prints_a_report() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "--json"], capture_output=True, text=True, timeout=120)
    rows = json.loads(done.stdout)
    assert done.returncode == int(any(row["status"] == "FAIL" for row in rows))
    assert {"python", "torch", "accelerator", "precision", "loopback", "disk", "build locks", "mlflow"} <= {
        row["name"] for row in rows
    }
