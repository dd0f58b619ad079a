"""The stages of preparing a corpus, each over all languages at once: clean, deduplicate and split, learn, encode."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from mlinterf_ds.data.prepare.blocks import (
    SPLITS,
    BlockTask,
    Bucket,
    block_path,
    count_words,
    encode_block,
    find_duplicates,
    kept_units,
    mark_kept,
    read_parts,
)
from mlinterf_ds.data.prepare.cleaning import Dropped, add_dropped, clean_block
from mlinterf_ds.data.prepare.extend import extend
from mlinterf_ds.data.prepare.inputs import RawBlock, Source
from mlinterf_ds.data.prepare.shards import write_shard
from mlinterf_ds.data.prepare.splits import FEWEST_UNITS, find_cuts
from mlinterf_ds.data.prepare.workers import Workers
from mlinterf_ds.data.tokenizer import Tokenizer, distinct_characters
from mlinterf_ds.errors import UserError

LINES_PER_BUCKET = 1_000_000  # hashes that one process sorts at a time: about 50 MB
# The vocabulary is learned from this many characters of running text for each character of distinct words it uses.
SAMPLE_RATIO = 20

Item = TypeVar("Item")


@dataclass
class Language:
    """One language on its way through the stages."""

    code: str
    sources: list[Source]
    folder: Path  # its work files
    limit: int | None
    blocks: list[dict[str, Any]] = field(default_factory=list)  # what clean_block returned for each
    dropped: Dropped = field(default_factory=dict)
    cuts: tuple[int, ...] = ()
    sentences: dict[str, int] = field(default_factory=dict)  # by split

    @property
    def starts(self) -> list[int]:
        """Sentences of the language before each block, and in all.  # (blocks + 1,)"""
        return [0, *np.cumsum([block["sentences"] for block in self.blocks]).tolist()]

    def tasks(self) -> list[BlockTask]:
        return [BlockTask(self.folder, n, start, cuts=self.cuts) for n, start in enumerate(self.starts[:-1])]


def bar(items: Iterable[Item], title: str, total: int, show: bool) -> Iterator[Item]:
    """A progress bar over blocks of text; only on a terminal."""
    return iter(tqdm(items, title, total, disable=None if show else True, unit="block", leave=False))


def clean(languages: list[Language], workers: Workers, show: bool) -> bool:
    """Read, clean and store every block, but those an earlier run left; fills in `blocks` and `dropped`.

    Returns whether all blocks are what the earlier run left, so that what it made of them holds too.
    """
    size = sum(source.path.stat().st_size for x in languages for source in x.sources if source.path)
    progress = tqdm(None, "clean", size or None, disable=None if show else True, unit="B", unit_scale=True, leave=False)
    owners: list[Language] = []  # of the blocks handed out so far

    def tasks() -> Iterator[tuple[RawBlock, Path]]:
        for language in languages:
            number = 0
            for source in language.sources:
                before = 0
                for raw in source.blocks():
                    progress.update(source.bytes_read - before)
                    before = source.bytes_read
                    owners.append(language)
                    yield raw, block_path(language.folder, number)
                    number += 1

    with progress:
        for number, facts in enumerate(workers.map(clean_block, tasks())):
            owners[number].blocks.append(facts)
    same = all(block.pop("reused") for language in languages for block in language.blocks)
    for language in languages:
        surplus = block_path(language.folder, len(language.blocks))
        same = same and not surplus.exists()
        surplus.unlink(missing_ok=True)
        for block in language.blocks:
            for reason, entry in block["dropped"].items():
                add_dropped(language.dropped, reason, entry["lines"], entry["first"])
    return same


