"""Sends what ended jobs could not send in time: `python -m mlinterf_ds.tracking FOLDER...`, or at the end of a study."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from mlinterf_ds.errors import UserError, ready_streams, warn
from mlinterf_ds.tracking.facts import first_line, scrub, tracking_uri
from mlinterf_ds.tracking.spool import SPOOL, Sender, read_spool
from mlinterf_ds.tracking.store import set_client_defaults

log = logging.getLogger(__name__)


def send_rest(folders: Iterable[Path], warn: Callable[[str], None]) -> None:
    """Sends what the jobs of these output folders left unsent. A parent's folder must come before its children's."""
    for folder in folders:
        try:
            if (folder / SPOOL).is_file() and Sender(folder, tracking_uri(), warn).unsent:
                send_folder(folder, warn)
        except UserError as error:
            warn(str(error))


def send_folder(folder: Path, warn: Callable[[str], None]) -> str:
    """Sends the spool that a job left in `folder`, and says so. A run that never ended (its job died) is marked KILLED."""
    path = folder.resolve() / SPOOL
    records = [record for _, record in read_spool(path) if record]
    starts = [record["start"] for record in records if "start" in record]
    if not starts:
        raise UserError(f"{path} holds no run: there is nothing to send")
    uri = tracking_uri() if os.environ.get("MLFLOW_TRACKING_URI") else starts[-1]["uri"]
    job_directory = starts[-1]["cwd"]  # MLflow puts a database's artifacts under the working directory
    sender = Sender(path.parent, uri, warn)
    count = sender.unsent
    try:
        with contextlib.chdir(job_directory if os.path.isdir(job_directory) else "."):
            sender.drain()
            for key, last in {record["run"]: record for record in records}.items():
                if "end" not in last and key in sender.runs:
                    with open(path, "ab") as file:
                        file.write(json.dumps({"run": key, "t": last["t"], "end": "KILLED"}).encode() + b"\n")
            sender.drain()
    except Exception as error:  # MLflow and networks raise many classes; the user gets one line with the remedy
        raise UserError(
            f"{path}: {sender.unsent} of {count} records could not be sent to {scrub(uri)} "
            f"({first_line(error)}). Set MLFLOW_TRACKING_URI if the server moved, and try again"
        ) from error
    finally:
        sender.release()
    return f"{path}: {count} records sent to {scrub(uri)}"


def close_killed(folder: Path) -> None:
    """Marks the MLflow run of a job that was killed for good, if it has one, and sends what it left; warns if that fails."""
    if (folder / SPOOL).is_file():
        set_client_defaults()
        try:
            send_folder(folder, warn)
        except UserError as error:
            warn(str(error))


def main(arguments: list[str] | None = None) -> int:
    """Sends to MLflow what jobs could not send. Exits with 0 if everything was sent, else with 1."""
    ready_streams()
    parser = argparse.ArgumentParser(prog="python -m mlinterf_ds.tracking", description=main.__doc__)
    parser.add_argument(
        "folder", type=Path, nargs="+", help=f"a job's output folder, or one above: its {SPOOL} is sent"
    )
    set_client_defaults()
    problems = []
    for folder in parser.parse_args(arguments).folder:
        spools = sorted(folder.resolve().rglob(SPOOL), key=lambda path: len(path.parts))  # parents before children
        if not spools:
            problems.append(f"{folder}: no {SPOOL} in this folder or below it: give a job's output folder")
        for spool in spools:
            try:
                print(send_folder(spool.parent, log.warning))
            except UserError as error:
                problems.append(str(error))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
