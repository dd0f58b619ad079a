"""How a program ends: a failure is reported once, with its reason last, and `main` exits with the command's status."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlinterf_ds.errors import Fault, UserError, check_surroundings, ready_streams
from mlinterf_ds.runtime.launchers import adopt, find_home

# Parts of the messages of gloo and NCCL on a rank that has lost a neighbour or the network to it.
LOST = re.compile(
    r"gloo/transport|Connection (closed|reset) by peer|Broken pipe|Timed out waiting|remote process exited|Watchdog"
)


# What a user does about limits of the system, by the words with which it or a library tells them.
REMEDIES = {
    "Too many open files": "allow more open files first: `ulimit -n 4096`",
    "can't start new thread": "allow more processes and threads first: `ulimit -u 4096`, or the container's limit of processes",
    "No space left on device": "free some space",
    "Disk quota exceeded": "free some space",
    "Cannot allocate memory": "free some memory",
    "Unable to find address for": "`unset GLOO_SOCKET_IFNAME`, or name a network of this host in it",
    "File name too long": "give shorter names",
    "Permission denied": "see who may read and write there, or name another place",
    "Read-only file system": "name a place in which you may write",
}


class PeerFailed(Exception):
    """This rank failed because another did. The message holds the other's reason; this rank's trace is in its log only."""


@contextlib.contextmanager
def noted(log: Path) -> Iterator[None]:
    """A context whose failure is written to the rank's log, and the job's first failure also to `failed` beside it.

    Most ranks fail because another rank did, which may have been killed without a message. So a later failure is raised as
    PeerFailed, with the message in `failed`. A UserError is raised as it is.
    """
    try:
        yield
    except Exception as error:  # errors of any kind, because they are raised again
        first = ""
        with contextlib.suppress(OSError):  # if the disk is full, the failure itself must still come through
            with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                traceback.print_exception(error, file=file)
            first = _first_failure(error, log)
        message = f"{type(error).__name__}: {error}".partition(". This is typically caused")[0]
        if first and not isinstance(error, UserError):
            peer = PeerFailed(f"{message}; {first}")
        elif isinstance(error, RuntimeError) and LOST.search(message):
            peer = PeerFailed(f"another rank, or the network to it, was lost ({message}); its log: {log}")
        else:
            raise
        peer.__notes__ = getattr(error, "__notes__", [])  # the command that resumes
        raise peer from error


def _first_failure(error: Exception, log: Path) -> str:
    """Returns the earlier failure of another rank from the file `failed`. If there was none, writes this one and returns ''."""
    failed = log.with_name("failed")
    try:
        with failed.open("x", encoding="utf-8", errors="backslashreplace") as file:
            rank = log.stem.replace("-", " ")
            file.write(f"{rank} failed first: {type(error).__name__}: {str(error)[:300]}; its log: {log}")
        return ""
    except FileExistsError:
        deadline = time.monotonic() + 2  # an empty file is just being written
        while not (first := failed.read_text("utf-8")) and time.monotonic() < deadline:
            time.sleep(0.05)
        return first


def main(run: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> None:
    """Run a launcher's function on the command line's arguments, and exit with its status.

    A UserError ends with its message alone and status 2 (a Fault with 1), an interrupt with 130, any other error with 1. A rank that fails
    leaves at once, without the clean-up in which it would wait for the others; the launcher then ends those too.

    A run that succeeds waits for its threads, runs what was registered with `atexit`, and leaves without taking the
    interpreter apart: a thread of gloo's, MLflow's or torch's that still ends meanwhile, and asks for the interpreter to
    free a tensor, would abort the process after all its work is done.
    """
    ready_streams()
    faulthandler.enable()
    try:
        check_surroundings()
        find_home()
        adopt()
        os.environ["MPLBACKEND"] = (
            "agg"  # figures go to files, whatever the notebook asked for from which this was started
        )
        status = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # all ranks find most mistakes at once: rank 0 prints it, and the launcher ends the others
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        status = 1 if isinstance(error, Fault) else 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        status = 130
    except Exception as error:  # a bug of this package: the trace for the report, the reason last for the user
        reason = str(error)
        remedies = [remedy for words, remedy in REMEDIES.items() if words in reason]
        if not isinstance(error, PeerFailed):
            if not remedies:
                traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        hints = "".join(f"; {note}" for note in [*remedies, *getattr(error, "__notes__", [])])
        print(f"\nerror: rank {os.environ.get('RANK', 0)} failed: {reason}{hints}", file=sys.stderr, flush=True)
        status = 1
    if not status:
        threading._shutdown()  # type: ignore[attr-defined]  # these two as multiprocessing ends its processes
        atexit._run_exitfuncs()
        sys.stderr.flush()
    with contextlib.suppress(UserError):  # the disk is full, which was said above
        sys.stdout.flush()
    os._exit(status)
