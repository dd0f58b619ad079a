"""The work of one process on one clean block, or on one bucket of hashes: find duplicates, split, count words, encode.

A language's blocks are numbered files in one folder: N.block.npz and N.hash.npy (written by `cleaning.clean_block`),
N.keep.npz (which of the block's sentences are kept) and N.tokens.npz (their token ids by split).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlinterf_ds.data.prepare.cleaning import FIRST_NUMBERS, hash_path
from mlinterf_ds.data.prepare.splits import HISTOGRAM_BITS, SPLIT_ORDER
from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.files import read_json, write_array, write_arrays, write_json

BLOCK_COUNTS = ("sentences", "words", "characters", "tokens", "unknown", "unknown_characters")


def block_path(folder: Path, number: int, kind: str = "block") -> Path:
    return folder / f"{number:06d}.{kind}.npz"


class Bucket(NamedTuple):
    """The lines of a language whose hash is in one of `buckets` equal ranges."""

    folder: Path
    starts: list[int]  # (blocks + 1,) lines of the language before each block, and in all
    number: int  # of the range
    buckets: int


def find_duplicates(bucket: Bucket) -> None:
    """Writes the positions, in the whole language, of the bucket's lines that repeat an earlier line; sorted, int64."""
    first, last = (number * 2**64 // bucket.buckets for number in (bucket.number, bucket.number + 1))
    hashes, positions = [], []
    for number, start in enumerate(bucket.starts[:-1]):
        line, position = np.load(hash_path(block_path(bucket.folder, number)), mmap_mode="r")
        low = np.searchsorted(line, np.uint64(first))
        high = np.searchsorted(line, np.uint64(last - 1), side="right")
        hashes.append(line[low:high].copy())  # a view would keep the whole file mapped
        positions.append(position[low:high].astype(np.int64) + start)
    line, position = np.concatenate(hashes), np.concatenate(positions)
    again = np.ones(len(line), dtype=bool)
    # np.unique gives the first of equal hashes, which is the language's first such line and no duplicate.
    again[np.unique(line, return_index=True)[1]] = False
    write_array(bucket.folder / f"duplicates-{bucket.number:04d}.npy", np.sort(position[again]))


@dataclass(frozen=True)
class BlockTask:
    """One block of one language, and what a process needs to know for its work on it."""

    folder: Path
    number: int
    start: int = 0  # lines of the language before the block
    buckets: int = 0
    cuts: tuple[int, ...] = ()  # the last unit hash of each split, in SPLIT_ORDER
    half: int | None = None  # keep only units whose hash ends in this bit
    fraction: float = 1.0  # share of the training sentences whose words are counted
    tokenizer: Path = Path()


class Kept(NamedTuple):
    """The sentences of a block that remain without its duplicates, counted."""

    histogram: np.ndarray  # (2^HISTOGRAM_BITS,) sentences by the leading bits of their unit hash
    units: int  # documents, or sentences that stand alone
    dropped: int  # duplicates
    first_dropped: list[int]  # line numbers of the first few duplicates
    elsewhere: int  # sentences of the other half


def mark_kept(task: BlockTask) -> Kept:
    """Writes which sentences of a block are kept."""
    with np.load(block_path(task.folder, task.number)) as block:
        unit, document, line_number = block["unit"], block["document"], block["number"]
    keep = np.ones(len(unit), dtype=bool)
    for number in range(task.buckets):
        position = np.load(task.folder / f"duplicates-{number:04d}.npy", mmap_mode="r")
        low, high = np.searchsorted(position, (task.start, task.start + len(unit)))
        keep[position[low:high] - task.start] = False
    first = np.flatnonzero(~keep)
    if task.half is not None:  # the last bit, which neither splits nor the counting of words look at
        keep &= (unit & np.uint64(1)) == task.half
    write_arrays(block_path(task.folder, task.number, "keep"), keep=keep)
    leading = (unit[keep] >> np.uint64(64 - HISTOGRAM_BITS)).astype(np.int64)
    histogram = np.bincount(leading, minlength=1 << HISTOGRAM_BITS)
    units = int(np.count_nonzero(np.diff(document[keep], prepend=-1)))
    elsewhere = int((~keep).sum()) - len(first)
    return Kept(histogram, units, len(first), line_number[first][:FIRST_NUMBERS].tolist(), elsewhere)


def kept_units(folder: Path, number: int) -> np.ndarray:
    """Returns the unit hash of each kept sentence of a block.  # (kept sentences,) uint64"""
    with np.load(block_path(folder, number)) as block, np.load(block_path(folder, number, "keep")) as kept:
        return block["unit"][kept["keep"]]


def _split_of(task: BlockTask, block: Any) -> np.ndarray:
    """Returns for each sentence its split's index in SPLIT_ORDER, or len(SPLIT_ORDER) if it is dropped.  # (sentences,)"""
    split = np.searchsorted(np.array(task.cuts, dtype=np.uint64), block["unit"], side="left")
    with np.load(block_path(task.folder, task.number, "keep")) as kept:
        split[~kept["keep"]] = len(SPLIT_ORDER)
    return split


def count_words(task: BlockTask) -> tuple[Counter[str], int]:
    """Returns how often each word occurs in `fraction` of the block's training sentences, and how many sentences those are."""
    with np.load(block_path(task.folder, task.number)) as block:
        chosen = _split_of(task, block) == SPLIT_ORDER.index("train")
        if task.fraction < 1:  # chosen by other bits of the hash than the split
            chosen &= (block["line"] & np.uint64(0xFFFFFFFF)) < np.uint64(task.fraction * 2**32)
        index = block["index"][np.repeat(chosen, block["lengths"])]
        words = block["words"].tobytes().decode().split("\n")
    counts = np.bincount(index, minlength=len(words))
    return Counter({words[i]: int(counts[i]) for i in np.flatnonzero(counts)}), int(chosen.sum())


@lru_cache(maxsize=1)
def _tokenizer(path: Path, _written: int) -> Tokenizer:
    """The tokenizer of a file that was written at this time: another corpus may have stood in the folder before."""
    return Tokenizer(path)


def encode_block(task: BlockTask) -> dict[str, dict[str, int]]:
    """Writes a block's token ids by split, unless that is done; returns the BLOCK_COUNTS of each split."""
    facts_path = block_path(task.folder, task.number, "tokens").with_suffix(".json")
    if facts_path.exists():
        return read_json(facts_path)
    with np.load(block_path(task.folder, task.number)) as block:
        split, words = _split_of(task, block), block["words"].tobytes().decode().split("\n")
        index, lengths, document = block["index"], block["lengths"], block["document"]
    tokenizer = _tokenizer(task.tokenizer, task.tokenizer.stat().st_mtime_ns)
    encoded = _encoded_sentences(tokenizer, words, index, lengths)
    eos, unk = tokenizer.vocabulary.eos, tokenizer.vocabulary.unk
    index = np.insert(index, np.cumsum(lengths), len(words))  # the end of a sentence is one more word
    # Each word counts with the space after it; a sentence's last word has none.
    characters = np.array([len(word) + 1 for word in words] + [-1])
    unknown = np.array([*tokenizer.unknown_characters(words), 0])
    arrays: dict[str, np.ndarray] = {}
    facts = {}
    for number, name in enumerate(SPLIT_ORDER):
        chosen = split == number
        sequence = index[np.repeat(chosen, lengths + 1)]
        tokens = encoded(chosen)
        ends = np.flatnonzero(tokens == eos) + 1
        arrays[f"{name}.ids"] = tokens
        arrays[f"{name}.lengths"] = np.diff(ends, prepend=0).astype(np.int32)
        # The number of sentences up to the end of each document.
        arrays[f"{name}.ends"] = (np.flatnonzero(np.diff(document[chosen], append=-1)) + 1).astype(np.int32)
        of_text = chosen.sum(), lengths[chosen].sum(), characters[sequence].sum()
        values = *of_text, len(tokens), (tokens == unk).sum(), unknown[sequence].sum()
        facts[name] = dict(zip(BLOCK_COUNTS, map(int, values), strict=True))
    write_arrays(block_path(task.folder, task.number, "tokens"), **arrays)
    write_json(facts_path, facts)
    return facts


def _encoded_sentences(
    tokenizer: Tokenizer, words: list[str], index: np.ndarray, lengths: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Encodes a block; returns the function from chosen sentences, (sentences,) bool, to their ids, `</s>` after each.

    `index` has the number of every word of the sentences end to end, `lengths` the words of each sentence. Where the ids of a
    word do not depend on its neighbours, each distinct word is encoded once, else each sentence.
    """
    end = np.array([tokenizer.vocabulary.eos], tokenizer.dtype)
    if tokenizer.by_word:
        ids, counts = tokenizer.encode_words(words)
        ids, counts = np.append(ids, end), np.append(counts, 1)
        sequence = np.insert(index, np.cumsum(lengths), len(words))
        return lambda chosen: _gather(ids, counts, sequence[np.repeat(chosen, lengths + 1)])
    ends = np.cumsum(lengths)
    sentences = [
        " ".join(words[i] for i in index[last - size : last]) for last, size in zip(ends, lengths, strict=True)
    ]
    ids, counts = tokenizer.encode_words(sentences)
    ids = np.insert(ids, np.cumsum(counts), end)
    return lambda chosen: _gather(ids, counts + 1, np.flatnonzero(chosen))


def _gather(ids: np.ndarray, counts: np.ndarray, sequence: np.ndarray) -> np.ndarray:
    """Joins the ids of the words in `sequence`. `ids` holds the ids of word 0, then of word 1, ...: counts[w] for word w."""
    starts, size = (np.cumsum(counts) - counts)[sequence], counts[sequence]
    before = np.cumsum(size) - size
    return ids[np.repeat(starts - before, size) + np.arange(size.sum())]


def read_parts(folder: Path, blocks: int, name: str) -> Iterator[np.ndarray]:
    """Yields one of the arrays that encode_block wrote ("SPLIT.ids", "SPLIT.lengths", "SPLIT.ends"), block by block."""
    for number in range(blocks):
        with np.load(block_path(folder, number, "tokens")) as file:
            yield file[name]
