"""Reads run folders: the results and settings that pretraining runs and fine-tunings left in their files.

`launch/analyze.py analysis=interference` and `launch/study.py` read run folders through this module. Nothing here evaluates a
model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pydantic import TypeAdapter

from mlinterf_ds.data.corpus import Corpus, synthetic_folder
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.errors import UserError, refusing, resumption
from mlinterf_ds.files import read_csv, read_json
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.pretrain.report import COLUMNS
from mlinterf_ds.pretrained import Pretrained
from mlinterf_ds.sections import LANGUAGE_PATTERN, is_meta

History = dict[str, list[tuple[int, float]]]  # language -> (step, value), ascending
# Settings that do not shape a model: two runs that differ in these alone compare without a note.
IMMATERIAL = {"data.synthetic_sentences", "data.eval_rows", "meta.check_every"}
IMMATERIAL |= {
    f"train.{key}" for key in ("seed", "max_hours", "save_steps", "keep", "micro_batch", "precision", "epoch_steps")
}


class Setup(NamedTuple):
    """What pretraining runs have in common that differ in their seed alone."""

    languages: tuple[str, ...]  # sorted, so that en-hi is hi-en
    variant: str

    @property
    def joined(self) -> str:
        """The languages joined by hyphens, for example "en-hi"."""
        return "-".join(self.languages)

    def partners(self, language: str) -> tuple[str, ...]:
        """The model's other languages."""
        return tuple(code for code in self.languages if code != language)


def finished_summary(folder: Path) -> dict[str, Any] | None:
    """The summary.json of a run; None if there is none, or if the run was stopped before its end."""
    path = folder / "summary.json"
    summary = read_json(path) if path.is_file() else None
    return summary if summary is not None and summary.get("finished", True) else None


def read_losses(path: Path) -> History:
    """The training losses of a train.csv in nats. UserError if the file is missing or no such table."""
    losses: History = {}
    for row in read_csv(path, COLUMNS, "pretraining writes it into the run's output folder"):
        with refusing(f"{path}: not a table of {','.join(COLUMNS)}"):
            losses.setdefault(row["language"], []).append((int(row["step"]), float(row["loss"])))
    return {language: sorted(points) for language, points in losses.items()}


# --- pretraining -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PretrainedRun:
    """A finished pretraining run and its best checkpoint."""

    folder: str
    pretrained: Pretrained

    @classmethod
    def open(cls, name: str) -> PretrainedRun:
        """Opens a run's output folder, given as FOLDER or LANG=FOLDER.

        UserError if the folder is missing, its run has not finished, or the model has other languages than LANG alone.
        """
        language, equals, folder = name.partition("=")
        if not equals or not re.fullmatch(LANGUAGE_PATTERN, language):
            language, folder = "", name
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder; expected the output folder of a pretraining run")
        run = cls(folder, Pretrained.open(folder))
        if language and run.setup.languages != (language,):
            raise UserError(f"{name}: that run's languages are {', '.join(run.setup.languages)}, not {language} alone")
        with refusing(f"{folder}/summary.json: not what a pretraining run writes"):
            summary = finished_summary(Path(folder))
        if summary is None and not Path(folder).name.startswith("step-"):
            raise UserError(f"{folder}: the run has not finished: {resumption(folder)}")
        return run

    @property
    def config(self) -> dict[str, Any]:
        return self.pretrained.saved["config"]

    @property
    def setup(self) -> Setup:
        return Setup(tuple(sorted(self.pretrained.languages)), str(self.config["variant"]))

    @property
    def seed(self) -> int:
        return int(self.config["train"]["seed"])

    @property
    def step(self) -> int:
        """The step of the best checkpoint."""
        return self.pretrained.step

    @cached_property
    def history(self) -> History:
        """Validation perplexity up to the run's last checkpoint."""
        newest = read_json(checkpoint.find(self.folder) / "run.json")
        return {code: [(step, value) for step, value in points] for code, points in newest["history"].items()}

    @cached_property
    def losses(self) -> History:
        """Training losses; empty if the folder has no train.csv."""
        path = Path(self.folder) / "train.csv"
        return read_losses(path) if path.is_file() else {}

    def epochs(self, corpus: Corpus) -> dict[str, float]:
        """How often the best checkpoint had seen the training text of each language."""
        config = RunConfig.model_validate(self.config)
        stream, validation = config.streams(corpus, self.pretrained.languages)
        seen = stream.seen(self.step, validation if config.meta.reuse else None)
        return {code: facts["epochs"] for code, facts in seen.items()}

    def settings_unlike(self, other: PretrainedRun) -> list[str]:
        """The settings that shape a model, beside languages, variant and seed, in which two runs differ, in words.

        Those of the meta step count where both runs take one.
        """
        parts = ["model", "data", "train"]
        parts += ["meta"] * (is_meta(self.config["variant"]) and is_meta(other.config["variant"]))
        ours, theirs = (
            {f"{part}.{key}": value for part in parts for key, value in run.config[part].items()}
            for run in (self, other)
        )
        unlike = [key for key in ours if key not in IMMATERIAL and ours[key] != theirs.get(key)]
        return [f"{key} {ours[key]} against {theirs.get(key)}" for key in unlike]


