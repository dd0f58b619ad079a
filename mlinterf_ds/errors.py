"""The one exception for mistakes a user can mend: shown without a traceback."""

from __future__ import annotations

import codecs
import contextlib
import io
import shlex
import sys
from collections.abc import Iterator

# The errors that reading a malformed file can raise: a missing key, a wrong type, bytes that are no
# text, nesting without end, a number or a path that the system cannot take.
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, OSError)


class UserError(ValueError):
    """Names the file, key, line or value at fault, what was expected and what to do about it."""


def warn(message: str) -> None:
    """Prints a warning that must not be overlooked on standard error, in red if that is a terminal."""
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}warning: {message}{plain}", file=sys.stderr, flush=True)


def show_any_text() -> None:
    """Has standard output show a question mark for a character that its encoding lacks, instead of ending the program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def refuse_ascii() -> None:
    """UserError where Python takes file names and text for ASCII: then libraries fail on files of their own."""
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
