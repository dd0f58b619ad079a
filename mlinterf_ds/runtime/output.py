"""What a process prints: other packages' chatter goes to the rank's log. And locks that a killed compiler left."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlinterf_ds.errors import UserError

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
