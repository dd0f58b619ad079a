"""Which examples a fine-tuning trains on, selects by and is tested on: `LANG=FILE`, `LANG=synthetic`, `LANG=split`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlinterf_ds.errors import UserError
from mlinterf_ds.files import sha256
from mlinterf_ds.sections import LANGUAGE_PATTERN
from mlinterf_ds.tasks.base import Task

SPLITS = ("train", "dev", "test")
SYNTHETIC_SPLIT = {"train": "train", "dev": "valid", "test": "test"}
SEED = 0  # of synthetic examples and of splits: the same data for every seed of a fine-tuning


@dataclass
class Sets:
    """Examples by split and language; what they were made of; and remarks for the report."""

    train: dict[str, list[Any]] = field(default_factory=dict)
    dev: dict[str, list[Any]] = field(default_factory=dict)
    test: dict[str, list[Any]] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)  # "train en": file and digest
    notes: list[str] = field(default_factory=list)

    def of(self, split: str) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = getattr(self, split)
        return found


def parse(options: Sequence[str], split: str) -> dict[str, str]:
    """{"en": "en/train.tsv"} from ["en=en/train.tsv"]."""
    found: dict[str, str] = {}
    for option in options:
        language, equals, source = option.partition("=")
        if not equals or not source or not re.fullmatch(LANGUAGE_PATTERN, language):
            raise UserError(
                f"--{split} {option}: expected LANG=FILE, LANG=synthetic or LANG=split, such as en=train.tsv"
            )
        if language in found:
            raise UserError(f"--{split} {option}: {language} is given twice; put its examples in one file")
        found[language] = source
    if not found:
        raise UserError(f"--{split} LANG=FILE is missing: name at least one language's {split} set")
    return found


def load(
    task: Task,
    options: dict[str, dict[str, str]],
    *,
    shares: dict[str, float],
    synthetic: dict[str, int],
    limit: int | None = None,
) -> Sets:
    """Read every set. options: {"train": {"en": "FILE", ...}, ...}; shares: of train, for dev and test; synthetic: counts.

    UserError names a file's mistake, or a set without labels.
    """
    sets = Sets()
    for split in SPLITS:
        for language, source in options[split].items():
            if source == "split":
                continue
            if source == "synthetic":
                examples = task.synthetic(language, synthetic[split], SEED, SYNTHETIC_SPLIT[split])
                sets.origin[f"{split} {language}"] = f"synthetic, {synthetic[split]} examples"
            else:
                examples = task.read(Path(source), language)
                sets.origin[f"{split} {language}"] = f"{Path(source).name}, sha256 {sha256(Path(source))}"
            sets.of(split)[language] = examples[:limit]
    sizes = {code: len({task.group(example) for example in examples}) for code, examples in sets.train.items()}
    for split in ("test", "dev"):
        for language, source in options[split].items():
            if source == "split":
                _split(task, sets, split, language, shares[split], sizes.get(language, 0))
    for language in sets.test:
        dev, test = (sets.origin.get(f"{split} {language}", "") for split in ("dev", "test"))
        if dev == test and "sha256" in test:
            sets.notes.append(f"{language}: dev and test are one file: the scores are those that chose the epoch")
    for split in SPLITS:
        for language in options[split]:
            _check_labels(task, sets, split, language, options[split][language])
    return sets


def _split(task: Task, sets: Sets, split: str, language: str, share: float, size: int) -> None:
    """Move a share of a language's `size` training groups to dev or test, by hash: the same ones always."""
    if language not in sets.train:
        raise UserError(f"--{split} {language}=split takes a share of train: give --train {language}=FILE too")
    examples = sets.train[language]

    def place(group: str) -> bytes:
        return hashlib.blake2b(f"{SEED} {split} {group}".encode(), digest_size=8).digest()

    groups = sorted({task.group(example) for example in examples}, key=place)
    taken = set(groups[: max(1, round(share * size))])
    sets.of(split)[language] = [example for example in examples if task.group(example) in taken]
    sets.train[language] = [example for example in examples if task.group(example) not in taken]
    if not sets.train[language]:
        raise UserError(f"--{split} {language}=split: train has too few different examples ({size}) to split")
    sets.origin[f"{split} {language}"] = f"{share:g} of train, by hash"


def _check_labels(task: Task, sets: Sets, split: str, language: str, source: str) -> None:
    examples = sets.of(split)[language]
    known = [example for example in examples if task.labelled(example)]
    if split != "test":
        if not known:
            raise UserError(
                f"--{split} {language}={source}: its labels are withheld (every answer is empty): give a file with labels, "
                f"or --dev {language}=split"
            )
        sets.of(split)[language] = known
    if len(known) < len(examples):
        what = "predicted and not scored" if split == "test" else "left out"
        sets.notes.append(f"{split} {language}: {len(examples) - len(known)} of {len(examples)} have no label: {what}")
