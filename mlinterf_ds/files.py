"""Whole files or none: everything is written under a temporary name and then renamed."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlinterf_ds.errors import UserError, refusing

PARTIAL = ".partial"  # ending of a file that is still being written


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, and is removed if the block fails."""
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    with replacing(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def write_csv(path: Path, fields: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table with a heading; its folder is made. Nothing stands for NaN and None."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(fields)
    table.writerows(["" if value != value else value for value in row] for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue().encode())


def read_rows(path: Path, fields: Sequence[str], remedy: str) -> list[dict[str, str]]:
    """The rows of a table with these fields in its heading. UserError, with `remedy` if it is missing, unless it is one."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
    with refusing(f"{path}: not a table of {','.join(fields)}"):
        try:
            rows = list(csv.DictReader(io.StringIO(text.decode("utf-8-sig"), newline=""), strict=True))
        except csv.Error as error:
            raise ValueError(error) from None
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values() or not row.keys() >= set(fields):
                raise ValueError(f"row {number} has other fields")
    return rows


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Several arrays in one file. By way of memory: numpy hides the reason when a disk fills up under it."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getbuffer())


def write_array(path: Path, array: np.ndarray) -> None:
    """One array that can be memory-mapped."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_bytes(path, buffer.getbuffer())
