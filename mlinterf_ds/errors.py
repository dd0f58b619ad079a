"""The one exception for mistakes a user can mend: shown without a traceback."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterator
from typing import Any

# The errors that reading a malformed file can raise: a missing key, a wrong type, bytes that are no
# text, nesting without end, a number or a path that the system cannot take.
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, OSError)


class UserError(ValueError):
    """Names the file, key, line or value at fault, what was expected and what to do about it."""


class Fault(UserError):
    """A UserError that is nobody's mistake, such as a disk or a network that fails: to start the command again may help."""


def warn(message: str) -> None:
    """Prints a warning that must not be overlooked on standard error, in red if that is a terminal."""
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}warning: {message}{plain}", file=sys.stderr, flush=True)


class _Output(io.FileIO):
    """Standard output or error, whose reader may leave (`| head`): what is written after that is dropped."""

    lost = False

    def write(self, data: Any) -> int:
        if self.lost:
            return len(data)
        try:
            return super().write(data)
        except BrokenPipeError:
            self.lost = True
            return len(data)
        except OSError as error:  # a disk that is full, under `> file`; said once
            self.lost = True
            raise UserError(f"standard output or error cannot be written there: {error.strerror}") from None


def ready_streams() -> None:
    """Readies the standard streams for whatever a program's caller made of them; call it before any other file is opened.

    A character that an encoding lacks is shown as a question mark, and a reader that leaves early does not end the
    program. Nothing else opens under the number of a stream that is closed: what is printed there goes nowhere.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = _ready(sys.stdout, 1, "replace")
    sys.stderr = _ready(sys.stderr, 2, "backslashreplace")


def _ready(stream: Any, number: int, errors: str) -> Any:
    if stream is None:
        return open(number, "w", encoding="utf-8", errors=errors, closefd=False)
    if (
        type(stream) is not io.TextIOWrapper or stream.fileno() != number
    ):  # whoever calls this as a function has put another there
        return stream
    stream.flush()
    file: Any = _Output(number, "wb", closefd=False)
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file), stream.encoding, errors,
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip


def check_surroundings() -> None:
    """UserError where Python takes file names and text for ASCII, or the working directory is gone: then libraries fail on
    files of their own."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the working directory cannot be used ({error.strerror}): `cd` into one that exists") from None
    if codecs.lookup(sys.getfilesystemencoding()).name == "ascii":
        raise UserError(
            "Python takes file names and text for ASCII here, because PYTHONUTF8=0 is set and the locale has no other encoding: "
            "`unset PYTHONUTF8`, or `export LC_ALL=C.UTF-8`"
        )


def setting(key: str, value: object) -> str:
    """`--set key=value` as a user can paste it into a shell, for messages."""
    return f"--set {shlex.quote(f'{key}={value}')}"


def resumption(output: object) -> str:
    """How to go on with the run of an output folder, for messages."""
    return f"go on with {setting('output', output)} --set resume=auto"


@contextlib.contextmanager
def refusing(what: str, remedy: str = "") -> Iterator[None]:
    """A context that turns any error of a malformed file into a UserError: `what` is wrong (with the file), why, `remedy`."""
    try:
        yield
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{what} ({type(error).__name__}: {str(error)[:300]}){remedy}") from None
