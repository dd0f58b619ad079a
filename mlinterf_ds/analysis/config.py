"""Everything that an analysis depends on, as configuration keys."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from mlinterf_ds.config import ADDRESS, Section, key
from mlinterf_ds.sections import (
    EACH_ONCE,
    LANGUAGE_PATTERN,
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
Code = Annotated[str, Field(pattern=LANGUAGE_PATTERN)]
NEEDS_CHECKPOINT = ("conflict", "prune", "probe")


class ConflictAnalysis(ConflictSection):
    """Gradient conflict on a checkpoint."""

    seed: int = key(0, "seed of the batches and of the projection", ge=0)
    runs: Names = key([], "instead: draw figure 3 from conflict.csv of these runs' output folders")


class PruneSection(Section):
    """Language-specific parameters: masks learned by Eq. 1 of the paper on the frozen model, a set for each language."""

    groups: Groups = key(
        ["heads", "neurons"],
        "what is masked, several: attention heads, feed-forward neurons, rows of the layers' matrices",
    )
    penalty: float = key(0.5, "lambda of Eq. 1: what all gated parameters cost together, in nats of the loss", ge=0)
    steps: int = key(400, "steps of learning a language's masks", ge=1)
    lr: float = key(0.1, "Adam's rate for the masks, falling linearly to 0", gt=0)
    rows: int = key(32, "sequences of a step, over all ranks; each has gates of its own", ge=1)
    micro_batch: int | None = key(None, "rows a rank handles at once; default: all its rows", ge=1)
    seeds: Seeds = key(
        [0, 1], "masks are learned once for each (text and gates drawn anew): the within-language control"
    )
    sequences: int = key(256, "rows of the validation split on which pruned models are scored", ge=1)


class ProbeTask(Section):
    """The examples of a probe; a synthetic language without a file has synthetic ones."""

    train: str | None = key(None, "FILE of tagged sentences of the first language, to which the probe is fitted")
    test: dict[Code, str] = key({}, "LANG = FILE of tagged sentences on which it is tested")


class ProbeSection(Section):
    """What frozen states know: linear probes, retrieval of translations, alignment of words."""

    pos: ProbeTask = ProbeTask()
    ner: ProbeTask = ProbeTask()
    parallel: dict[Code, str] = key(
        {}, "LANG = FILE of parallel sentences, one a line; default: synthetic languages' own, whose alignment is known"
    )
    examples: int = key(500, "tagged sentences of each set, the first of a file", ge=10)
    sentences: int = key(300, "parallel sentences, the first of a file", ge=10)


class InterferenceSection(Section):
    """Mono against joint models, and the distance of the languages."""

    mono: Names = key([], "output folders of runs on one language: FOLDER or LANG=FOLDER, comma-separated")
    joint: Names = key([], "output folders of runs on several languages; train.seed pairs them with mono's")
    larger: Names = key([], "output folders of larger models, shown beside (figure 1)")
    tasks: Names = key([], "output folders of fine-tunings of these models")
    split: Literal["valid", "test"] = key("test", "held-out text that is scored")
    rows: int | None = key(None, "rows of it a language; default: all", ge=1)


class AnalyzeConfig(Section):
    """Everything an analysis depends on."""

    name: str = key("analyze", "names the run in the default output folder", ADDRESS, min_length=1)
    checkpoint: str = key("", "pretraining run's output folder (its best checkpoint) or a checkpoint", ADDRESS)
    analysis: Literal["conflict", "prune", "probe", "interference"] = key("conflict", "what is measured")
    output: str | None = key(None, "folder of figures, CSV and summary; default runs/<name>-<time>", ADDRESS)
    corpus: str | None = key(None, "prepared corpus; default: the one the checkpoint was trained on", ADDRESS)
    languages: Languages | None = key(None, "comma-separated codes; default: the checkpoint's")
    conflict: ConflictAnalysis = ConflictAnalysis()
    prune: PruneSection = PruneSection()
    probe: ProbeSection = ProbeSection()
    interference: InterferenceSection = InterferenceSection()
    train: PrecisionSection = PrecisionSection()
    parallel: ParallelConfig = ParallelConfig()
    tracking: TrackingConfig = key(TrackingConfig(), mark=ADDRESS)

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
