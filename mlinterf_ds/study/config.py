"""The configuration of a study: its grid of models, and their fine-tunings, analyses and controls."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from mlinterf_ds.config import Section, key
from mlinterf_ds.sections import LANGUAGE_PATTERN, Languages, Seeds, TrackingConfig, Variant, comma_list
from mlinterf_ds.tasks import TaskName

Language = Annotated[str, Field(pattern=LANGUAGE_PATTERN)]
Variants = Annotated[list[Variant], BeforeValidator(comma_list)]
SYNTHETIC = "synthetic"


class CorpusSection(Section):
    """The text of every model: one corpus, so that all models share a vocabulary and their perplexities can be compared."""

    folder: str = key(SYNTHETIC, "folder written by tools/prepare_corpus.py; or 'synthetic', which the study prepares")
    text: dict[Language, str] = key(
        {}, "LANG = FILE of text, from which the study prepares the corpus in its own folder"
    )
    sentences: int = key(4000, "sentences of each synthetic language", ge=200)
    vocabulary: int = key(2000, "pieces of the vocabulary, if the study prepares the corpus", ge=50)


class SetSection(Section):
    """A set of languages, on which one model of each variant is trained. The first is the source of zero-shot transfer."""

    name: str = key("", "names the set in jobs and tables", pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    kind: Literal["pair", "low", "triple", "many", "null"] = key(
        "pair",
        "pair: tables 2, 3, 6, 7; low: a pair with a subsampled language (table 5); triple: a pair and a "
        "third language (table 4); many: the row that the paper calls XLM; null: a language with a new code, to which half "
        "of its text goes (a control in which there is no interference to find)",
    )
    languages: Languages = key([], "comma-separated codes")
    limits: dict[Language, Annotated[int, Field(ge=1)]] = key({}, "LANG = training sentences that are kept of it")
    variants: Variants | None = key(None, "default: the study's for pair, joint for low, triple and many")
    settings: list[str] = key([], "further settings of pretraining, such as a larger model.width")
    distance: float | None = key(None, "distance of the first two languages; default: planted or measured", ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> SetSection:
        wanted = {"pair": 2, "low": 2, "triple": 3, "null": 2}.get(self.kind)
        if len(self.languages) < 2:
            raise ValueError(f"sets: {self.name!r} has languages {self.languages}: name two or more")
        if wanted and len(self.languages) != wanted:
            raise ValueError(
                f"sets: {self.name!r} is of kind {self.kind}: it takes {wanted} languages, not {len(self.languages)}"
            )
        if (self.kind == "low") != bool(self.limits) or not self.limits.keys() <= set(self.languages[1:]):
            raise ValueError(
                f"sets: {self.name!r}: limits belong to sets of kind low, which need them, on languages after the first"
            )
        return self


class TaskSection(Section):
    """A downstream task, on which every model is fine-tuned."""

    task: TaskName = key("ner", "name of the task")
    recipes: list[str] = key([], "fine-tuning recipes")
    settings: list[str] = key([], "further settings of fine-tuning")
    repeats: int = key(1, "fine-tunings of each model, with seeds of their own, whose scores are averaged", ge=1)
    within: bool = key(True, "also fine-tune on each target language (the paper does not for nli)")
    limits: dict[Language, Annotated[int, Field(ge=1)]] = key(
        {},
        "LANG = finetune.limit of the fine-tunings on this language, where it needs more examples, or fewer, than the others",
    )
    train: dict[Language, str] = key({}, "LANG = FILE of training examples; default: synthetic")
    dev: dict[Language, str] = key(
        {}, "LANG = FILE of examples for model selection, or split: a share of train; default: synthetic"
    )
    test: dict[Language, str] = key({}, "LANG = FILE of test examples, or split: a share of train; default: synthetic")


class AnalysisSection(Section):
    """An analysis of the pretrained models (`launch/analyze.py`)."""

    analysis: Literal["conflict", "prune", "probe", "interference"] = key(
        "conflict", "name of the analysis; interference runs once, on all monolingual and joint models"
    )
    settings: list[str] = key([], "further settings of the analysis")
    variants: Variants = key(["joint"], "variants of the pair sets that are analysed")


class ControlsSection(Section):
    """Control models and fine-tunings, which a gain of the meta step or a loss by sharing is compared with."""

    direct: bool = key(False, "also train each meta_* model without the second-order term")
    compute: float | None = key(
        None, "also train the plain variant of each meta_* model, with this many times the steps", gt=1
    )
    batch: bool = key(
        False,
        "also train the plain variant of each meta_* model, in as many steps, with as many rows a step as its meta steps read, all as "
        "training draws them",
    )
    rows: bool = key(
        False,
        "also train the plain variant of each meta_* model, in as many steps, on the very rows that its meta steps read, those of "
        "the validation loss included (data.meta_rows)",
    )
    held_out: bool = key(
        False,
        "also train each meta_* model with validation rows of a split that no model trains on (meta.text=held_out), about 2% of each "
        "language; the study prepares its corpora with this split",
    )
    text: bool = key(
        False,
        "also train each monolingual model with half the steps: as much text of its language as a pair's model reads where the languages "
        "are equally large (else it reads more of the larger one)",
    )
    vocabulary: bool = key(
        False,
        "also train each monolingual model with a vocabulary of its language alone, of as many pieces as the study's",
    )
    freeze: list[TaskName] = key(
        [], "tasks on which variants with language modules are also fine-tuned with these frozen"
    )


class StudyConfig(Section):
    """Everything that a study depends on."""

    name: str = key("study", "name of the study in MLflow and of its folder", pattern=r"^[A-Za-z0-9][\w.-]*$")
    output: str | None = key(None, "folder of the jobs, tables and report; default runs/<name>")
    seeds: Seeds = key([0], "seeds of both pretraining and fine-tuning; the variants are compared seed by seed")
    variants: Variants = key(["joint", "ffn", "attn", "adpt", "share_adpt", "meta_adpt"], "variants of the pair sets")
    mono: bool = key(True, "also train a monolingual model of each language of a pair or low set")
    recipes: list[str] = key(["tiny"], "pretraining recipes of all models")
    settings: list[str] = key([], "further settings of pretraining")
    sets: list[SetSection] = key([], "[[sets]] of languages")
    tasks: list[TaskSection] = key([], "[[tasks]] that every model is fine-tuned on")
    analyses: list[AnalysisSection] = key([], "[[analyses]] of the models of the pair sets")
    ranks: int = key(1, "processes of a job", ge=1)
    parallel: int | None = key(
        None, "jobs that run at once; default: accelerators / ranks, on a CPU cores / ranks", ge=1
    )
    margin: float = key(1.0, "points within which two scores count as the same", gt=0)
    confidence: float = key(0.95, "confidence of every interval and verdict", gt=0.5, lt=1)
    departures: list[str] = key(
        [], "departures from the paper's protocol, a sentence each; they become notes under every table"
    )
    sbatch: list[str] = key([], "options of sbatch for --executor slurm, such as --partition=gpu")
    pilot: dict[str, float] = key(
        {},
        "CLAIM = standard deviation of its effect over the seeds of an earlier study, for --dry-run to tell which effect could be detected",
    )
    corpus: CorpusSection = CorpusSection()
    controls: ControlsSection = ControlsSection()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if not self.sets:
            raise ValueError("sets is empty: a study needs [[sets]] of languages; see launch/recipes/study_cpu.toml")
        named: dict[str, list[str]] = {"sets": [s.name for s in self.sets], "tasks": [t.task for t in self.tasks]}
        for section, names in (named | {"analyses": [a.analysis for a in self.analyses]}).items():
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{section}: {', '.join(map(repr, twice))} is there twice")
        if sources := {group.languages[0] for group in self.sets if group.kind != "null"} - {self.source}:
            raise ValueError(
                f"sets: all must start with the same source language of transfer, but start with {self.source} and "
                f"{', '.join(sources)}"
            )
        targets = [group.languages[1] for group in self.sets if group.kind == "pair"]
        if twice := sorted({code for code in targets if targets.count(code) > 1}):
            raise ValueError(
                f"sets: two pairs of {self.source} and {twice[0]}, of which the tables could show one: make two studies"
            )
        halves = [group.languages[1] for group in self.sets if group.kind == "null"]
        if clash := [half for half in halves if half in self.languages or halves.count(half) > 1]:
            raise ValueError(
                f"sets: {clash[0]} is half of a language in a set of kind null, and named by another set: give the half a code of "
                "its own"
            )
        for task in self.tasks:
            if unknown := sorted(task.limits.keys() - set(self.languages)):
                raise ValueError(f"tasks: {task.task}: limits: {', '.join(unknown)}: no language of the sets")
        kept: dict[str, int] = {}
        for code, count in (limit for group in self.sets for limit in group.limits.items()):
            if kept.setdefault(code, count) != count:
                raise ValueError(
                    f"sets: {code} is limited to {kept[code]} and to {count} sentences, but table 5 shows one low-resource "
                    "version of a language: make two studies"
                )
        if "mono" in self.variants:
            raise ValueError("variants: leave mono out: mono=true adds the monolingual models")
        return self

    @property
    def source(self) -> str:
        """The source of zero-shot transfer, which is English in the paper; in null controls nothing is transferred."""
        return next((group for group in self.sets if group.kind != "null"), self.sets[0]).languages[0]

    @property
    def languages(self) -> list[str]:
        """All languages of the study, in order of appearance; the half of a null control is none."""
        named = (code for group in self.sets for code in group.languages[: 1 if group.kind == "null" else None])
        return list(dict.fromkeys(named))
