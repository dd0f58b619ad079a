"""The configuration of a study: a grid of models, what each is fine-tuned on, analysed for and compared with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mlinterf_ds.config import Section
from mlinterf_ds.sections import LANGUAGE_PATTERN, Languages, Seeds, TrackingConfig, Variant, comma_list

Language = Annotated[str, Field(pattern=LANGUAGE_PATTERN)]
TaskName = Literal["ner", "pos", "qa", "nli"]
Variants = Annotated[list[Variant], BeforeValidator(comma_list)]
SYNTHETIC = "synthetic"


class CorpusSection(Section):
    """The text of every model: one corpus, so that all share a vocabulary and their perplexities compare."""

    folder: str = Field(SYNTHETIC, description="folder made by tools/prepare_corpus.py; or 'synthetic', made on demand")
    text: dict[Language, str] = Field(
        {}, description="LANG = FILE: prepare the corpus from these into the study's folder"
    )
    sentences: int = Field(4000, ge=200, description="sentences a language of the synthetic corpus")
    vocabulary: int = Field(2000, ge=50, description="pieces of a vocabulary learnt here")


class SetSection(Section):
    """Languages that one model of each variant is trained on. The first is the source of zero-shot transfer."""

    name: str = Field("", pattern=r"^[a-z0-9][a-z0-9_.-]*$", description="names the set in jobs and tables")
    kind: Literal["pair", "low", "triple", "many"] = Field(
        "pair",
        description="pair: tables 2, 3, 6, 7; low: a pair with a subsampled language (table 5); triple: a pair and a "
        "third language (table 4); many: the row that the paper calls XLM",
    )
    languages: Languages = Field([], description="comma-separated codes")
    limits: dict[Language, Annotated[int, Field(ge=1)]] = Field({}, description="training sentences kept of a language")
    variants: Variants | None = Field(None, description="default: the study's (joint for low, triple and many)")
    settings: list[str] = Field([], description="further settings of pretraining, such as a larger model.width")
    distance: float | None = Field(None, ge=0, description="between the first two; default: planted or measured")

    @model_validator(mode="after")
    def _consistent(self) -> SetSection:
        wanted = {"pair": 2, "low": 2, "triple": 3}.get(self.kind)
        if len(set(self.languages)) < 2 or len(set(self.languages)) != len(self.languages):
            raise ValueError(f"sets: {self.name!r} has languages {self.languages}: name two or more, each once")
        if wanted and len(self.languages) != wanted:
            raise ValueError(
                f"sets: {self.name!r} is of kind {self.kind}: it takes {wanted} languages, not {len(self.languages)}"
            )
        if (self.kind == "low") != bool(self.limits) or not self.limits.keys() <= set(self.languages[1:]):
            raise ValueError(
                f"sets: {self.name!r}: a set of kind low, and no other, has limits, on languages after the first"
            )
        return self


class TaskSection(Section):
    """A downstream task: what is fine-tuned, and how."""

    task: TaskName = Field("ner", description="which")
    recipes: list[str] = Field([], description="fine-tuning recipes")
    settings: list[str] = Field([], description="further settings of fine-tuning")
    within: bool = Field(True, description="also fine-tune on each target language (the paper does not for nli)")
    train: dict[Language, str] = Field({}, description="LANG = FILE; default: synthetic")
    dev: dict[Language, str] = Field({}, description="LANG = FILE or split; default: synthetic")
    test: dict[Language, str] = Field({}, description="LANG = FILE or split; default: synthetic")


class AnalysisSection(Section):
    """An analysis of trained models (`launch/analyze.py`)."""

    analysis: Literal["conflict", "prune", "interference"] = Field(
        "conflict", description="which; interference compares all monolingual models with all joint ones, once"
    )
    settings: list[str] = Field([], description="further settings of the analysis")
    variants: Variants = Field(["joint"], description="of which models of the pair sets")


class ControlsSection(Section):
    """What a gain of the meta step is compared with, beside the plain variant."""

    direct: bool = Field(False, description="each meta_* model again without the second-order term")
    compute: float | None = Field(
        None, gt=1, description="the plain variant of each meta_* model again, with so many times the steps"
    )
    freeze: list[TaskName] = Field(
        [], description="tasks fine-tuned again with the language modules frozen, for variants that have some"
    )


class StudyConfig(Section):
    """Everything a study depends on."""

    name: str = Field("study", pattern=r"^[A-Za-z0-9][\w.-]*$", description="names the study in MLflow and its folder")
    output: str | None = Field(None, description="folder of jobs, tables and report; default runs/<name>")
    seeds: Seeds = Field([0], description="of pretraining and fine-tuning together: paired over variants")
    variants: Variants = Field(
        ["joint", "ffn", "attn", "adpt", "share_adpt", "meta_adpt"], description="of the pair sets"
    )
    mono: bool = Field(True, description="also a monolingual model of each language of a pair or low set")
    recipes: list[str] = Field(["tiny"], description="pretraining recipes of all models")
    settings: list[str] = Field([], description="further settings of pretraining")
    sets: list[SetSection] = Field([], description="[[sets]] of languages")
    tasks: list[TaskSection] = Field([], description="[[tasks]] every model is fine-tuned on")
    analyses: list[AnalysisSection] = Field([], description="[[analyses]] of the pair sets' models")
    ranks: int = Field(1, ge=1, description="processes of a job")
    parallel: int | None = Field(None, ge=1, description="jobs at once; default: cores / ranks")
    margin: float = Field(1.0, gt=0, description="points within which two scores count as the same")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of every interval and verdict")
    departures: list[str] = Field([], description="from the paper's protocol, a sentence each: notes under every table")
    sbatch: list[str] = Field([], description="options of sbatch for --executor slurm, such as --partition=gpu")
    corpus: CorpusSection = CorpusSection()  # type: ignore[call-arg]
    controls: ControlsSection = ControlsSection()  # type: ignore[call-arg]
    tracking: TrackingConfig = TrackingConfig()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if not self.sets:
            raise ValueError("sets is empty: a study needs [[sets]] of languages; see launch/recipes/study_cpu.toml")
        named: dict[str, list[str]] = {"sets": [s.name for s in self.sets], "tasks": [t.task for t in self.tasks]}
        named["analyses"] = [found.analysis for found in self.analyses]
        for what, names in named.items():
            if twice := sorted({name for name in names if list(names).count(name) > 1}):
                raise ValueError(f"{what}: {', '.join(map(repr, twice))} is there twice")
        if sources := {found.languages[0] for found in self.sets} - {self.source}:
            raise ValueError(
                f"sets: all must start with the same source language of transfer, not {self.source} and {', '.join(sources)}"
            )
        kept: dict[str, int] = {}
        for code, count in (limit for found in self.sets for limit in found.limits.items()):
            if kept.setdefault(code, count) != count:
                raise ValueError(
                    f"sets: {code} is limited to {kept[code]} and to {count} sentences, but table 5 has one low-resource "
                    "version of a language: make two studies"
                )
        if "mono" in self.variants:
            raise ValueError("variants: leave mono out: mono=true adds the monolingual models")
        return self

    @property
    def source(self) -> str:
        """The language of zero-shot transfer's training data (the paper's English)."""
        return self.sets[0].languages[0]

    @property
    def languages(self) -> list[str]:
        """All of the study, in order of appearance."""
        return list(dict.fromkeys(language for found in self.sets for language in found.languages))

    def variants_of(self, found: SetSection) -> list[Any]:
        """The variants a set is trained in."""
        return found.variants or (self.variants if found.kind == "pair" else ["joint"])
