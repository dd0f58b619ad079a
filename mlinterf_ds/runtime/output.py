"""What a process prints, and how it ends: third-party chatter goes to the rank's log, a failure is reported once, signals ask
for a clean end, `main` exits."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mlinterf_ds.errors import UserError, check_surroundings, ready_streams
from mlinterf_ds.runtime.launchers import adopt, find_home

if TYPE_CHECKING:  # a study waits for signals without torch
    import torch
    from torch import Tensor

NOISY = ("DeepSpeed", "megatron", "mlflow", "alembic", "torch", "matplotlib")


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """A context in which a failure to write becomes a UserError about the output folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output={output}: cannot write there ({error.strerror}): name another folder, --set output=FOLDER"
        ) from None


# --- quiet -----------------------------------------------------------------------------------------------------------
class LogFile(logging.FileHandler):
    """A log that makes its folder when it is first written to: that of a refused run was removed."""

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def quiet(log: Path) -> None:
    """Send loggers and warnings of other packages to the file `log`; this package's messages stay on the screen."""
    import mlinterf_ds.runtime.parallel  # noqa: F401  (DeepSpeed's logger takes a handler when imported)

    with writing(log.parent.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
    handler = LogFile(log, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    for name in (*NOISY, "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    warnings.simplefilter("default")


@contextlib.contextmanager
def hushed(log: Path | None = None) -> Iterator[None]:
    """A context whose standard output (that of the compilers it starts too) goes to the file `log`, or nowhere."""
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    with (log or Path(os.devnull)).open("a", encoding="utf-8") as file:
        saved = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)


def stale_locks() -> list[Path]:
    """Locks that a killed compiler left in torch's extension cache, for which every later start would wait.

    A lock is stale when no running process has the file open (torch keeps it open while it builds). Needs /proc.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    locks = [path.resolve() for path in Path(root).glob("**/lock") if path.is_file()]
    if not locks or not Path("/proc/self/fd").is_dir():
        return []
    time.sleep(0.2)  # by then a process that is creating a lock has opened it
    held = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            held.add(os.readlink(link))
    return [path for path in locks if str(path) not in held]


def remove_stale_locks() -> list[Path]:
    """Remove the stale locks, so that this start does not wait for them."""
    stale = stale_locks()
    for path in stale:
        path.unlink(missing_ok=True)
        print(f"removed {path}, left by a build that was killed", file=sys.stderr)
    return stale


# --- failures --------------------------------------------------------------------------------------------------------
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


# --- signals ---------------------------------------------------------------------------------------------------------
class Signals:
    """A context in which SIGTERM and SIGINT ask for a checkpoint and a clean end; a second SIGINT interrupts as usual.

    SIGHUP, which a terminal sends when it is closed, counts as SIGTERM, unless `nohup` has it ignored. Whatever would go to the
    closed terminal is dropped then, because writing to it would be an error.

    When a rank is lost, launchers send SIGTERM to the others, and SIGKILL 30 seconds later. A rank that is already failing
    must still print its reason, so it goes on catching SIGTERM after the context (unless it fails with a user's mistake,
    which all ranks find). A rank that waits for the lost one inside a collective runs no Python signal handler: a thread
    prints `remedy`, the command that resumes, `grace` seconds after the signal.
    """

    def __init__(self, remedy: str = "", grace: float = 10.0) -> None:
        self.received: str | None = None
        self.remedy, self.grace = remedy, grace
        self._left = threading.Event()

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in ending_signals()}
        self._terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        if self.remedy:
            reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._woken = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.remedy:
            self._left.set()
            signal.set_wakeup_fd(self._woken)
            os.close(self._writing)  # ends the thread
        failing = self.remedy and kind and not issubclass(kind, UserError)
        for number, handler in self._before.items():
            if number == signal.SIGINT or not failing:
                signal.signal(number, handler)

    def _watch(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] != signal.SIGINT and not self._left.wait(self.grace):
                    rank = os.environ.get("RANK", "0")
                    message = f"rank {rank}, told to end, still saves, or waits for a rank that was lost; {self.remedy}"
                    print(f"\n{message}", file=sys.stderr, flush=True)
                    return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if number == signal.SIGHUP and self._terminals:
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
            for stream in self._terminals:
                os.dup2(nowhere.fileno(), stream)
            sys.stdout = nowhere  # `hushed` may have put a copy of the terminal aside


def ending_signals() -> list[signal.Signals]:
    """The signals that ask a process to end; `nohup` has SIGHUP ignored, and so it stays."""
    hang_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    return [signal.SIGTERM, signal.SIGINT, *hang_up]


class StopVote:
    """Asks all ranks after every step whether one of them has to stop.

    One rank, and ranks on CPUs, are answered at once. Ranks on accelerators are answered after the next step: an answer at once
    would have the host wait for its device before it launches that step. All ranks read the same answer, and so stop together.
    """

    def __init__(self, signals: Signals, device: torch.device, late: bool | None = None) -> None:
        """late: answer after the next step; default: on accelerators."""
        self._signals, self._device = signals, device
        self._late = device.type != "cpu" if late is None else late
        self._asked: Tensor | None = None  # the votes of the step before, on the host as soon as the event has happened
        self._event: Any = None

    def reason(self, others: Mapping[str, bool] | None = None) -> str:
        """Why all ranks stop now: the signal that any of them received, or the first of `others` that holds on any; '' to go on.

        others: further reasons in words, the same on all ranks and at all steps, and whether each holds on this one.
        """
        import torch
        import torch.distributed as dist

        others = others or {}
        held = [float(self._signals.received is not None), *map(float, others.values())]
        several = dist.get_world_size() > 1
        # From page-locked memory a copy is launched like a kernel; from other memory the host would wait for the device.
        votes = torch.tensor(held, pin_memory=several and self._device.type == "cuda")
        if several:
            votes = votes.to(self._device, non_blocking=True)
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
            votes = self._answer(votes) if self._late else votes
        received, *others_held = votes.tolist()
        if received:
            return self._signals.received or "a signal to another rank"
        return next((reason for reason, holds in zip(others, others_held, strict=True) if holds), "")

    def _answer(self, votes: Tensor) -> Tensor:
        """The votes of the step before, none at the first; these ones are copied to the host meanwhile."""
        import torch

        asked, event = self._asked, self._event
        self._asked = votes.clone()
        if votes.device.type == "cuda":
            self._asked = torch.empty(votes.shape, dtype=votes.dtype, pin_memory=True)
            self._asked.copy_(votes, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        if event is not None:
            event.synchronize()
        return torch.zeros_like(votes, device="cpu") if asked is None else asked


# --- the whole program -----------------------------------------------------------------------------------------------
def main(run: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> None:
    """Run a launcher's function on the command line's arguments, and exit with its status.

    A UserError ends with its message alone and status 2, an interrupt with 130, any other error with 1. A rank that fails
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
        status = 2
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
