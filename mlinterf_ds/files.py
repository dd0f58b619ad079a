"""Files that appear whole or not at all (text, JSON, CSV, arrays), and the digests that tell whether one was altered.

Every writer writes under a temporary name in the same folder and then renames: a reader never meets half a file, and
whatever stood under the name stays if writing fails.
"""

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlinterf_ds.errors import UserError, refusing, warn

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system that has none, as Lustre may be mounted
PARTIAL = ".partial"  # ending of a file that is still being written


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` when the block ends, and that is removed if the block fails. An OSError names `path`."""
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise


def lock(file: BinaryIO, wait: bool) -> bool:
    """Whether this process now holds a file of its own; False if another process does and it is not to wait.

    A file system without locks lets everybody in, with a warning.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn(f"{file.name}: this file system has no locks: see that no two programs write to this folder at once")
    return True


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    with replacing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text; the parent folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def write_csv(path: Path, fields: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table with a header row; the parent folder is created. NaN and None become empty cells."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(fields)
    table.writerows(["" if value != value else value for value in row] for row in rows)
    write_text(path, buffer.getvalue())


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table in Markdown."""
    first, *others = (f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows))
    return [first, "|---" * len(head) + "|", *others]


def read_csv(path: Path, fields: Sequence[str], remedy: str) -> list[dict[str, str]]:
    """Reads a table whose header row has at least `fields`. Raises UserError for anything else; `remedy` says what to do
    about a file that is missing."""
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
    """Writes several arrays to one .npz file. They are packed in memory first: writing to a disk that fills up, numpy hides
    the reason."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getbuffer())


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes one array to a .npy file, which can be memory-mapped."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_bytes(path, buffer.getbuffer())


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's contents in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_facts(path: Path) -> dict[str, Any]:
    """Returns the "bytes" and the "sha256" of a file, as checkpoints, corpora and exported models list them."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def flushed_facts(paths: Iterable[Path]) -> dict[str, Any]:
    """Returns the `file_facts` of files by name, once the system has put their contents on the disk."""
    facts = {}
    for path in paths:
        flush(path)
        facts[path.name] = file_facts(path)
    return facts


def flush(path: Path) -> None:
    """Waits until the system has put a file's contents, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_files(folder: Path, listed: Mapping[str, Any], remedy: str) -> None:
    """Raises UserError, ending in `remedy`, unless every listed file is there and has its listed `file_facts`."""
    for name, facts in listed.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise UserError(f"{path} is missing{remedy}")
        if (size := path.stat().st_size) != facts["bytes"]:
            raise UserError(f"{path}: {size} bytes, expected {facts['bytes']} (truncated?){remedy}")
        if sha256(path) != facts["sha256"]:
            raise UserError(f"{path}: altered since it was saved (sha256 differs){remedy}")
