"""Reading task files as text; messages that name the line of a mistake."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path
from typing import Any

from mlinterf_ds.data.tokenizer import other_format
from mlinterf_ds.errors import UserError

KINDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list"}


def read_text(path: Path) -> str:
    """The text of a file, or of standard input (`-`), without the byte-order marks that begin lines where files were joined.

    Text is UTF-8, or what a byte-order mark says. Where carriage returns alone end the lines, newlines stand in for them.
    UserError if it is missing, empty or in another encoding or format.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" and sys.stdin else path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; give an existing file, as LANG=FILE") from None
    if kind := other_format(data[:16]):
        raise UserError(f"{path}: {kind} and not text: unpack or convert it first")
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8").replace("\n\ufeff", "\n").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not {error.encoding.upper()} ({error.reason}); convert the file to UTF-8, for example with iconv"
        ) from None
    if "\n" not in text:
        text = text.replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{path}: empty; expected at least one example")
    return text


def typed(value: Any, kind: type, name: str) -> Any:
    """The value of a JSON field. Raises TypeError if it is of another type, ValueError if it is text that UTF-8 cannot hold."""
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r}, expected {KINDS[kind]}")
    if isinstance(value, str):
        value.encode()  # fails on half a surrogate pair
    return value


def bad(path: Path, line: int, message: str) -> UserError:
    """The error that names a mistake in a line of a file."""
    return UserError(f"{path}, line {line}: {message}")
