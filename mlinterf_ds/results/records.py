"""The results of a study's finished jobs as plain rows, from which its tables, findings and page are made."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from mlinterf_ds.errors import refusing
from mlinterf_ds.files import write_json
from mlinterf_ds.results import paper
from mlinterf_ds.results.runs import FineTunedRun, early_loss, finished_summary, read_losses


@dataclass(frozen=True)
class AnalysedModel:
    """The fields by which every row names its model."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    set: str
    languages: list[str]
    variant: str
    seed: int


@dataclass(frozen=True)
class StudyModel(AnalysedModel):
    """The further fields by which a row names one of the study's own models."""

    kind: str  # pair, low, triple, many, null, mono
    control: str  # "", direct, held_out, compute, batch, rows, text, vocabulary, freeze


@dataclass(frozen=True)
class TaskScore(StudyModel):
    """A task's score on one language by one pretrained model, in percent: the mean over its fine-tunings."""

    task: str
    metric: str
    train: str  # the language fine-tuned on
    language: str  # the language tested on
    score: float
    majority: float  # what always guessing the most frequent class scores
    others: dict[str, float] = field(default_factory=dict)  # further metrics
    lexical: float | None = None  # what each word's commonest label in the training data scores; None: no such baseline
    counts: list[str] = field(default_factory=list)  # files of (right, predicted, gold), one a fine-tuning

    @property
    def within(self) -> bool:
        return self.train == self.language


@dataclass(frozen=True)
class TrainedModel(StudyModel):
    """A pretrained model."""

    steps: int
    tokens: int  # tokens of text that it was trained on
    seconds: float
    perplexity: dict[str, float]
    bits_per_character: dict[str, float]
    history: dict[str, list[tuple[int, float]]]  # language -> (step, validation perplexity)
    unigram: dict[str, float] = field(default_factory=dict)  # language -> perplexity of its unigrams
    early_loss: float | None = None  # see `runs.early_loss`; in nats
    folder: str = ""

    def curve(self, language: str) -> list[tuple[int, float]]:
        """The finite perplexities after step 0; beside an untrained model's all others would look alike."""
        return [(step, value) for step, value in self.history.get(language, []) if step and math.isfinite(value)]


@dataclass(frozen=True)
class AnalysisSummary(AnalysedModel):
    """The results of an analysis of a model, or of all models together."""

    analysis: str
    facts: dict[str, Any]
    figures: list[str] = field(default_factory=list)  # PNG files


