"""Everything that an analysis depends on, as configuration keys."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from mlinterf_ds.config import ADDRESS, Section
from mlinterf_ds.sections import (
    EACH_ONCE,
    ConflictSection,
    Languages,
    ParallelConfig,
    PrecisionSection,
    Seeds,
    TrackingConfig,
    comma_list,
)

Names = Annotated[list[str], BeforeValidator(comma_list)]
Groups = Annotated[
    list[Literal["heads", "neurons", "rows"]], BeforeValidator(comma_list), Field(min_length=1), EACH_ONCE
]
NEEDS_CHECKPOINT = ("conflict", "prune")


class ConflictAnalysis(ConflictSection):
    """Gradient conflict on a checkpoint."""

    seed: int = Field(0, ge=0, description="seed of the batches and of the projection")
    runs: Names = Field([], description="instead: draw figure 3 from conflict.csv of these runs' output folders")


class PruneSection(Section):
    """Language-specific parameters: masks learned by Eq. 1 of the paper on the frozen model, a set for each language."""

    groups: Groups = Field(
        ["heads", "neurons"],
        description="what is masked, several: attention heads, feed-forward neurons, rows of the layers' matrices",
    )
    penalty: float = Field(
        0.5, ge=0, description="lambda of Eq. 1: what all gated parameters cost together, in nats of the loss"
    )
    steps: int = Field(400, ge=1, description="steps of learning a language's masks")
    lr: float = Field(0.1, gt=0, description="Adam's rate for the masks, falling linearly to 0")
    rows: int = Field(32, ge=1, description="sequences of a step, over all ranks; each has gates of its own")
    micro_batch: int | None = Field(None, ge=1, description="rows a rank handles at once; default: all its rows")
    seeds: Seeds = Field(
        [0, 1], description="masks are learned once for each (text and gates drawn anew): the within-language control"
    )
    sequences: int = Field(256, ge=1, description="rows of the validation split on which pruned models are scored")


class InterferenceSection(Section):
    """Mono against joint models, and the distance of the languages."""

    mono: Names = Field(
        [], description="output folders of runs on one language: FOLDER or LANG=FOLDER, comma-separated"
    )
    joint: Names = Field(
        [], description="output folders of runs on several languages; train.seed pairs them with mono's"
    )
    larger: Names = Field([], description="output folders of larger models, shown beside (figure 1)")
    tasks: Names = Field([], description="output folders of fine-tunings of these models")
    split: Literal["valid", "test"] = Field("test", description="held-out text that is scored")
    rows: int | None = Field(None, ge=1, description="rows of it a language; default: all")
    typology: str | None = Field(None, description="CSV or TSV of languages' features: a third distance")


class AnalyzeConfig(Section):
    """Everything an analysis depends on."""

    name: str = Field(
        "analyze", min_length=1, json_schema_extra=ADDRESS, description="names the run in the default output folder"
    )
    checkpoint: str = Field(
        "",
        json_schema_extra=ADDRESS,
        description="pretraining run's output folder (its best checkpoint) or a checkpoint",
    )
    analysis: Literal["conflict", "prune", "interference"] = Field("conflict", description="what is measured")
    output: str | None = Field(
        None, json_schema_extra=ADDRESS, description="folder of figures, CSV and summary; default runs/<name>-<time>"
    )
    corpus: str | None = Field(
        None, json_schema_extra=ADDRESS, description="prepared corpus; default: the one the checkpoint was trained on"
    )
    languages: Languages | None = Field(None, description="comma-separated codes; default: the checkpoint's")
    conflict: ConflictAnalysis = ConflictAnalysis()  # type: ignore[call-arg]
    prune: PruneSection = PruneSection()  # type: ignore[call-arg]
    interference: InterferenceSection = InterferenceSection()  # type: ignore[call-arg]
    train: PrecisionSection = PrecisionSection()  # type: ignore[call-arg]
    parallel: ParallelConfig = ParallelConfig()  # type: ignore[call-arg]
    tracking: TrackingConfig = Field(TrackingConfig(), json_schema_extra=ADDRESS)  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _consistent(self) -> AnalyzeConfig:
        drawn_only = self.analysis == "conflict" and self.conflict.runs
        if self.analysis in NEEDS_CHECKPOINT and not self.checkpoint and not drawn_only:
            raise ValueError(
                f"checkpoint is not set: analysis={self.analysis} measures a pretrained model, "
                "--set checkpoint=runs/... names it"
            )
        if self.languages is not None and not self.languages:
            raise ValueError("languages is empty: name at least one, or leave it out for the checkpoint's")
        return self
