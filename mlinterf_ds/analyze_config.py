"""The configuration of an analysis, read like a pretraining run's (`mlinterf_ds.config`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from mlinterf_ds.config import ConflictSection, Languages, ParallelConfig, Section, TrackingConfig, comma_list
from mlinterf_ds.finetune_config import PrecisionSection

Names = Annotated[list[str], BeforeValidator(comma_list)]
NEEDS_CHECKPOINT = ("conflict", "prune")


class ConflictAnalysis(ConflictSection):
    """Gradient conflict on a checkpoint."""

    seed: int = Field(0, ge=0, description="seed of the batches and of the projection")
    runs: Names = Field([], description="instead: draw figure 3 from conflict.csv of these runs' output folders")


class PruneSection(Section):
    """Language-specific parameters: hard-concrete masks."""


class InterferenceSection(Section):
    """Mono against joint, corpus size, similarity."""


class AnalyzeConfig(Section):
    """Everything an analysis depends on."""

    name: str = Field("analyze", min_length=1, description="names the run in the default output folder")
    checkpoint: str = Field("", description="pretraining run's output folder (its best checkpoint) or a checkpoint")
    analysis: Literal["conflict", "prune", "interference"] = Field("conflict", description="what is measured")
    output: str | None = Field(None, description="folder of figures, CSV and summary; default runs/<name>-<time>")
    corpus: str | None = Field(None, description="prepared corpus; default: the one the checkpoint was trained on")
    languages: Languages | None = Field(None, description="comma-separated codes; default: the checkpoint's")
    conflict: ConflictAnalysis = ConflictAnalysis()  # type: ignore[call-arg]
    prune: PruneSection = PruneSection()
    interference: InterferenceSection = InterferenceSection()
    train: PrecisionSection = PrecisionSection()  # type: ignore[call-arg]
    parallel: ParallelConfig = ParallelConfig()  # type: ignore[call-arg]
    tracking: TrackingConfig = TrackingConfig()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _consistent(self) -> AnalyzeConfig:
        drawn_only = self.analysis == "conflict" and self.conflict.runs
        if self.analysis in NEEDS_CHECKPOINT and not self.checkpoint and not drawn_only:
            raise ValueError(
                f"checkpoint is not set: analysis={self.analysis} measures a pretrained model, "
                "--set checkpoint=runs/... names it"
            )
        languages = self.languages or []
        if len(set(languages)) != len(languages) or (self.languages is not None and not languages):
            raise ValueError(f"languages={','.join(languages)}: name each language once, at least one")
        return self
