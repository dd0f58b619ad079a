"""Task files as text: whole, UTF-8, and with the place of every mistake."""

from __future__ import annotations

from pathlib import Path

from mlinterf_ds.data.files import write_bytes
from mlinterf_ds.errors import UserError


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


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


def bad(path: Path, line: int, message: str) -> UserError:
    """A mistake in a line of a file."""
    return UserError(f"{path}, line {line}: {message}")
