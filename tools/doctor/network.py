"""Checks of what this host reaches: itself, the address where ranks will meet, and MLflow."""

from __future__ import annotations

import errno
import os
import socket
import urllib.error
import urllib.request

from tools.doctor.check import Check


def network(address: str | None, port: int) -> list[Check]:
    """Checks that loopback answers and, where an address is given, that ranks can meet there."""
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            socket.create_connection(server.getsockname(), timeout=5).close()
        loopback = Check("loopback", "OK", "127.0.0.1 answers")
    except OSError as error:
        remedy = "bring up the interface `lo`: ip link set lo up; check firewall rules"
        loopback = Check("loopback", "FAIL", str(error), remedy)
    return [loopback, rendezvous(address, port)] if address else [loopback]


def rendezvous(address: str, port: int) -> Check:
    """Checks that the address resolves and, where it belongs to this host, that the port is free."""
    name = "rendezvous"
    try:
        resolved = str(socket.getaddrinfo(address, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        remedy = "--master_addr must be an address or name that every host knows (DNS or /etc/hosts)"
        return Check(name, "FAIL", f"{address}: {error}", remedy)
    try:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind((resolved, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "another job uses it: give this job a port of its own, --master_port"
            return Check(name, "FAIL", f"port {port} of {address} is taken", remedy)
        return Check(name, "OK", f"{address} is {resolved}, of another host")
    free = f"{address} is {resolved}, of this host; port {port} is free"
    if resolved.startswith("127."):
        remedy = "other hosts cannot reach a loopback address: for several hosts give --master_addr an outer address"
        return Check(name, "WARN", free, remedy)
    return Check(name, "OK", free)


def mlflow_server() -> list[Check]:
    """Checks that MLflow's server answers, or that its file can be written."""
    from mlinterf_ds.tracking.facts import first_line, scrub, sqlite_path, tracking_uri

    uri = tracking_uri()
    shown = scrub(uri)
    if uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=5) as answer:
                return [Check("mlflow", "OK", f"{shown} answers {answer.status}")]
        except (urllib.error.URLError, OSError, ValueError) as error:
            remedy = (
                "start it, or correct MLFLOW_TRACKING_URI; until then runs go on and keep their records to send later"
            )
            return [Check("mlflow", "WARN", f"{shown}: {first_line(error)}", remedy)]
    if path := sqlite_path(uri):
        while not path.exists():
            path = path.parent  # MLflow makes the missing folders
        if not os.access(path, os.W_OK):
            remedy = "set MLFLOW_TRACKING_URI to a file that you may write"
            return [Check("mlflow", "FAIL", f"{shown} cannot be written", remedy)]
    return [Check("mlflow", "OK", shown)]
