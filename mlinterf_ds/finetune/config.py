"""Everything that a fine-tuning job depends on, as configuration keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mlinterf_ds.config import ADDRESS, RESUMABLE, Section, key
from mlinterf_ds.errors import UserError
from mlinterf_ds.sections import (
    EACH_ONCE,
    LANGUAGE_PATTERN,
    ParallelConfig,
    PrecisionSection,
    Seeds,
    TrackingConfig,
    WordState,
    comma_list,
)
from mlinterf_ds.tasks import Limits, TaskName

Rates = Annotated[list[Annotated[float, Field(gt=0)]], BeforeValidator(comma_list), Field(min_length=1), EACH_ONCE]
Batches = Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(comma_list), Field(min_length=1), EACH_ONCE]


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

    epochs: int = key(5, "passes over the training set, with a checkpoint after each", ge=1)
    batch: Batches = key([16], "rows of a step, over all ranks; of several the dev set chooses")
    lr: Rates = key([5e-4], "peak learning rate of the encoder; of several the dev set chooses")
    head_lr: Rates | None = key(
        None, "peak learning rate of the classifier; of several the dev set chooses; default: the encoder's"
    )
    seeds: Seeds = key(
        [0], "one fine-tuning for each (order, dropout, classifier); the grid is searched with the first"
    )
    warmup: float = key(0.1, "share of the steps in which the rate rises linearly", ge=0, lt=1)
    schedule: Literal["linear", "constant"] = key(
        "linear", "rate after the warm-up: falling linearly to 0, or constant"
    )
    weight_decay: float = key(0.01, "decoupled weight decay (AdamW)", ge=0)
    clip: float = key(1.0, "clip the global gradient norm; 0 switches it off", ge=0)
    dropout: float | None = key(None, "dropout everywhere; default: as in pretraining", ge=0, lt=1)
    micro_batch: int | None = key(None, "rows a rank handles at once; default: all its rows", RESUMABLE, ge=1)
    freeze: Literal["none", "language", "shared"] = key(
        "none", "what stays as pretrained: nothing (as in the paper), the language modules, or all but those"
    )
    word: WordState = key(
        "first",
        "what a word's tag is predicted from: the state of its first piece (as in the paper), or the mean state of all its pieces, which "
        "helps where words have many",
    )
    route: Literal["target", "source"] = key(
        "target",
        "modules that read a test: those of the test's language (as in the paper), or of the training language",
    )
    unseen: str | None = key(
        None,
        "language whose modules read languages that the model does not know; default: such languages are refused",
        pattern=LANGUAGE_PATTERN,
    )
    max_length: int | None = key(None, "pieces in a row; default: as many as the model has positions", ge=16)
    stride: int | None = key(None, "pieces that a window moves on (QA) or looks back (tags); default half a row", ge=1)
    max_question: int | None = key(None, "pieces kept of a question; default a quarter of a row", ge=1)
    max_answer: int = key(30, "largest number of pieces in an answer", ge=1)
    labels: Renamings = key(
        {}, "OLD=NEW,...: labels of the files (types of entities) that are renamed, such as PERSON=PER; O: no entity"
    )
    unknown_labels: Literal["error", "miss", "ignore"] = key(
        "error",
        "tags of a dev or test file that training never had: refused, counted as missed, or their words not scored",
    )
    unfound_answers: Literal["skip", "error"] = key(
        "skip", "QA: answers that their context does not hold: left out and counted, or refused"
    )
    limit: int | None = key(
        None, "number of examples read of each file, drawn at random, always the same ones; default: all", ge=1
    )
    synthetic_train: int = key(1000, "training examples of LANG=synthetic", ge=2)
    synthetic_eval: int = key(500, "dev and test examples of LANG=synthetic", ge=1)

    keep: int = key(1, "number of newest checkpoints kept of each fine-tuning, beside the best", RESUMABLE, ge=1)

    def limits(self, positions: int) -> Limits:
        """How long rows may be in a model that reads `positions` pieces at once. UserError if max_length is more."""
        if (self.max_length or 0) > positions:
            raise UserError(f"finetune.max_length={self.max_length}: the model has {positions} positions")
        return Limits.of(self.model_dump(), positions)

    @property
    def single(self) -> bool:
        """Whether there is one fine-tuning only: one seed, no grid."""
        return len(self.seeds) * len(self.batch) * len(self.lr) * len(self.head_lr or [0]) == 1


class FinetuneConfig(Section):
    """Everything a fine-tuning job depends on, its data apart (`--train`, `--dev`, `--test`)."""

    name: str = key("finetune", "names the run in the default output folder", ADDRESS, min_length=1)
    checkpoint: str = key("", "pretraining run's output folder (its best checkpoint) or a checkpoint", ADDRESS)
    task: TaskName = key("ner", "the task to learn")
    output: str | None = key(
        None, "folder of checkpoints, predictions and summary; default runs/<name>-<time>", ADDRESS
    )
    resume: Literal["", "auto"] = key("", "auto: continue the fine-tuning job in output", ADDRESS)
    finetune: FinetuneSection = FinetuneSection()
    train: PrecisionSection = key(PrecisionSection(), mark=RESUMABLE)
    parallel: ParallelConfig = key(ParallelConfig(), mark=RESUMABLE)
    tracking: TrackingConfig = key(TrackingConfig(), mark=ADDRESS)

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        if not self.checkpoint:
            raise ValueError("checkpoint is not set: --set checkpoint=runs/... names the pretrained model")
        if self.resume and not self.output:
            raise ValueError("resume=auto needs to know where: --set output=FOLDER")
        return self
