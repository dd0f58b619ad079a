"""What every launcher shares: arguments, quiet logs, stale build locks, and how a run ends."""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mlinterf_ds.config import Section, describe
from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrain.config import RunConfig, load_run
from mlinterf_ds.runtime.launchers import adopt

PRETRAIN = "Pretrain a multilingual masked language model."
NOISY = ("DeepSpeed", "megatron", "mlflow", "alembic", "torch", "matplotlib")


def parser(description: str, kind: type[Section] = RunConfig) -> argparse.ArgumentParser:
    """The arguments of every launcher; `--help` lists every configuration key."""
    found = argparse.ArgumentParser(
        description=description,
        epilog=f"keys for --set and recipes, with their defaults:\n{describe(kind)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--deepspeed_config", default="ds_configs/zero2.json", help="DeepSpeed's JSON (ds_configs/)")
    found.add_argument("--recipe", action="append", default=[], help="TOML file or shipped recipe's name; repeatable")
    found.add_argument("--set", action="append", default=[], metavar="section.key=value", help="repeatable")
    found.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    found.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    return found


def configuration(arguments: argparse.Namespace, default_recipe: str = "tiny") -> RunConfig:
    """The run configuration these arguments mean."""
    return load_run([*(arguments.recipe or [default_recipe])], arguments.set)


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """A folder that cannot be written is a user's mistake."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"output={output}: cannot write there ({error.strerror}): name another folder, --set output=FOLDER"
        ) from None


def forget(log: Path) -> None:
    """Remove what `noted` wrote in an earlier attempt, beside a rank's log."""
    with writing(log.parent.parent):
        log.with_name("failed").unlink(missing_ok=True)


def quiet(log: Path) -> None:
    """Send third-party start-up chatter (loggers, warnings) to a file; our own messages stay on screen."""
    import deepspeed  # noqa: F401  (its logger takes a handler when imported)

    with writing(log.parent.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    for name in (*NOISY, "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    warnings.simplefilter("default")


@contextlib.contextmanager
def hushed(log: Path | None = None) -> Iterator[None]:
    """What is printed inside, also by compilers that are started there, goes to a file (or nowhere)."""
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    with (log or Path(os.devnull)).open("a") as file:
        saved = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)


def stale_locks() -> list[Path]:
    """Locks that a killed compiler left in torch's extension cache: every later start would wait for them.

    A lock is stale when no running process has the file open (torch keeps it open while it builds). Needs /proc.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    locks = [path.resolve() for path in Path(root).glob("**/lock") if path.is_file()]
    if not locks or not Path("/proc/self/fd").is_dir():
        return []
    time.sleep(0.2)  # one that is being created is open by now
    held = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            held.add(os.readlink(link))
    return [path for path in locks if str(path) not in held]


def remove_stale_locks() -> list[Path]:
    """Remove them, so that this start does not wait."""
    stale = stale_locks()
    for path in stale:
        path.unlink(missing_ok=True)
        print(f"removed {path}, left by a build that was killed", file=sys.stderr)
    return stale


# What gloo and NCCL say on a rank whose neighbour, or the network to it, is gone.
LOST = re.compile(
    r"gloo/transport|Connection (closed|reset) by peer|Broken pipe|Timed out waiting|remote process exited|Watchdog"
)


class PeerFailed(Exception):
    """This rank failed because another did: that one's reason is told, the trace of what came of it is in this rank's log."""


@contextlib.contextmanager
def noted(log: Path) -> Iterator[None]:
    """A failure inside is written to the rank's log; the first of the job's also to `failed` beside it, for all to tell.

    Most ranks fail because another did, which may have been killed and told nothing: what such a rank raises becomes
    PeerFailed. A mistake of the user's stays one.
    """
    try:
        yield
    except Exception as error:  # whatever it is: it is raised again
        first = ""
        with contextlib.suppress(OSError):  # a full disk, say: the failure itself must come through
            with log.open("a") as file:
                traceback.print_exception(error, file=file)
            rank = log.stem.replace("-", " ")
            told = log.with_name("failed")
            try:
                with told.open("x") as file:
                    file.write(f"{rank} failed first: {type(error).__name__}: {str(error)[:300]}; its log: {log}")
            except FileExistsError:
                deadline = time.monotonic() + 2  # it is being written now, if it is empty
                while not (first := told.read_text()) and time.monotonic() < deadline:
                    time.sleep(0.05)
        said = f"{type(error).__name__}: {error}".partition(". This is typically caused")[0]
        if first and not isinstance(error, UserError):
            raise PeerFailed(f"{said}; {first}") from error
        if isinstance(error, RuntimeError) and LOST.search(said):
            raise PeerFailed(f"another rank, or the network to it, was lost ({said}); its log: {log}") from error
        raise


class Signals:
    """SIGTERM and SIGINT ask for a checkpoint and a clean end; the second SIGINT is the ordinary interrupt.

    Where a rank is lost, launchers send SIGTERM to the others, and SIGKILL 30 seconds later. One that is failing already
    must still say why, so SIGTERM goes on being caught (a mistake, found by all, need not be said by all). One that waits
    for the lost rank inside a collective runs no handler: a thread says `way_on`, the command that resumes.
    """

    def __init__(self, way_on: str = "", grace: float = 10.0) -> None:
        self.received: str | None = None
        self.way_on, self.grace = way_on, grace  # seconds
        self._left = threading.Event()

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        if self.way_on:
            reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._woken = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.way_on:
            self._left.set()
            signal.set_wakeup_fd(self._woken)
            os.close(self._writing)  # ends the thread
        failing = self.way_on and kind and not issubclass(kind, UserError)
        for number, handler in self._before.items():
            if not (failing and number == signal.SIGTERM):
                signal.signal(number, handler)

    def _watch(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] == signal.SIGTERM and not self._left.wait(self.grace):
                    rank = os.environ.get("RANK", "0")
                    said = f"rank {rank}, told to end, still saves, or waits for a rank that was lost; {self.way_on}"
                    print(f"\n{said}", file=sys.stderr, flush=True)
                    return

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def main(run: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> None:
    """Run a launcher's function; a user's mistake ends with its message, not with a traceback.

    A rank that fails leaves at once, without the clean-up in which it would wait for the others: the launcher then
    ends them too.
    """
    faulthandler.enable()
    rank = os.environ.get("RANK", "0")
    try:
        adopt()
        rank = os.environ.get("RANK", "0")
        status = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except UserError as error:
        if rank != "0":
            time.sleep(3)  # most mistakes are found by all ranks at once: the first says it, the launcher ends the rest
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        status = 130
    except Exception as error:  # a bug of ours: the trace for the report, the reason last for the user
        if isinstance(error, PeerFailed):
            said = str(error)
        else:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
        hints = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
        print(f"\nerror: rank {rank} failed: {said}{hints}", file=sys.stderr, flush=True)
        status = 1
    if status:
        sys.stdout.flush()
        os._exit(status)
