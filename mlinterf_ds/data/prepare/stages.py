"""The stages of preparing a corpus, each over many blocks at once: clean, deduplicate and split, encode.

`vocabulary.learn` comes between the last two.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from mlinterf_ds.data.prepare.blocks import (
    BlockTask,
    Bucket,
    block_path,
    encode_block,
    find_duplicates,
    kept_units,
    mark_kept,
    read_parts,
)
from mlinterf_ds.data.prepare.cleaning import Dropped, add_dropped, clean_block
from mlinterf_ds.data.prepare.inputs import Input, RawBlock
from mlinterf_ds.data.prepare.shards import write_shard
from mlinterf_ds.data.prepare.splits import FEWEST_UNITS, SPLIT_ORDER, find_cuts
from mlinterf_ds.data.prepare.workers import Workers
from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.errors import UserError

LINES_PER_BUCKET = 1_000_000  # hashes that one process sorts at a time: about 50 MB

Item = TypeVar("Item")


@dataclass
class Language:
    """One language, with the results of the stages that it has passed."""

    code: str
    inputs: list[Input]
    folder: Path  # of its work files
    limit: int | None  # training sentences to keep
    meta_split: bool = False
    half: int | None = None  # 0 or 1: which half of the text is kept, where two languages share one
    blocks: list[dict[str, Any]] = field(default_factory=list)  # what clean_block returned for each block
    dropped: Dropped = field(default_factory=dict)
    cuts: tuple[int, ...] = ()  # the last unit hash of each split, in SPLIT_ORDER
    sentences: dict[str, int] = field(default_factory=dict)  # by split

    @property
    def starts(self) -> list[int]:
        """The number of sentences before each block, and in all.  # (blocks + 1,)"""
        return [0, *np.cumsum([block["sentences"] for block in self.blocks]).tolist()]

    def tasks(self) -> list[BlockTask]:
        return [
            BlockTask(self.folder, n, start, cuts=self.cuts, half=self.half) for n, start in enumerate(self.starts[:-1])
        ]


def bar(items: Iterable[Item], title: str, total: int, show: bool) -> Iterator[Item]:
    """Yields the items under a progress bar, which is shown on a terminal only."""
    return iter(tqdm(items, title, total, disable=None if show else True, unit="block", leave=False))


def clean(languages: list[Language], workers: Workers, show: bool) -> bool:
    """Reads, cleans and stores every block that an interrupted run has not stored; fills in `blocks` and `dropped`.

    Returns whether all blocks are from that run, so that its later results can be reused too.
    """
    size = sum(text.path.stat().st_size for language in languages for text in language.inputs if text.path)
    progress = tqdm(None, "clean", size or None, disable=None if show else True, unit="B", unit_scale=True, leave=False)
    owners: list[Language] = []  # of the blocks handed to workers so far

    def tasks() -> Iterator[tuple[RawBlock, Path]]:
        for language in languages:
            number = 0
            for text in language.inputs:
                before = 0
                for raw in text.blocks():
                    progress.update(text.bytes_read - before)
                    before = text.bytes_read
                    owners.append(language)
                    yield raw, block_path(language.folder, number)
                    number += 1

    with progress:
        for number, facts in enumerate(workers.map(clean_block, tasks())):
            owners[number].blocks.append(facts)
    unchanged = all(block.pop("reused") for language in languages for block in language.blocks)
    for language in languages:
        surplus = block_path(language.folder, len(language.blocks))
        unchanged = unchanged and not surplus.exists()
        surplus.unlink(missing_ok=True)
        for block in language.blocks:
            for reason, entry in block["dropped"].items():
                add_dropped(language.dropped, reason, entry["lines"], entry["first"])
    return unchanged


def deduplicate_and_split(language: Language, workers: Workers, show: bool) -> None:
    """Keeps the first of equal sentences, of a half those that belong to it, and cuts what is kept into splits; fills in `cuts` and `sentences`.

    Raises UserError if too little is left to be split.
    """
    starts = language.starts
    buckets = -(-starts[-1] // LINES_PER_BUCKET)
    tasks = [Bucket(language.folder, starts, number, buckets) for number in range(buckets)]
    for _ in bar(workers.map(find_duplicates, tasks), f"deduplicate {language.code}", buckets, show):
        pass
    marking = [replace(task, buckets=buckets) for task in language.tasks()]
    histogram, units = np.zeros((), dtype=np.int64), 0
    marked = bar(workers.map(mark_kept, marking), f"split {language.code}", len(marking), show)
    for block, kept in zip(language.blocks, marked, strict=True):
        histogram, units = histogram + kept.histogram, units + kept.units
        if kept.dropped:
            first = [f"{block['source']}:{n}" for n in kept.first_dropped]
            add_dropped(language.dropped, "duplicate", kept.dropped, first)
        if kept.elsewhere:
            add_dropped(language.dropped, "in the other half", kept.elsewhere, [])
    if units < FEWEST_UNITS:
        reasons = ", ".join(f"{entry['lines']} {reason}" for reason, entry in language.dropped.items()) or "none"
        raise UserError(
            f"{language.code} ({', '.join(text.name for text in language.inputs[:3])}): {units} distinct sentences or "
            f"documents, at least {FEWEST_UNITS} are needed to split off valid and test (lines dropped: {reasons}); "
            "give more text"
        )
    language.cuts, (*counts, left_out) = find_cuts(
        histogram,
        lambda: (kept_units(language.folder, number) for number in range(len(language.blocks))),
        language.limit,
        language.meta_split,
    )
    language.sentences = dict(zip(SPLIT_ORDER, counts, strict=True))
    if left_out:
        add_dropped(language.dropped, "over the limit", left_out, [])
    if empty := [
        split for split, count in language.sentences.items() if not count and (language.meta_split or split != "meta")
    ]:
        raise UserError(
            f"{language.code}: its documents are so unequal that nothing is left for {', '.join(empty)}; give more "
            "documents, or plain text, which is split by line"
        )


def encode(
    languages: list[Language], tokenizer: Tokenizer, out: Path, workers: Workers, show: bool
) -> dict[str, dict[str, Any]]:
    """Encodes every block and writes the shards. Returns for each language and split its counts and its files' entries."""
    tasks = [replace(task, tokenizer=tokenizer.path) for language in languages for task in language.tasks()]
    results = bar(workers.map(encode_block, tasks), "encode", len(tasks), show)
    result: dict[str, dict[str, Any]] = {x.code: {split: Counter() for split in SPLIT_ORDER} for x in languages}
    for task, facts in zip(tasks, results, strict=True):
        for split, counts in facts.items():
            result[task.folder.name][split].update(counts)
    shards = [
        (out / f"{x.code}.{split}", tokenizer.dtype, x.folder, len(x.blocks))
        for x in languages
        for split in SPLIT_ORDER
    ]
    written = bar(workers.map(_write_shard, shards), "write shards", len(shards), show)
    for (prefix, *_), files in zip(shards, written, strict=True):
        code, split = prefix.name.split(".")
        result[code][split] = {**result[code][split], **files}
    return result


def _write_shard(task: tuple[Path, Any, Path, int]) -> dict[str, dict[str, Any]]:
    prefix, dtype, folder, blocks = task
    split = prefix.name.split(".")[1]
    return write_shard(prefix, dtype, lambda name: read_parts(folder, blocks, f"{split}.{name}"))