def deduplicate_and_split(language: Language, workers: Workers, show: bool) -> None:
    """Mark the first of equal sentences as kept and cut the kept ones into splits; fills in `cuts` and `sentences`.

    Raises UserError if too little is left to be split.
    """
    starts = language.starts
    buckets = -(-starts[-1] // LINES_PER_BUCKET)
    tasks = [Bucket(language.folder, tuple(starts), number, buckets) for number in range(buckets)]
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
    if units < FEWEST_UNITS:
        _too_little(language, units)
    cuts = find_cuts(
        histogram, lambda: (kept_units(language.folder, n) for n in range(len(language.blocks))), language.limit
    )
    language.cuts, language.sentences = cuts.hashes, cuts.sentences
    if cuts.left_out:
        add_dropped(language.dropped, "over the limit", cuts.left_out, [])
    if empty := [split for split, count in cuts.sentences.items() if not count]:
        raise UserError(
            f"{language.code}: its documents are so unequal that nothing is left for {', '.join(empty)}; give more "
            "documents, or plain text, which is split by line"
        )


def _too_little(language: Language, units: int) -> None:
    reasons = ", ".join(f"{entry['lines']} {reason}" for reason, entry in language.dropped.items()) or "none"
    names = ", ".join(source.name for source in language.sources[:3])
    raise UserError(
        f"{language.code} ({names}): {units} distinct sentences or documents, at least {FEWEST_UNITS} are needed to split "
        f"off meta, valid and test (lines dropped: {reasons}); give more text"
    )


def learn(
    languages: list[Language],
    size: int,
    temperature: float,
    out: Path,
    workers: Workers,
    show: bool,
    extends: Tokenizer | None = None,
) -> Tokenizer:
    """Learn the shared vocabulary on the training splits; or only what it has more than the one it `extends`.

    Language i weighs as much as its share of all sentences to the power 1 / temperature, normalised. Of a large language
    only a part is read; a small one counts several times.
    """
    shares = np.array([language.sentences["train"] for language in languages], dtype=np.float64)
    shares = (shares / shares.sum()) ** (1 / temperature)
    shares /= shares.sum()
    budget = SAMPLE_RATIO * distinct_characters(size)
    tasks = []
    for language, share in zip(languages, shares, strict=True):
        characters = sum(block["characters"] for block in language.blocks)
        characters *= language.sentences["train"] / language.starts[-1]
        fraction = min(1.0, float(share) * budget / characters)
        tasks += [replace(task, fraction=fraction) for task in language.tasks()]
    counts = {language.folder: Counter[str]() for language in languages}
    sampled = dict.fromkeys(counts, 0)
    for task, (words, sentences) in zip(
        tasks, bar(workers.map(count_words, tasks), "count words", len(tasks), show), strict=True
    ):
        counts[task.folder].update(words)
        sampled[task.folder] += sentences
    weights = shares / np.maximum(1, [sampled[language.folder] for language in languages])
    weights /= weights.min()
    total = Counter[str]()
    for language, weight in zip(languages, weights, strict=True):
        words = counts.pop(language.folder)
        total.update(words if weight == 1 else {word: round(count * float(weight)) for word, count in words.items()})
    return extend(extends, total, size, out) if extends else Tokenizer.learn_from_counts(total, size, out)


def encode(
    languages: list[Language], tokenizer: Tokenizer, out: Path, workers: Workers, show: bool
) -> dict[str, dict[str, dict[str, Any]]]:
    """Encode every block and write the shards: language -> split -> its counts and its files' facts."""
    tasks = [replace(task, tokenizer=tokenizer.path) for language in languages for task in language.tasks()]
    results = bar(workers.map(encode_block, tasks), "encode", len(tasks), show)
    result: dict[str, dict[str, dict[str, Any]]] = {x.code: {split: {} for split in SPLITS} for x in languages}
    codes = {language.folder: language.code for language in languages}
    for task, facts in zip(tasks, results, strict=True):
        for split, counts in facts.items():
            total = result[codes[task.folder]][split]
            for name, count in counts.items():
                total[name] = total.get(name, 0) + count
    shards = [
        (out / f"{x.code}.{split}", tokenizer.dtype, x.folder, len(x.blocks)) for x in languages for split in SPLITS
    ]
    written = bar(workers.map(_write_shard, shards), "write shards", len(shards), show)
    for (prefix, *_), files in zip(shards, written, strict=True):
        code, split = prefix.name.split(".")
        result[code][split] |= files
    return result


def _write_shard(task: tuple[Path, Any, Path, int]) -> dict[str, dict[str, Any]]:
    prefix, dtype, folder, blocks = task
    split = prefix.name.split(".")[1]
    return write_shard(prefix, dtype, lambda name: read_parts(folder, blocks, f"{split}.{name}"))
