"""Everything that a pretraining run depends on, as configuration keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from mlinterf_ds.config import ADDRESS, RESUMABLE, Section, given_keys, key, load_config, parser
from mlinterf_ds.errors import UserError
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
    is_routed,
)

if TYPE_CHECKING:
    from mlinterf_ds.data.stream import TrainStream, ValidationStream
    from mlinterf_ds.data.windows import TokenSource

BARE = "tiny"  # the recipe of a start that names none


class DataConfig(Section):
    """The rows of a step: their length, masks and languages."""

    sequence_length: int = key(128, "tokens in a row, packed without padding", ge=8)
    mask: float = key(0.15, "share of tokens predicted (80/10/10 masked/random/kept)", gt=0, lt=1)
    temperature: float = key(1.4286, "T of P_i = (n_i / sum n)^(1/T), n_i in sentences; 1 is proportional", gt=0)
    only: Languages | None = key(
        None, "languages to train on, of all in languages; the others keep the modules of init="
    )
    mixed: bool = key(
        False,
        "mix languages by row inside a step, so that it trains the modules of all of them; default: one language a step",
    )
    meta_rows: int | None = key(
        None,
        "a control: plain training that reads the rows of a meta step; this many rows of train.batch are those of its "
        "validation loss, drawn as the section meta says",
        ge=2,
    )
    synthetic_sentences: int = key(20000, "sentences of each language of corpus=synthetic", ge=200)
    synthetic_limit: Counts = key(
        {}, "LANG=N, ...: training sentences kept of a language of corpus=synthetic, to make it low-resource"
    )
    boundaries: Boundaries = key(
        "document",
        "tokens of a row see those of their document (a line that stands alone is one), of their sentence, or "
        "all (none)",
    )
    positions: Positions = key(
        "boundary", "where a token's position is counted from: its boundary, or the beginning of the row"
    )
    eval_rows: int = key(256, "rows of the validation split that are scored, of each language", ge=1)

    @property
    def row_format(self) -> RowFormat:
        """The rules by which text becomes rows."""
        return RowFormat(self.sequence_length, self.mask, self.boundaries, self.positions)


class ConflictConfig(ConflictSection):
    """Gradient conflict measured during pretraining (paper, figure 3); training is the same with and without it."""

    every: int = key(0, "steps between measurements; 0: off", ge=0)


class RunConfig(Section):
    """Everything a pretraining run depends on."""

    name: str = key("pretrain", "names the run in MLflow and in the default output folder", ADDRESS, min_length=1)
    corpus: str = key("synthetic", "folder made by tools/prepare_corpus.py, or 'synthetic'", ADDRESS)
    languages: Languages | None = key(None, "comma-separated codes; default: all the corpus has")
    variant: Variant = key("adpt", "which module is language-specific (paper, table 2)")
    output: str | None = key(None, "folder of checkpoints and summary; default runs/<name>-<time>", ADDRESS)
    resume: str = key("", "checkpoint folder to continue from; auto: the newest checkpoint in output", ADDRESS)
    restarts: int = key(
        0, "times that a run goes on by itself after a fault, from its newest checkpoint", RESUMABLE, ge=0
    )
    treatment: Literal["none", "pcgrad"] = key(
        "none", "pcgrad: project conflicting languages' gradients (joint training, data.mixed=true)"
    )
    init: str | None = key(
        None, "start from the weights of a checkpoint or a transformers folder; language modules are added", RESUMABLE
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    meta: MetaConfig = MetaConfig()
    conflict: ConflictConfig = key(ConflictConfig(), mark=RESUMABLE)
    parallel: ParallelConfig = key(ParallelConfig(), mark=RESUMABLE)
    tracking: TrackingConfig = key(TrackingConfig(), mark=ADDRESS)

    def rows_seen(self, steps: int) -> int:
        """How many rows have trained the shared parameters after so many steps, with `meta.reuse` those of the validation loss too."""
        rows = steps * self.train.batch
        if is_meta(self.variant) and self.meta.reuse:
            rows += -(-steps // self.meta.every) * (self.meta.batch or self.train.batch)
        return rows

    def streams(self, corpus: TokenSource, languages: Sequence[str]) -> tuple[TrainStream, ValidationStream | None]:
        """The batches of training and, for a meta variant, those of the validation loss."""
        from mlinterf_ds.data.stream import MetaRowsStream, TrainStream, ValidationStream  # the launcher needs no torch

        data, meta = self.data, self.meta
        common: dict[str, Any] = {"row_format": data.row_format, "seed": self.train.seed}
        training = common | {
            "rows": self.train.batch, "temperature": data.temperature, "mixed": data.mixed, "only": data.only,
            "half": "first" if self.reads_meta_rows and meta.text == "half" else None,
        }  # fmt: skip
        validation: dict[str, Any] = {"text": meta.text, "languages_per_step": meta.languages_per_step}
        if data.meta_rows:
            return MetaRowsStream(corpus, languages, meta_rows=data.meta_rows, **training, **validation), None
        stream = TrainStream(corpus, languages, **training)
        if not is_meta(self.variant):
            return stream, None
        rows = meta.batch or self.train.batch
        return stream, ValidationStream(
            corpus, languages, rows=rows, training=stream, every=meta.every, **common, **validation
        )

    @property
    def reads_meta_rows(self) -> bool:
        """Whether the rows of a validation loss are read, so that the section `meta` counts."""
        return is_meta(self.variant) or self.data.meta_rows is not None

    @property
    def routing(self) -> str:
        """Which module is language-specific, however it is trained: the variant without 'meta_'."""
        return architecture(self.variant)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        for message, refused in (self._layout_refusals() | self._recipe_refusals()).items():
            if refused:
                raise ValueError(message)
        return self

    def _layout_refusals(self) -> dict[str, Any]:
        """What is wrong with languages, rows and ranks, each message with whether it holds."""
        languages, tensor, model = self.languages or [], self.parallel.tensor, self.model
        return {
            "languages is empty: name at least one, or leave it out for all the corpus has":
                self.languages is not None and not languages,
            f"variant=mono takes one language, languages has {len(languages)}: use variant=joint":
                self.variant == "mono" and len(languages) > 1,
            f"data.sequence_length={self.data.sequence_length} is more than the model's {model.longest_row} positions "
            f"(model.positions={model.positions}): shorten the rows":
                self.data.sequence_length > (model.longest_row or self.data.sequence_length),
            f"model.heads={model.heads} is not divisible by parallel.tensor={tensor}: change one of them":
                model.heads % tensor,
            f"model.ffn={model.ffn} is not divisible by parallel.tensor={tensor}: change one of them":
                model.ffn % tensor,
            f"adapter bottleneck {model.adapter_width} is not divisible by parallel.tensor={tensor}: "
            "set model.adapter to a multiple of it":
                has_adapters(self.variant) and model.adapter_width % tensor,
        }  # fmt: skip

    def _recipe_refusals(self) -> dict[str, Any]:
        """What is wrong with how the run starts and trains, each message with whether it holds."""
        metas = is_meta(self.variant)
        freezes_init = self.train.freeze == "shared" and is_routed(self.variant) and (self.init or self.resume)
        projects_mixed = self.data.mixed and self.variant in ("joint", "share_adpt")
        return {
            f"train.freeze=shared trains language modules alone on a model that init= names (now {self.init}): set it, "
            f"and variant={', '.join(ROUTED[:-1])} or {ROUTED[-1]} (now {self.variant})":
                self.train.freeze == "shared" and not freezes_init,
            f"meta.every={self.meta.every} trains shared parameters alone in the steps between, and train.freeze=shared none of "
            "them: set meta.every=1 or meta.between=plain":
                metas and self.train.freeze == "shared" and self.meta.every > 1 and self.meta.between == "freeze",
            f"variant={self.variant} needs two languages or more, languages has one: use variant=mono":
                metas and len(self.languages or []) == 1,
            f"data.meta_rows={self.data.meta_rows} gives a plain variant the rows of a meta step (now {self.variant}): leave it out":
                metas and self.data.meta_rows,
            f"data.meta_rows={self.data.meta_rows}: needs train.batch={self.train.batch} to be larger, for rows to train on":
                (self.data.meta_rows or 0) >= self.train.batch,
            "data.meta_rows trains the modules of all languages, data.only those of a few: leave one of them out":
                self.data.meta_rows and self.data.only,
            "data.meta_rows needs two languages or more, as a meta step does: leave it out":
                self.data.meta_rows and len(self.languages or [0, 1]) == 1,
            f"treatment=pcgrad compares languages inside a step: set data.mixed=true (now {self.data.mixed}) and "
            f"variant=joint or share_adpt (now {self.variant})":
                self.treatment == "pcgrad" and not projects_mixed,
            "resume=auto needs to know where: --set output=FOLDER":
                self.resume == "auto" and not self.output,
            f"restarts={self.restarts} needs output=FOLDER: where the checkpoints to go on from will be":
                self.restarts and not self.output,
            "resume and init exclude each other: resume continues a run, init starts a new one":
                self.resume and self.init and not _is_of(self.resume, self.output),
        }  # fmt: skip


def read_arguments(arguments: Sequence[str]) -> tuple[RunConfig, str]:
    """The configuration that the pretraining launcher's arguments ask for, and the path of DeepSpeed's JSON file."""
    options = parser("Pretrain a multilingual masked language model.", RunConfig, BARE).parse_args(arguments)
    return load_run(options.recipe, options.set, BARE), options.deepspeed_config


def _is_of(resume: str, output: str | None) -> bool:
    """Whether `resume` continues the run whose folder is `output`: by its newest checkpoint, or by one that it names."""
    if resume == "auto":
        return True
    return bool(resume and output) and Path(resume).resolve().is_relative_to(Path(str(output)).resolve())


def load_run(recipes: Sequence[str | Path] = (), overrides: Sequence[str] = (), bare: str | None = None) -> RunConfig:
    """The configuration of a pretraining run (`load_config`); with `init` the keys of `model` are those of its model.

    bare: the recipe of a start that names none; what it says of the model yields to the model of `init`.
    """
    used = recipes or ([bare] if bare else [])
    given, _ = given_keys(RunConfig, used, overrides)
    if not (init := str(given.get("init") or "")):
        return load_config(RunConfig, used, overrides)
    output = str(given.get("output") or "")
    continues = _is_of(str(given.get("resume") or ""), output) or given.get("restarts")
    begun = continues and any((Path(output) / "checkpoints").glob("step-*"))
    from mlinterf_ds.pretrain import initial  # other runs read no model

    if not (begun or Path(init).exists()):
        load_config(RunConfig, used, overrides)  # raises what else is wrong
        raise UserError(
            f"init={init}: no such folder; name a run's output folder, a checkpoint or a transformers folder (`hf download {init} "
            f"--local-dir {init}` fetches a model of the Hub)"
        )
    keys = initial.model_keys(output if begun else init)  # a run that goes on does not need what it started from
    own, _ = given_keys(RunConfig, recipes, overrides)
    free = own.get("model", {}) if isinstance(own.get("model"), dict) else {}
    inherited = [f"model.{name}={value}" for name, value in keys.items() if name not in free]
    config = load_config(RunConfig, used, [*inherited, *overrides])
    initial.check_model(init, keys, config.model)
    return config
