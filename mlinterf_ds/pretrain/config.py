"""Everything that a pretraining run depends on, as configuration keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from mlinterf_ds.config import ADDRESS, RESUMABLE, Section, load_config, parser
from mlinterf_ds.sections import (
    ROUTED,
    Boundaries,
    ConflictSection,
    Counts,
    Languages,
    MetaConfig,
    ModelConfig,
    ParallelConfig,
    Positions,
    RowFormat,
    TrackingConfig,
    TrainConfig,
    Variant,
    architecture,
    has_adapters,
    is_meta,
)


class DataConfig(Section):
    """The rows of a step: their length, masks and languages."""

    sequence_length: int = Field(128, ge=8, description="tokens in a row, packed without padding")
    mask: float = Field(0.15, gt=0, lt=1, description="share of tokens predicted (80/10/10 masked/random/kept)")
    temperature: float = Field(
        1.4286, gt=0, description="T of P_i = (n_i / sum n)^(1/T), n_i in sentences; 1 is proportional"
    )
    only: Languages | None = Field(
        None, description="languages to train on, of all in languages; the others keep the modules of init="
    )
    mixed: bool = Field(False, description="mix languages by row inside a step; default: one language a step")
    synthetic_sentences: int = Field(20000, ge=200, description="sentences of each language of corpus=synthetic")
    synthetic_limit: Counts = Field(
        {},
        description="LANG=N, ...: training sentences kept of a language of corpus=synthetic, to make it low-resource",
    )
    boundaries: Boundaries = Field(
        "document",
        description="tokens of a row see those of their document (a line that stands alone is one), of their sentence, or "
        "all (none)",
    )
    positions: Positions = Field(
        "boundary", description="where a token's position is counted from: its boundary, or the beginning of the row"
    )
    eval_rows: int = Field(256, ge=1, description="rows of the validation split that are scored, of each language")

    @property
    def row_format(self) -> RowFormat:
        """How text becomes rows."""
        return RowFormat(self.sequence_length, self.mask, self.boundaries, self.positions)


class ConflictConfig(ConflictSection):
    """Gradient conflict measured during pretraining (paper, figure 3); training is the same with and without it."""

    every: int = Field(0, ge=0, description="steps between measurements; 0: off")


class RunConfig(Section):
    """Everything a pretraining run depends on."""

    name: str = Field(
        "pretrain",
        min_length=1,
        json_schema_extra=ADDRESS,
        description="names the run in MLflow and in the default output folder",
    )
    corpus: str = Field(
        "synthetic", json_schema_extra=ADDRESS, description="folder made by tools/prepare_corpus.py, or 'synthetic'"
    )
    languages: Languages | None = Field(None, description="comma-separated codes; default: all the corpus has")
    variant: Variant = Field("adpt", description="which module is language-specific (paper, table 2)")
    output: str | None = Field(
        None, json_schema_extra=ADDRESS, description="folder of checkpoints and summary; default runs/<name>-<time>"
    )
    resume: str = Field(
        "",
        json_schema_extra=ADDRESS,
        description="checkpoint folder to continue from; auto: the newest checkpoint in output",
    )
    restarts: int = Field(
        0,
        ge=0,
        json_schema_extra=RESUMABLE,
        description="times that a run goes on by itself after a fault, from its newest checkpoint",
    )
    treatment: Literal["none", "pcgrad"] = Field(
        "none", description="pcgrad: project conflicting languages' gradients (joint training, data.mixed=true)"
    )
    init: str | None = Field(
        None,
        json_schema_extra=RESUMABLE,
        description="start from the weights of a checkpoint or a transformers folder; language modules are added",
    )
    model: ModelConfig = ModelConfig()  # type: ignore[call-arg]
    data: DataConfig = DataConfig()  # type: ignore[call-arg]
    train: TrainConfig = TrainConfig()  # type: ignore[call-arg]
    meta: MetaConfig = MetaConfig()  # type: ignore[call-arg]
    conflict: ConflictConfig = Field(ConflictConfig(), json_schema_extra=RESUMABLE)  # type: ignore[call-arg]
    parallel: ParallelConfig = Field(ParallelConfig(), json_schema_extra=RESUMABLE)  # type: ignore[call-arg]
    tracking: TrackingConfig = Field(TrackingConfig(), json_schema_extra=ADDRESS)  # type: ignore[call-arg]

    @property
    def routing(self) -> str:
        """Which module is language-specific, however it is trained: the variant without 'meta_'."""
        return architecture(self.variant)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        languages = self.languages or []
        if self.languages is not None and not languages:
            raise ValueError("languages is empty: name at least one, or leave it out for all the corpus has")
        if self.variant == "mono" and len(languages) > 1:
            raise ValueError(f"variant=mono takes one language, languages has {len(languages)}: use variant=joint")
        tensor = self.parallel.tensor
        for key, value in (("model.heads", self.model.heads), ("model.ffn", self.model.ffn)):
            if value % tensor:
                raise ValueError(f"{key}={value} is not divisible by parallel.tensor={tensor}: change one of them")
        if has_adapters(self.variant) and self.model.adapter_width % tensor:
            raise ValueError(
                f"adapter bottleneck {self.model.adapter_width} is not divisible by parallel.tensor={tensor}: "
                "set model.adapter to a multiple of it"
            )
        if self.train.freeze == "shared" and (self.variant not in ROUTED or not (self.init or self.resume)):
            raise ValueError(
                f"train.freeze=shared trains language modules alone on a model that init= names (now {self.init}): set it, "
                f"and variant={', '.join(ROUTED[:-1])} or {ROUTED[-1]} (now {self.variant})"
            )
        if is_meta(self.variant):
            if len(languages) == 1:
                raise ValueError(
                    f"variant={self.variant} needs two languages or more, languages has one: use variant=mono"
                )
            if self.data.mixed:
                raise ValueError(
                    f"variant={self.variant} trains one language a step (Algorithm 1): set data.mixed=false"
                )
        if self.treatment == "pcgrad" and not (self.data.mixed and self.variant in ("joint", "share_adpt")):
            raise ValueError(
                f"treatment=pcgrad compares languages inside a step: set data.mixed=true (now {self.data.mixed}) and "
                f"variant=joint or share_adpt (now {self.variant})"
            )
        if self.resume == "auto" and not self.output:
            raise ValueError("resume=auto needs to know where: --set output=FOLDER")
        if self.restarts and not self.output:
            raise ValueError(
                f"restarts={self.restarts} needs output=FOLDER: where the checkpoints to go on from will be"
            )
        if self.resume and self.resume != "auto" and self.init:
            raise ValueError("resume and init exclude each other: resume continues a run, init starts a new one")
        return self


def read_arguments(arguments: Sequence[str]) -> tuple[RunConfig, str]:
    """The configuration that the pretraining launcher's arguments ask for, and the path of DeepSpeed's JSON file."""
    options = parser("Pretrain a multilingual masked language model.", RunConfig).parse_args(arguments)
    return load_run(options.recipe or ["tiny"], options.set), options.deepspeed_config


def load_run(recipes: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a pretraining run (`load_config`)."""
    return load_config(RunConfig, recipes, overrides)
