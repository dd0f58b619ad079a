"""What a study's finished jobs found, as plain rows: all that tables, findings and the page are made of."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from mlinterf_ds.errors import refusing
from mlinterf_ds.files import write_json
from mlinterf_ds.results.losses import read_losses
from mlinterf_ds.study.jobs import Job, Unit

KNOWN_ONLY = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Score:
    """A task's score on one language by one model of one seed, in percent."""

    __pydantic_config__ = KNOWN_ONLY
    set: str
    kind: str  # pair, low, triple, many, mono
    languages: list[str]
    variant: str
    control: str  # "", direct, compute, freeze
    seed: int
    task: str
    metric: str
    train: str  # the language fine-tuned on
    language: str  # the language tested on
    score: float
    majority: float  # what a guess that looks at nothing scores
    others: dict[str, float] = field(default_factory=dict)  # further metrics
    counts: str = ""  # file of (right, predicted, gold) per example

    @property
    def within(self) -> bool:
        return self.train == self.language


@dataclass(frozen=True)
class Trained:
    """A pretrained model."""

    __pydantic_config__ = KNOWN_ONLY
    set: str
    kind: str
    languages: list[str]
    variant: str
    control: str
    seed: int
    steps: int
    tokens: int  # of text trained on
    seconds: float
    perplexity: dict[str, float]
    bits_per_character: dict[str, float]
    history: dict[str, list[tuple[int, float]]]  # validation perplexity by language
    unigram: dict[str, float] = field(default_factory=dict)
    early_loss: float | None = None  # mean training loss from the end of the warm-up to the middle of the run, in nats
    folder: str = ""


@dataclass(frozen=True)
class Analysis:
    """What an analysis says of a model."""

    __pydantic_config__ = KNOWN_ONLY
    set: str
    languages: list[str]
    variant: str
    seed: int
    analysis: str
    facts: dict[str, Any]
    figures: list[str] = field(default_factory=list)  # PNG files


@dataclass
class Records:
    """Of a whole study. `status` has a row a job: name, kind, state, reason, seconds."""

    __pydantic_config__ = KNOWN_ONLY
    scores: list[Score] = field(default_factory=list)
    models: list[Trained] = field(default_factory=list)
    analyses: list[Analysis] = field(default_factory=list)
    status: list[dict[str, Any]] = field(default_factory=list)
    distances: dict[str, float] = field(default_factory=dict)  # of a set's first two languages
    distance: str = ""  # what these are
    departures: list[str] = field(default_factory=list)  # from the paper's protocol: notes under every table
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)  # language -> sentences, tokens of train
    source: str = ""
    margin: float = 1.0
    confidence: float = 0.95

    @property
    def seeds(self) -> list[int]:
        return sorted({model.seed for model in self.models} | {score.seed for score in self.scores})

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Records:
        """UserError if the file is not what `save` wrote."""
        with refusing(f"{path}: not a study's records", "; run the study to make them"):
            found: Records = TypeAdapter(cls).validate_json(path.read_bytes(), strict=True)
        return found


def collect(jobs: Iterable[Job], output: Path, records: Records) -> Records:
    """Add what the finished units of these jobs found; units without a whole summary.json are left out."""
    for job in jobs:
        for unit in job.units:
            folder = output / job.folder / unit.name
            if not (folder / "summary.json").is_file():
                continue
            with refusing(f"{folder / 'summary.json'}: damaged", f"; remove {folder} and run the study again"):
                summary = json.loads((folder / "summary.json").read_bytes())
                if not summary.get("finished", True):
                    continue
                if job.kind == "pretrain":
                    records.models.append(_trained(unit, summary, folder))
                elif job.kind == "finetune":
                    records.scores += _scores(unit, summary, folder)
                else:
                    records.analyses.append(_analysis(unit, summary, folder))
    return records


def _common(unit: Unit, *names: str) -> dict[str, Any]:
    return {name: unit.facts[name] for name in ("set", "languages", "variant", "seed", *names)}


def _trained(unit: Unit, summary: dict[str, Any], folder: Path) -> Trained:
    return Trained(
        **_common(unit, "kind", "control", "tokens"),
        steps=summary["steps"],
        seconds=summary["seconds"],
        perplexity=summary["valid_perplexity"],
        bits_per_character=summary["valid_bits_per_character"],
        history={code: [(int(step), value) for step, value in points] for code, points in summary["history"].items()},
        unigram=summary.get("unigram_perplexity", {}),
        early_loss=_early_loss(folder / "train.csv", unit.facts["warmup"], summary["steps"]),
        folder=str(folder),
    )


def _early_loss(path: Path, warmup: int, steps: int) -> float | None:
    """The paper's figure 4c in one number: every language weighs the same."""
    if not path.is_file():
        return None
    losses = [[loss for step, loss in points if warmup < step <= steps / 2] for points in read_losses(path).values()]
    means = [float(np.mean(points)) for points in losses if points]
    return float(np.mean(means)) if means else None


def _scores(unit: Unit, summary: dict[str, Any], folder: Path) -> list[Score]:
    found = []
    for language, values in summary["per_seed"].items():
        others = {
            name: facts["mean"] for name, facts in summary["metrics"][language].items() if name != summary["metric"]
        }
        counts = folder / "counts" / f"seed{unit.facts['seed']}" / f"{language}.csv"
        found.append(
            Score(
                **_common(unit, "kind", "control", "task", "train"),
                metric=summary["metric"],
                language=language,
                score=values[0],
                majority=summary["baseline"][language],
                others=others,
                counts=str(counts) if counts.is_file() else "",
            )
        )
    return found


def _analysis(unit: Unit, summary: dict[str, Any], folder: Path) -> Analysis:
    facts = dict(summary)
    if (folder / "similarity.csv").is_file() and unit.facts["analysis"] == "prune":
        with (folder / "similarity.csv").open(newline="", encoding="utf-8") as file:
            facts["layers"] = list(csv.DictReader(file))
    figures = [str(path) for path in sorted(folder.glob("*.png"))]
    return Analysis(**_common(unit), analysis=unit.facts["analysis"], facts=facts, figures=figures)


def read_counts(scores: Sequence[Score]) -> np.ndarray | None:
    """(seeds, examples, 3) counts of (right, predicted, gold) of the same test set; None where one is missing."""
    found = []
    for score in scores:
        if not Path(score.counts).is_file():
            return None
        with refusing(f"{score.counts}: damaged", "; remove its unit's folder and run the study again"):
            table = np.loadtxt(score.counts, delimiter=",", skiprows=1, ndmin=2)
            if table.shape[1] != 3:
                raise ValueError(f"{table.shape[1]} columns, not 3")
        found.append(table)
    return np.stack(found) if found and len({len(table) for table in found}) == 1 else None
