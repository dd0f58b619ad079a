"""Pretraining runs as an analysis compares them: what each was, on one text and one vocabulary, by language and seed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlinterf_ds.data.corpus import Corpus, synthetic_folder
from mlinterf_ds.data.stream import TrainStream
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import read_json
from mlinterf_ds.pretrained import Pretrained
from mlinterf_ds.sections import LANGUAGE_PATTERN

Group = tuple[tuple[str, ...], str]  # languages of a model, variant
IGNORED = {"data.synthetic_sentences", "train.seed", "train.max_hours", "train.save_steps", "train.keep"}
IGNORED |= {
    "train.micro_batch",
    "train.precision",
    "train.epoch_steps",
    "data.eval_rows",
}  # decide nothing of the model


@dataclass(frozen=True)
class Run:
    """A finished pretraining run: its best checkpoint, and what it says of itself."""

    place: str
    pretrained: Pretrained

    @classmethod
    def open(cls, place: str) -> Run:
        """From a run's output folder, or LANG=FOLDER. UserError if it is missing, unfinished or of other languages."""
        language, equals, folder = place.partition("=")
        if not equals or not re.fullmatch(LANGUAGE_PATTERN, language):
            language, folder = "", place
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder; expected the output folder of a pretraining run")
        found = cls(folder, Pretrained.open(folder))
        if language and found.languages != (language,):
            raise UserError(f"{place}: that run's languages are {', '.join(found.languages)}, not {language} alone")
        summary = Path(folder) / "summary.json"
        with refusing(f"{summary}: not what a pretraining run writes"):
            finished = summary.is_file() and read_json(summary)["finished"]
        if not Path(folder).name.startswith("step-") and not finished:
            raise UserError(f"{folder}: the run has not finished: go on with --set output={folder} --set resume=auto")
        return found

    @property
    def config(self) -> dict[str, Any]:
        return self.pretrained.saved["config"]

    @property
    def languages(self) -> tuple[str, ...]:
        """Sorted: en-hi is hi-en."""
        return tuple(sorted(self.pretrained.languages))

    @property
    def variant(self) -> str:
        return str(self.config["variant"])

    @property
    def seed(self) -> int:
        return int(self.config["train"]["seed"])

    @property
    def group(self) -> Group:
        return self.languages, self.variant

    @property
    def step(self) -> int:
        """Of the best checkpoint."""
        return int(self.pretrained.saved["updates"]) + int(self.pretrained.saved["skipped"])

    @cached_property
    def history(self) -> dict[str, list[tuple[int, float]]]:
        """language -> (step, validation perplexity), to the run's end."""
        newest = read_json(checkpoint.find(self.place) / "run.json")
        return {code: [(step, value) for step, value in points] for code, points in newest["history"].items()}

    @property
    def corpus_folder(self) -> Path:
        """Where the run's corpus was."""
        if self.config["corpus"] != "synthetic":
            return Path(self.config["corpus"])
        data = self.config["data"]
        return synthetic_folder(self.pretrained.languages, data["synthetic_sentences"], data.get("synthetic_limit"))

    def epochs(self, corpus: Corpus) -> dict[str, float]:
        """How often the checkpoint had seen each language's training text."""
        data, train = self.config["data"], self.config["train"]
        stream = TrainStream(
            corpus,
            self.pretrained.languages,
            rows=train["batch"],
            length=data["sequence_length"],
            seed=train["seed"],
            temperature=data["temperature"],
            mixed=data["mixed"],
            mask_share=data["mask"],
        )
        return {code: facts["epochs"] for code, facts in stream.seen(self.step).items()}

    def settings(self) -> dict[str, Any]:
        """What shaped the model, flat: for the notes on how two runs differ."""
        sections = ("model", "data", "train")
        flat = {f"{section}.{key}": value for section in sections for key, value in self.config[section].items()}
        return {key: value for key, value in flat.items() if key not in IGNORED}


def one_text(runs: Sequence[Run], corpus: str | None) -> Corpus:
    """The corpus that all runs were trained on; UserError if there is no such one, or they read rows of other lengths.

    corpus: where it is now, if not where the first run says.
    """
    first = runs[0]
    found = Corpus.open(corpus or first.corpus_folder)
    vocabulary = (found.folder / "tokenizer.model").read_bytes()
    remedy = (
        "bits per character are compared on the same sentences under the same masks: prepare one corpus with all the "
        "languages (tools/prepare_corpus.py) and train every run on it, mono ones too "
        f"(--set corpus={found.folder} --set languages=... --set variant=mono)"
    )
    for run in runs:
        path = run.pretrained.path
        if (path / "tokenizer.model").read_bytes() != vocabulary:
            raise UserError(f"{run.place}: its vocabulary is not that of {found.folder}; {remedy}")
        if run.pretrained.saved["manifest"] != found.manifest_hash:
            raise UserError(f"{run.place}: was not trained on the text of {found.folder}; {remedy}")
        if run.pretrained.positions != first.pretrained.positions:
            raise UserError(
                f"{run.place}: data.sequence_length is {run.pretrained.positions}, of {first.place} "
                f"{first.pretrained.positions}: the same rows cannot be read by both; train them at one length"
            )
        if run.pretrained.mask_share != first.pretrained.mask_share:
            raise UserError(
                f"{run.place}: data.mask is {run.pretrained.mask_share}, of {first.place} {first.pretrained.mask_share}: "
                "a model that sees more is scored better; train them with one"
            )
    return found


def by_group(runs: Sequence[Run]) -> dict[Group, dict[int, Run]]:
    """Languages and variant -> seed -> run. UserError if two runs differ in nothing but their folder."""
    found: dict[Group, dict[int, Run]] = {}
    for run in runs:
        seeds = found.setdefault(run.group, {})
        if run.seed in seeds:
            raise UserError(
                f"{run.place} and {seeds[run.seed].place}: both are {run.variant} on {'-'.join(run.languages)} with "
                f"train.seed={run.seed}; seeds pair the runs: give each once"
            )
        seeds[run.seed] = run
    return found


def differences(left: Run, right: Run) -> list[str]:
    """In what two runs differ, beside languages, variant and seed."""
    ours, theirs = left.settings(), right.settings()
    return [f"{key} {ours[key]} against {theirs.get(key)}" for key in ours if ours[key] != theirs.get(key)]
