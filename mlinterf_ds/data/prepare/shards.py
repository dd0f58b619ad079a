"""Token shards on disk: megatron-core's indexed-dataset format, written in a stream.

PREFIX.bin is the token ids end to end. PREFIX.idx is a header, then for each sequence (here: a sentence with its `</s>`)
its length and its byte offset, then for each document the number of the sequence it starts at, and the total.
megatron's own builder keeps a Python list of all sequences in memory, several gigabytes for a few gigabytes of text, and
imports torch; a test compares the bytes with its.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.files import replacing

# Yields the parts of a shard by the name of an array, anew at every call: "ids" (tokens,), "lengths" (sequences,) in
# tokens, and "ends" (documents,), the number of the part's sequences up to the end of each document.
Parts = Callable[[str], Iterable[np.ndarray]]

_DTYPE_CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}


def write_shard(prefix: Path, dtype: Any, parts: Parts) -> dict[str, dict[str, Any]]:
    """Writes PREFIX.bin and PREFIX.idx, with one array of one part in memory at a time.

    Returns for "bin" and "idx" the file's name, size in bytes and SHA-256.
    """
    dtype = np.dtype(dtype)
    arrays = {"bin": (ids.astype(dtype, copy=False) for ids in parts("ids")), "idx": _index(dtype, parts)}
    return {ending: _write(prefix.with_name(f"{prefix.name}.{ending}"), arrays[ending]) for ending in arrays}


def _index(dtype: np.dtype, parts: Parts) -> Iterator[np.ndarray]:
    sequences, documents = (sum(len(array) for array in parts(name)) for name in ("lengths", "ends"))
    # The format's document list holds the start of the first document and then the end of each.
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, _DTYPE_CODES[dtype], sequences, documents + 1)
    yield np.frombuffer(header, np.uint8)
    for lengths in parts("lengths"):
        yield lengths.astype(np.int32, copy=False)
    offset = 0
    for lengths in parts("lengths"):
        size = lengths.astype(np.int64) * dtype.itemsize
        yield offset + np.cumsum(size) - size
        offset += int(size.sum())
    start = 0
    yield np.zeros(1, np.int64)
    for lengths, ends in zip(parts("lengths"), parts("ends"), strict=True):
        yield start + ends.astype(np.int64)
        start += len(lengths)


def _write(path: Path, arrays: Iterable[np.ndarray]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with replacing(path) as file:
        for array in arrays:
            data = array.tobytes()
            file.write(data)
            digest.update(data)
            size += len(data)
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}
