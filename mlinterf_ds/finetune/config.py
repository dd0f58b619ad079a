"""Everything that a fine-tuning job depends on, as configuration keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mlinterf_ds.config import ADDRESS, RESUMABLE, Section
from mlinterf_ds.errors import UserError
from mlinterf_ds.sections import (
    EACH_ONCE,
    LANGUAGE_PATTERN,
    ParallelConfig,
    PrecisionSection,
    Seeds,
    TrackingConfig,
    comma_list,
    listed,
)
from mlinterf_ds.tasks import Limits, TaskName

Rates = Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(listed), Field(min_length=1), EACH_ONCE]
Batches = Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(listed), Field(min_length=1), EACH_ONCE]


def _renamings(value: Any) -> Any:
    """'A=B,C=D' as {'A': 'B', 'C': 'D'}; any value but a string is returned unchanged."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in comma_list(value)]
    if bad := [old + equals + new for old, equals, new in pairs if not (old and new)]:
        raise ValueError(f"finetune.labels={bad[0]}: expected OLD=NEW, such as PERSON=PER, and commas between several")
    return {old: new for old, _, new in pairs}


Renamings = Annotated[dict[str, str], BeforeValidator(_renamings)]


class FinetuneSection(Section):
    """How the pretrained model is fine-tuned. Several values of batch, lr or head_lr are a grid (paper, appendix A)."""

    epochs: int = Field(5, ge=1, description="passes over the training set, with a checkpoint after each")
    batch: Batches = Field([16], description="rows of a step, over all ranks; of several the dev set chooses")
    lr: Rates = Field([5e-4], description="peak learning rate of the encoder; of several the dev set chooses")
    head_lr: Rates | None = Field(
        None, description="peak learning rate of the classifier; of several the dev set chooses; default: the encoder's"
    )
    seeds: Seeds = Field(
        [0], description="one fine-tuning for each (order, dropout, classifier); the grid is searched with the first"
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises linearly")
    schedule: Literal["linear", "constant"] = Field(
        "linear", description="rate after the warm-up: falling linearly to 0, or constant"
    )
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay (AdamW)")
    clip: float = Field(1.0, ge=0, description="clip the global gradient norm; 0 switches it off")
    dropout: float | None = Field(None, ge=0, lt=1, description="dropout everywhere; default: as in pretraining")
    micro_batch: int | None = Field(
        None, ge=1, json_schema_extra=RESUMABLE, description="rows a rank handles at once; default: all its rows"
    )
    freeze: Literal["none", "language", "shared"] = Field(
        "none",
        description="what stays as pretrained: nothing (as in the paper), the language modules, or all but those",
    )
    route: Literal["target", "source"] = Field(
        "target",
        description="modules that read a test: those of the test's language (as in the paper), or of the training language",
    )
    unseen: str | None = Field(
        None,
        pattern=LANGUAGE_PATTERN,
        description="language whose modules read languages that the model does not know; default: such languages are refused",
    )
    max_length: int | None = Field(None, ge=16, description="pieces in a row; default: as in pretraining")
    stride: int | None = Field(
        None, ge=1, description="pieces that a window moves on (QA) or looks back (tags); default half a row"
    )
    max_question: int | None = Field(None, ge=1, description="pieces kept of a question; default a quarter of a row")
    max_answer: int = Field(30, ge=1, description="largest number of pieces in an answer")
    labels: Renamings = Field(
        {},
        description="OLD=NEW,...: labels of the files (types of entities) that are renamed, such as PERSON=PER; O: no entity",
    )
    unknown_labels: Literal["error", "miss", "ignore"] = Field(
        "error",
        description="tags of a dev or test file that training never had: refused, counted as missed, or their words not scored",
    )
    unfound_answers: Literal["skip", "error"] = Field(
        "skip", description="QA: answers that their context does not hold: left out and counted, or refused"
    )
    limit: int | None = Field(None, ge=1, description="number of examples read of each file; default: all")
    synthetic_train: int = Field(1000, ge=2, description="training examples of LANG=synthetic")
    synthetic_eval: int = Field(500, ge=1, description="dev and test examples of LANG=synthetic")

    keep: int = Field(
        1,
        ge=1,
        json_schema_extra=RESUMABLE,
        description="number of newest checkpoints kept of each fine-tuning, beside the best",
    )

    def limits(self, positions: int) -> Limits:
        """How long rows may be in a model that reads `positions` pieces at once. UserError if max_length is more."""
        length = self.max_length or positions
        if length > positions:
            raise UserError(f"finetune.max_length={length}: the model has {positions} positions")
        return Limits(length, self.stride or length // 2, self.max_question or length // 4, self.max_answer)

    @property
    def single(self) -> bool:
        """Whether there is one fine-tuning only: one seed, no grid."""
        return len(self.seeds) * len(self.batch) * len(self.lr) * len(self.head_lr or [0]) == 1


class FinetuneConfig(Section):
    """Everything a fine-tuning job depends on, its data apart (`--train`, `--dev`, `--test`)."""

    name: str = Field(
        "finetune", min_length=1, json_schema_extra=ADDRESS, description="names the run in the default output folder"
    )
    checkpoint: str = Field(
        "",
        json_schema_extra=ADDRESS,
        description="pretraining run's output folder (its best checkpoint) or a checkpoint",
    )
    task: TaskName = Field("ner", description="the task to learn")
    output: str | None = Field(
        None,
        json_schema_extra=ADDRESS,
        description="folder of checkpoints, predictions and summary; default runs/<name>-<time>",
    )
    resume: Literal["", "auto"] = Field(
        "", json_schema_extra=ADDRESS, description="auto: continue the fine-tuning job in output"
    )
    finetune: FinetuneSection = FinetuneSection()  # type: ignore[call-arg]
    train: PrecisionSection = Field(PrecisionSection(), json_schema_extra=RESUMABLE)  # type: ignore[call-arg]
    parallel: ParallelConfig = Field(ParallelConfig(), json_schema_extra=RESUMABLE)  # type: ignore[call-arg]
    tracking: TrackingConfig = Field(TrackingConfig(), json_schema_extra=ADDRESS)  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        if not self.checkpoint:
            raise ValueError("checkpoint is not set: --set checkpoint=runs/... names the pretrained model")
        if self.resume and not self.output:
            raise ValueError("resume=auto needs to know where: --set output=FOLDER")
        return self