def early_loss(losses: History, warmup: int, steps: int) -> float | None:
    """The paper's figure 4c in one number: the mean training loss from the end of the warm-up to the middle of the run.

    Every language weighs the same. None without any loss in that span.
    """
    spans = [[loss for step, loss in points if warmup < step <= steps / 2] for points in losses.values()]
    means = [float(np.mean(span)) for span in spans if span]
    return float(np.mean(means)) if means else None


# --- fine-tuning -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FineTunedRun:
    """A finished fine-tuning: one task, trained on some languages of a pretrained model and tested on some."""

    folder: str
    task: str
    metric: str  # the task's main one
    setup: Setup  # the setup of the pretrained model
    checkpoint: str
    seed: int  # the seed of pretraining
    train: tuple[str, ...]  # languages
    tests: dict[str, str]  # tested language -> its test data
    scores: dict[str, dict[int, float]]  # tested language -> fine-tuning seed -> score in percent
    majority: dict[str, float]  # tested language -> what always guessing the most frequent class scores
    lexical: dict[str, float]  # tested language -> what each word's commonest label in training scores, if known
    others: dict[str, dict[str, float]]  # tested language -> further metrics, means over the fine-tuning seeds

    @classmethod
    def open(cls, folder: str) -> FineTunedRun:
        """Reads a fine-tuning's output folder. UserError if it is missing, unfinished or of another command."""
        path = Path(folder) / "summary.json"
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected the output folder of a finished launch/finetune.py")
        with refusing(f"{path}: not the summary of a fine-tuning"):
            summary = finished_summary(Path(folder))
            if summary is None:
                raise UserError(f"{folder}: the fine-tuning has not finished: go on with --set resume=auto")
            return cls.of(folder, summary)

    @classmethod
    def of(cls, folder: str, summary: dict[str, Any]) -> FineTunedRun:
        """From the content of its summary.json; raises one of `errors.MALFORMED` if that is no fine-tuning's."""
        seeds, metric, tested = summary["seeds"], summary["metric"], summary["per_seed"]
        run = cls(
            folder=folder,
            task=summary["task"],
            metric=metric,
            setup=Setup(tuple(sorted(summary["languages"])), summary["variant"]),
            checkpoint=summary["checkpoint"],
            seed=int(summary["pretraining_seed"]),
            train=tuple(summary["examples"]["train"]),
            tests={code: summary["data"][f"test {code}"] for code in tested},
            scores={code: dict(zip(map(int, seeds), scores, strict=True)) for code, scores in tested.items()},
            majority={code: summary["baseline"][code] for code in tested},
            lexical={
                code: floors["lexical"][metric]
                for code, floors in summary.get("baselines", {}).items()
                if code in tested and "lexical" in floors
            },
            others={
                code: {name: facts["mean"] for name, facts in summary["metrics"][code].items() if name != metric}
                for code in tested
            },
        )
        checked: FineTunedRun = TypeAdapter(cls).validate_json(json.dumps(run.__dict__), strict=True)
        return checked

    def counts_file(self, language: str, seed: int) -> Path:
        """Where the run keeps (right, predicted, gold) of each test example."""
        return Path(self.folder) / "counts" / f"seed{seed}" / f"{language}.csv"

    @property
    def score_name(self) -> str:
        """The task and its metric, for example "ner f1"."""
        return f"{self.task} {self.metric}"

    @property
    def within(self) -> list[str]:
        """The tested languages that were trained on."""
        return [code for code in self.scores if code in self.train]


