"""The train, dev and test sets of a fine-tuning, from options `LANG=FILE`, `LANG=synthetic` and `LANG=split`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.errors import UserError
from mlinterf_ds.files import sha256
from mlinterf_ds.sections import LANGUAGE_PATTERN
from mlinterf_ds.tasks.base import Task

SPLITS = ("train", "dev", "test")
FORMS = {"train": "LANG=FILE or LANG=synthetic"} | dict.fromkeys(SPLITS[1:], "LANG=FILE, LANG=synthetic or LANG=split")
Options = dict[str, dict[str, str]]  # split -> language -> file, 'synthetic' or 'split'
SYNTHETIC_SPLIT = {"train": "train", "dev": "valid", "test": "test"}
SHARE = 0.1  # the share of train that LANG=split takes
NAMED = 10  # how many questions with unusable answers a note names
SEED = 0  # fixed: synthetic examples and splits are the same for every seed of a fine-tuning


@dataclass
class Sets:
    """The examples of a fine-tuning, their origin, and notes for the report."""

    examples: dict[str, dict[str, list[Any]]]  # split -> language -> examples
    origin: dict[str, str] = field(default_factory=dict)  # key "train en": file name and digest
    notes: list[str] = field(default_factory=list)


def parse(options: Sequence[str], split: str) -> dict[str, str]:
    """{"en": "en/train.tsv"} of the options ["en=en/train.tsv"]. UserError if a language is malformed or given twice."""
    sources: dict[str, str] = {}
    for option in options:
        language, equals, source = option.partition("=")
        if not equals or not source or not re.fullmatch(LANGUAGE_PATTERN, language):
            lower = re.fullmatch(LANGUAGE_PATTERN, language.lower()) and language != language.lower()
            hint = f"; codes are lower-case: {language.lower()}" if lower else ""
            raise UserError(
                f"--{split} {option}: expected {FORMS.get(split, 'LANG=FILE')}, such as en={split}.tsv{hint}"
            )
        if language in sources:
            raise UserError(f"--{split} {option}: {language} is given twice; put its examples in one file")
        sources[language] = source
    if not sources:
        raise UserError(f"--{split} LANG=FILE is missing: name at least one language's {split} set")
    return sources


def load(task: Task, options: Options, *, synthetic: dict[str, int], limit: int | None = None) -> Sets:
    """Reads or makes every set. UserError names a mistake in a file, or a set without labels.

    synthetic: how many examples of each split; limit: the most examples kept of a set, see `_at_random`.
    """
    sets = Sets({split: {} for split in SPLITS})
    for split in SPLITS:
        for language, source in options[split].items():
            if source == "synthetic":
                examples = task.synthetic(language, synthetic[split], SEED, SYNTHETIC_SPLIT[split])
                sets.origin[f"{split} {language}"] = f"synthetic, {synthetic[split]} examples"
            elif source == "-":
                raise UserError(f"--{split} {language}=-: fine-tuning reads its sets more than once: give a file")
            elif source != "split":
                examples = task.read(Path(source), language)
                sets.origin[f"{split} {language}"] = f"{Path(source).name}, sha256 {sha256(Path(source))}"
            elif split == "train":
                raise UserError(
                    f"--train {language}=split: only --dev and --test can take a share of train: give a file"
                )
            else:
                continue
            sets.examples[split][language] = kept = _at_random(examples, limit)
            if len(kept) < len(examples):
                sets.notes.append(
                    f"{split} {language}: {len(kept)} of {len(examples)} examples are read, drawn at random"
                )
    if unused := sorted(task.label_map.keys() - task.mapped if task.label_map else ()):
        raise UserError(
            f"finetune.labels renames {', '.join(unused)}, which no file has: leave it out or spell it right"
        )
    sizes = {
        code: len({task.group(example) for example in examples}) for code, examples in sets.examples["train"].items()
    }
    for split in ("test", "dev"):
        for language, source in options[split].items():
            if source == "split":
                _split(task, sets, split, language, sizes.get(language, 0))
    for language in options["test"]:
        dev, test = (sets.origin.get(f"{split} {language}", "") for split in ("dev", "test"))
        if dev == test and "sha256" in test:
            sets.notes.append(f"{language}: dev and test are the same file: the test scores also chose the epoch")
    for split in SPLITS:
        for language in options[split]:
            _check_labels(task, sets, split, language, options[split][language])
    return sets


def _at_random(examples: list[Any], limit: int | None) -> list[Any]:
    """Returns `limit` of the examples, always the same ones, in their order; a larger limit keeps these too.

    The first of a file would not do: many treebanks and benchmarks are ordered by source.
    """
    if limit is None or limit >= len(examples):
        return examples
    kept = np.random.default_rng(SEED).permutation(len(examples))[:limit]
    return [examples[index] for index in sorted(kept)]


def _split(task: Task, sets: Sets, split: str, language: str, size: int) -> None:
    """Moves a share of a language's `size` groups of training examples to dev or test, always the same ones (by hash)."""
    train = sets.examples["train"]
    if language not in train:
        raise UserError(f"--{split} {language}=split takes a share of train: give --train {language}=FILE too")
    examples = train[language]

    def digest(group: str) -> bytes:
        return hashlib.blake2b(f"{SEED} {split} {group}".encode(), digest_size=8).digest()

    groups = sorted({task.group(example) for example in examples}, key=digest)
    taken = set(groups[: max(1, round(SHARE * size))])
    sets.examples[split][language] = [example for example in examples if task.group(example) in taken]
    train[language] = [example for example in examples if task.group(example) not in taken]
    if not train[language]:
        raise UserError(f"--{split} {language}=split: train has too few different examples ({size}) to split")
    sets.origin[f"{split} {language}"] = f"{SHARE:g} of train, by hash"


def _check_labels(task: Task, sets: Sets, split: str, language: str, source: str) -> None:
    """Leaves examples without labels out of train and dev, and notes how many there are."""
    examples = sets.examples[split][language]
    labelled = [example for example in examples if task.labelled(example)]
    unfit = [reason for example in examples if (reason := task.unfit(example))]
    use = "they are predicted and not scored" if split == "test" else "they are left out"
    if unfit and task.unfound_answers == "error":
        raise UserError(
            f"--{split} {language}={source}: question {unfit[0][0]!r}: {unfit[0][1]}; {len(unfit)} of {len(examples)} "
            "questions cannot be used: finetune.unfound_answers=skip leaves them out"
        )
    if unfit:
        names = ", ".join(name for name, _ in unfit[:NAMED]) + (", ..." if len(unfit) > NAMED else "")
        sets.notes.append(
            f"{split} {language}: {len(unfit)} of {len(examples)} questions cannot be used: {use} ({names}; "
            f"the first: {unfit[0][1]})"
        )
    if split != "test":
        if not labelled:
            raise UserError(
                f"--{split} {language}={source}: its labels are withheld (every answer is empty) or cannot be used"
                + (f" ({unfit[0][1]})" if unfit else "")
                + f": give a file with labels, or --dev {language}=split"
            )
        sets.examples[split][language] = labelled
    if missing := len(examples) - len(labelled) - len(unfit):
        sets.notes.append(f"{split} {language}: {missing} of {len(examples)} examples have no label: {use}")