@dataclass
class Records:
    """All rows of a study."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    scores: list[TaskScore] = field(default_factory=list)
    models: list[TrainedModel] = field(default_factory=list)
    analyses: list[AnalysisSummary] = field(default_factory=list)
    status: list[dict[str, Any]] = field(default_factory=list)  # of each job: name, kind, state, reason, seconds
    distances: dict[str, float] = field(default_factory=dict)  # set -> distance of its first two languages
    distance: str = ""  # how these were measured
    second_distances: dict[str, float] = field(default_factory=dict)  # the same by the pieces that the texts share
    departures: list[str] = field(default_factory=list)  # from the paper's protocol: notes under every table
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)  # language -> sentences, tokens of train
    source: str = ""  # the language that zero-shot transfer starts from
    margin: float = 1.0  # points that count as no difference
    confidence: float = 0.95  # confidence of the intervals

    @property
    def of_models(self) -> list[TaskScore | TrainedModel]:
        """Models and scores: the rows that name a set, its kind and languages, a variant, a control and a seed."""
        return [*self.models, *self.scores]

    @property
    def seeds(self) -> list[int]:
        return sorted({row.seed for row in self.of_models})

    @property
    def tasks(self) -> list[str]:
        return sorted({score.task for score in self.scores})

    @property
    def targets(self) -> dict[str, str]:
        """The second language of each pair set -> the set's name: the columns of the tables."""
        pairs = {(row.set, row.languages[1]) for row in self.of_models if row.kind == "pair"}
        order = {name: index for index, name in enumerate(dict.fromkeys(model.set for model in self.models))}
        return {language: name for name, language in sorted(pairs, key=lambda pair: (order.get(pair[0], 0), pair))}

    def groups(self, kind: str) -> list[tuple[str, str, str]]:
        """(task, second language, set) of the sets of a kind that have scores."""
        return sorted({(score.task, score.languages[1], score.set) for score in self.scores if score.kind == kind})

    @property
    def low_resource(self) -> dict[str, str]:
        """Language -> the set of its monolingual model of a part of its text, LANG@SENTENCES."""
        return {row.languages[0]: row.set for row in self.of_models if row.kind == "mono" and "@" in row.set}

    def chosen(self, **wanted: Any) -> list[TaskScore]:
        """The scores with these attributes, one a seed, in the order of the seeds."""
        scores = [s for s in self.scores if all(getattr(s, name) == value for name, value in wanted.items())]
        return sorted({s.seed: s for s in scores}.values(), key=lambda s: s.seed)

    def pick(self, row: str, setting: str, task: str, language: str, group: str = "") -> list[TaskScore]:
        """The scores of a row of the tables on one language, one a seed.

        group: the set of a joint model, which a monolingual one does not need.
        """
        train = language if setting == paper.WITHIN else self.source
        on = {"task": task, "language": language, "train": train}
        single = {"unseen": self.source, "mono-low": self.low_resource.get(language, "")}
        variant, _, control = row.partition("-")
        if row in single or variant == "mono":
            of_single = "" if row in single else control
            return self.chosen(variant="mono", set=single.get(row, language), control=of_single, **on)
        if row == "xlm":
            return self.chosen(kind="many", variant="joint", **on)
        if row in ("low", "triple"):
            return self.chosen(kind=row, set=group, variant="joint", **on)
        return self.chosen(set=group, variant=variant, control=control, **on)

    def models_of(self, group: str, variant: str) -> dict[int, TrainedModel]:
        """Seed -> model of this set and variant, controls left out."""
        return {m.seed: m for m in self.models if (m.set, m.variant, m.control) == (group, variant, "")}

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Records:
        """UserError if the file is not what `save` wrote."""
        with refusing(f"{path}: not a study's records", "; run the study to make them"):
            records: Records = TypeAdapter(cls).validate_json(path.read_bytes(), strict=True)
        return records

    def add(self, kind: str, folder: Path, facts: Mapping[str, Any]) -> None:
        """Adds the rows of a run's folder; nothing if the run has not finished.

        kind: the command, "pretrain", "finetune" or "analyze". facts: what the study's plan says of the run.
        """
        with refusing(f"{folder / 'summary.json'}: damaged", f"; remove {folder} and run the study again"):
            summary = finished_summary(folder)
            if summary is None:
                return
            if kind == "pretrain":
                self.models.append(_trained_model(folder, summary, facts))
            elif kind == "finetune":
                self.scores += _task_scores(folder, summary, facts)
            else:
                self.analyses.append(_analysis(folder, summary, facts))


def _common(facts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: facts[name] for name in ("set", "languages", "variant", "seed", *names)}


def _trained_model(folder: Path, summary: dict[str, Any], facts: Mapping[str, Any]) -> TrainedModel:
    table = folder / "train.csv"
    losses = read_losses(table) if table.is_file() else {}
    return TrainedModel(
        **_common(facts, "kind", "control", "tokens"),
        steps=summary["steps"],
        seconds=summary["seconds"],
        perplexity=summary["valid_perplexity"],
        bits_per_character=summary["valid_bits_per_character"],
        history={code: [(int(step), value) for step, value in points] for code, points in summary["history"].items()},
        unigram=summary.get("unigram_perplexity", {}),
        early_loss=early_loss(losses, facts["warmup"], summary["steps"]),
        folder=str(folder),
    )


def _task_scores(folder: Path, summary: dict[str, Any], facts: Mapping[str, Any]) -> list[TaskScore]:
    run, rows = FineTunedRun.of(str(folder), summary), []
    common = _common(facts, "kind", "control", "task", "train")
    for language, scores in run.scores.items():
        score, counts = statistics.fmean(scores.values()), [run.counts_file(language, seed) for seed in scores]
        row = TaskScore(
            **common, metric=run.metric, language=language, score=score, majority=run.majority[language], lexical=run.lexical.get(language),
            others=run.others[language], counts=[str(path) for path in counts if path.is_file()],
        )  # fmt: skip
        rows.append(row)
    return rows


def _analysis(folder: Path, summary: dict[str, Any], facts: Mapping[str, Any]) -> AnalysisSummary:
    table = folder / "similarity.csv"
    if facts["analysis"] == "prune" and table.is_file():
        with table.open(newline="", encoding="utf-8") as file:
            summary = summary | {"layers": list(csv.DictReader(file))}
    figures = [str(path) for path in sorted(folder.glob("*.png"))]
    return AnalysisSummary(**_common(facts), analysis=facts["analysis"], facts=summary, figures=figures)