def read_counts(files: Sequence[str | Path]) -> np.ndarray | None:
    """(files, examples, 3) counts of (right, predicted, gold) of one test set; None if a file is missing or sizes differ."""
    paths = [Path(file) for file in files]
    if not all(path.is_file() for path in paths):
        return None
    tables = [_counts_of(path, path.stat().st_mtime_ns) for path in paths]
    return np.stack(tables) if tables and len({len(table) for table in tables}) == 1 else None


@lru_cache(maxsize=1024)  # a study's claims and tables share them
def _counts_of(path: Path, _changed: int) -> np.ndarray:
    with refusing(f"{path}: damaged", "; remove the folder of its fine-tuning and run it again"):
        table = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
        if table.shape[1] != 3:
            raise ValueError(f"{table.shape[1]} columns, not 3")
    return table


# --- several runs ------------------------------------------------------------------------------------------------------
Run = TypeVar("Run", PretrainedRun, FineTunedRun)


def by_setup(runs: Sequence[Run], verb: str = "are") -> dict[Setup, dict[int, Run]]:
    """Setup -> pretraining seed -> run. UserError if two runs have both in common; `verb` says what both do."""
    groups: dict[Setup, dict[int, Run]] = {}
    for run in runs:
        seeds = groups.setdefault(run.setup, {})
        if run.seed in seeds:
            raise UserError(
                f"{run.folder} and {seeds[run.seed].folder}: both {verb} {run.setup.variant} on {run.setup.joined} with "
                f"train.seed={run.seed}; seeds pair the runs: give each once"
            )
        seeds[run.seed] = run
    return groups


def common_corpus(runs: Sequence[PretrainedRun], folder: str | None) -> Corpus:
    """Opens the corpus that all runs were trained on; UserError if they do not share one, row length and mask share included.

    folder: where the corpus is now, if not where the first run says.
    """
    first, data = runs[0], runs[0].config["data"]
    named = folder or first.config["corpus"]
    made = data["synthetic_sentences"], data.get("synthetic_limit")
    corpus = Corpus.open(synthetic_folder(first.pretrained.languages, *made) if named == "synthetic" else named)
    vocabulary = (corpus.folder / "tokenizer.model").read_bytes()
    remedy = (
        "bits per character are compared on the same sentences under the same masks: prepare one corpus with all the "
        "languages (tools/prepare_corpus.py) and train every run on it, mono ones too "
        f"(--set corpus={corpus.folder} --set languages=... --set variant=mono)"
    )
    for run in runs:
        ours, theirs = run.pretrained, first.pretrained
        if (ours.path / "tokenizer.model").read_bytes() != vocabulary:
            raise UserError(f"{run.folder}: its vocabulary is not that of {corpus.folder}; {remedy}")
        if ours.saved["manifest"] != corpus.manifest_hash:
            raise UserError(f"{run.folder}: was not trained on the text of {corpus.folder}; {remedy}")
        for key, why in (
            ("sequence_length", "both models must read the same rows"),
            ("mask", "a model that sees more of a row scores better"),
            ("boundaries", "a model that sees other sentences of the row reads other text"),
        ):
            own, wanted = (saved.saved["config"]["data"][key] for saved in (ours, theirs))
            if own != wanted:
                raise UserError(
                    f"{run.folder}: data.{key} is {own}, but {wanted} in {first.folder}: {why}, so train all runs with one "
                    f"data.{key}"
                )
    return corpus
