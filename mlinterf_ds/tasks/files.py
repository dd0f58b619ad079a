"""Task files as text: whole, UTF-8, and with the place of every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlinterf_ds.errors import UserError

KINDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list"}


def read_text(path: Path) -> str:
    """The text of a file without a byte-order mark. UserError if it is missing, empty or not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; give LANG=FILE, LANG=synthetic or LANG=split"
        ) from None
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert the file") from None
    if not text.strip():
        raise UserError(f"{path}: empty; expected at least one example")
    return text


def typed(value: Any, kind: type, name: str) -> Any:
    """The value of a JSON field, if it is of this kind (and, being text, can be written); else TypeError or ValueError."""
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r}, expected {KINDS[kind]}")
    if isinstance(value, str):
        value.encode()  # half a surrogate pair is no character
    return value


def bad(path: Path, line: int, message: str) -> UserError:
    """A mistake in a line of a file."""
    return UserError(f"{path}, line {line}: {message}")
