"""What is done to one clean block on disk, or one bucket of hashes, in a worker: duplicates, splits, counts, tokens.

A language's blocks are numbered files in one folder: N.block.npz and N.hash.npy (cleaning.clean_block), N.keep.npz (which
of its sentences stay), N.tokens.npz (their ids by split).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.data.prepare.cleaning import FIRST_NUMBERS, hash_path
from mlinterf_ds.data.tokenizer import EOS, UNK, Tokenizer
from mlinterf_ds.files import read_json, write_array, write_arrays, write_json

SPLITS = ("valid", "test", "meta", "train")  # in the order of the hashes that go to each
HISTOGRAM_BITS = 12
FACTS = ("sentences", "words", "characters", "tokens", "unknown")


def block_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.block.npz"


def keep_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.keep.npz"


def tokens_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.tokens.npz"


def _duplicates_path(folder: Path, bucket: int) -> Path:
    return folder / f"duplicates-{bucket:04d}.npy"


@dataclass(frozen=True)
class Bucket:
    """The lines of a language in the `number`-th of `count` ranges of hashes. `starts`: lines before each block."""

    folder: Path
    starts: tuple[int, ...]  # (blocks + 1,)
    number: int
    count: int


def find_duplicates(bucket: Bucket) -> None:
    """Write the positions, in the whole language, of the bucket's lines that occur earlier; sorted, int64."""
    edges = [number * 2**64 // bucket.count for number in (bucket.number, bucket.number + 1)]
    found, positions = [], []
    for number, start in enumerate(bucket.starts[:-1]):
        line, position = np.load(hash_path(block_path(bucket.folder, number)), mmap_mode="r")
        low = np.searchsorted(line, np.uint64(edges[0]))
        high = np.searchsorted(line, np.uint64(edges[1])) if edges[1] < 2**64 else len(line)
        found.append(line[low:high].copy())  # a view would keep the whole file mapped
        positions.append(position[low:high].astype(np.int64) + start)
    line, position = np.concatenate(found), np.concatenate(positions)
    again = np.ones(len(line), dtype=bool)
    again[np.unique(line, return_index=True)[1]] = (
        False  # of equal hashes, the first block's first line is no duplicate
    )
    write_array(_duplicates_path(bucket.folder, bucket.number), np.sort(position[again]))


@dataclass(frozen=True)
class BlockTask:
    """A block of one language, and what its work needs."""

    folder: Path
    number: int
    start: int = 0  # lines of the language before the block
    buckets: int = 0
    cuts: tuple[int, ...] = ()  # the last unit hash of each split
    fraction: float = 1.0  # of the training sentences, for learning the vocabulary
    tokenizer: Path = Path()


@dataclass(frozen=True)
class Kept:
    """What stays of a block once duplicates are gone."""

    histogram: np.ndarray  # (2^HISTOGRAM_BITS,) sentences by the leading bits of their unit hash
    units: int  # documents, or sentences that stand alone
    dropped: int
    first_dropped: list[int]  # line numbers of the first few


def mark_kept(task: BlockTask) -> Kept:
    """Note on disk which sentences of a block stay."""
    with np.load(block_path(task.folder, task.number)) as block:
        unit, document, line_number = block["unit"], block["document"], block["number"]
    keep = np.ones(len(unit), dtype=bool)
    for number in range(task.buckets):
        position = np.load(_duplicates_path(task.folder, number), mmap_mode="r")
        low, high = np.searchsorted(position, (task.start, task.start + len(unit)))
        keep[position[low:high] - task.start] = False
    write_arrays(keep_path(task.folder, task.number), keep=keep)
    leading = (unit[keep] >> np.uint64(64 - HISTOGRAM_BITS)).astype(np.int64)
    units = int(np.count_nonzero(np.diff(document[keep], prepend=-1)))
    return Kept(
        np.bincount(leading, minlength=1 << HISTOGRAM_BITS),
        units,
        int((~keep).sum()),
        line_number[~keep][:FIRST_NUMBERS].tolist(),
    )


def kept_units(folder: Path, number: int) -> np.ndarray:
    """Unit hash of each sentence of a block that stays.  # (kept sentences,) uint64"""
    with np.load(block_path(folder, number)) as block, np.load(keep_path(folder, number)) as kept:
        return block["unit"][kept["keep"]]


def _split_of(task: BlockTask, block: Any) -> np.ndarray:
    """Number in SPLITS of each sentence, len(SPLITS) where it is left out.  # (sentences,)"""
    split = np.searchsorted(np.array(task.cuts, dtype=np.uint64), block["unit"], side="left")
    with np.load(keep_path(task.folder, task.number)) as kept:
        split[~kept["keep"]] = len(SPLITS)
    return split


def _words(block: Any) -> list[str]:
    return block["words"].tobytes().decode().split("\n")


def count_words(task: BlockTask) -> tuple[Counter[str], int]:
    """How often each word occurs in a share of the block's training sentences, and how many sentences that is."""
    with np.load(block_path(task.folder, task.number)) as block:
        chosen = _split_of(task, block) == SPLITS.index("train")
        if task.fraction < 1:  # by other bits of the hash than the split
            chosen &= (block["line"] & np.uint64(0xFFFFFFFF)) < np.uint64(task.fraction * 2**32)
        words, index = _words(block), block["index"][np.repeat(chosen, block["lengths"])]
    counts = np.bincount(index, minlength=len(words))
    return Counter({words[i]: int(counts[i]) for i in np.flatnonzero(counts)}), int(chosen.sum())


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


def encode_block(task: BlockTask) -> dict[str, dict[str, int]]:
    """Write a block's token ids by split; returns the FACTS of each split."""
    facts_path = tokens_path(task.folder, task.number).with_suffix(".json")
    if facts_path.exists():
        return read_json(facts_path)
    with np.load(block_path(task.folder, task.number)) as block:
        split, words = _split_of(task, block), _words(block)
        index, lengths, document = block["index"], block["lengths"], block["document"]
    ids, counts = _tokenizer(task.tokenizer).encode_words(words)
    # One more "word" closes every sentence.
    ids, counts = np.append(ids, np.array([EOS], ids.dtype)), np.append(counts, 1)
    index = np.insert(index, np.cumsum(lengths), len(words))
    characters = np.array([len(word) + 1 for word in words] + [-1])  # with the space after it, but the last has none
    arrays: dict[str, np.ndarray] = {}
    facts = {}
    for number, name in enumerate(SPLITS):
        mine = split == number
        sequence = index[np.repeat(mine, lengths + 1)]
        tokens = _gather(ids, counts, sequence)
        ends = np.flatnonzero(tokens == EOS) + 1
        arrays[f"{name}.ids"] = tokens
        arrays[f"{name}.lengths"] = np.diff(ends, prepend=0).astype(np.int32)
        arrays[f"{name}.ends"] = _document_ends(document[mine])
        values = (mine.sum(), lengths[mine].sum(), characters[sequence].sum(), len(tokens), (tokens == UNK).sum())
        facts[name] = dict(zip(FACTS, map(int, values), strict=True))
    write_arrays(tokens_path(task.folder, task.number), **arrays)
    write_json(facts_path, facts)
    return facts


def _gather(ids: np.ndarray, counts: np.ndarray, sequence: np.ndarray) -> np.ndarray:
    """The ids of each word of `sequence` end to end, where word w has counts[w] of `ids`, after those of words < w."""
    starts, size = (np.cumsum(counts) - counts)[sequence], counts[sequence]
    before = np.cumsum(size) - size
    return ids[np.repeat(starts - before, size) + np.arange(size.sum())]


def _document_ends(document: np.ndarray) -> np.ndarray:
    """How many sentences have gone by at the end of each document.  # (documents,) int32"""
    if not len(document):
        return np.zeros(0, np.int32)
    return np.append(np.flatnonzero(np.diff(document)) + 1, len(document)).astype(np.int32)


def read_parts(folder: Path, blocks: int, name: str) -> Iterator[np.ndarray]:
    """One of the arrays that encode_block wrote ("SPLIT.ids", "SPLIT.lengths", "SPLIT.ends"), block by block."""
    for number in range(blocks):
        with np.load(tokens_path(folder, number)) as file:
            yield file[name]
