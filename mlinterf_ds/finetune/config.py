"""The configuration of a fine-tuning job, read like a pretraining run's (`mlinterf_ds.config`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mlinterf_ds.config import LANGUAGE_PATTERN, ParallelConfig, Precision, Section, TrackingConfig


def _list(value: Any) -> Any:
    """'16,32' and 16 are lists too."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value if isinstance(value, list | tuple) or value is None else [value]


Rates = Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(_list), Field(min_length=1)]
Batches = Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(_list), Field(min_length=1)]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_list), Field(min_length=1)]


class FinetuneSection(Section):
    """How the pretrained model is fine-tuned. Several values of batch, lr or head_lr are a grid (paper, appendix A)."""

    epochs: int = Field(5, ge=1, description="passes over the training set, with a checkpoint after each")
    batch: Batches = Field([16], description="rows of a step, over all ranks; several: searched by the dev set")
    lr: Rates = Field([5e-4], description="peak learning rate of the encoder; several: searched by the dev set")
    head_lr: Rates | None = Field(None, description="of the classifier; several: searched; default: the encoder's")
    seeds: Seeds = Field(
        [0], description="one fine-tuning each (order, dropout, classifier); the first searches the grid"
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with a linearly rising rate")
    schedule: Literal["linear", "constant"] = Field("linear", description="after warm-up: down to 0, or constant")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay (AdamW)")
    clip: float = Field(1.0, ge=0, description="clip the global gradient norm; 0 switches it off")
    dropout: float | None = Field(None, ge=0, lt=1, description="all dropouts; default: as in pretraining")
    micro_batch: int | None = Field(None, ge=1, description="rows a rank handles at once; default: all its rows")
    eval_batch: int = Field(64, ge=1, description="rows a rank predicts at once")
    freeze: Literal["none", "language", "shared"] = Field(
        "none", description="what stays as pretrained: nothing (the paper's choice), language modules, or all else"
    )
    route: Literal["target", "source"] = Field(
        "target",
        description="at test time: the test language's own modules (the paper's setting), or the training one's",
    )
    unseen: str | None = Field(
        None,
        pattern=LANGUAGE_PATTERN,
        description="language whose modules serve languages new to the model; default: refuse",
    )
    max_length: int | None = Field(None, ge=16, description="pieces in a row; default: as in pretraining")
    stride: int | None = Field(
        None, ge=1, description="pieces a window moves on (QA) or looks back (tags); default half a row"
    )
    max_question: int | None = Field(None, ge=1, description="pieces kept of a question; default 1/4 row")
    max_answer: int = Field(30, ge=1, description="pieces in an answer")
    dev_share: float = Field(0.1, gt=0, lt=1, description="of train, for --dev LANG=split")
    test_share: float = Field(0.1, gt=0, lt=1, description="of train, for --test LANG=split")
    limit: int | None = Field(None, ge=1, description="use only the first so many examples of each file")
    synthetic_train: int = Field(1000, ge=2, description="training examples of LANG=synthetic")
    synthetic_eval: int = Field(500, ge=1, description="dev and test examples of LANG=synthetic")
    keep: int = Field(1, ge=1, description="newest checkpoints kept of each fine-tuning, beside the best")

    @property
    def single(self) -> bool:
        """Whether there is one fine-tuning only: one seed, no grid."""
        return len(self.seeds) * len(self.batch) * len(self.lr) * len(self.head_lr or [0]) == 1


class PrecisionSection(Section):
    """Arithmetic."""

    precision: Precision = Field("auto", description="fp16 on CUDA, bf16 on a CPU with bf16 arithmetic, else fp32")


class FinetuneConfig(Section):
    """Everything a fine-tuning job depends on, its data apart (`--train`, `--dev`, `--test`)."""

    name: str = Field("finetune", min_length=1, description="names the run in the default output folder")
    checkpoint: str = Field("", description="pretraining run's output folder (its best checkpoint) or a checkpoint")
    task: Literal["ner", "pos", "qa", "nli"] = Field("ner", description="what is learnt")
    output: str | None = Field(
        None, description="folder of checkpoints, predictions and summary; default runs/<name>-<time>"
    )
    resume: Literal["", "auto"] = Field("", description="auto: go on with what is in output")
    finetune: FinetuneSection = FinetuneSection()  # type: ignore[call-arg]
    train: PrecisionSection = PrecisionSection()  # type: ignore[call-arg]
    parallel: ParallelConfig = ParallelConfig()  # type: ignore[call-arg]
    tracking: TrackingConfig = TrackingConfig()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        if not self.checkpoint:
            raise ValueError("checkpoint is not set: --set checkpoint=runs/... names the pretrained model")
        if self.resume and not self.output:
            raise ValueError("resume=auto needs to know where: --set output=FOLDER")
        for key in ("batch", "lr", "head_lr", "seeds"):
            values = getattr(self.finetune, key) or []
            if len(set(values)) != len(values):
                raise ValueError(f"finetune.{key}={values} names a value twice: name each once")
        return self
