"""One typed, strict run configuration: defaults < recipe files (TOML) < `--set section.key=value`.

Every key is a documented field below; `describe()` turns them into the launchers' `--help`. Unknown keys, wrong types
and impossible combinations raise `UserError` with the key, the value and the remedy.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mlinterf_ds.errors import UserError, refusing

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Variant = Literal["mono", "joint", "ffn", "attn", "adpt", "share_adpt", "meta_adpt", "meta_ffn", "meta_attn"]
LANGUAGE_PATTERN = r"^[a-z][a-z0-9_-]*$"
DEEPEST = 8  # parts of a key; no section lies deeper


def comma_list(value: Any) -> Any:
    """'a, b' as ['a', 'b']; what is no string as it is."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Languages = Annotated[list[Annotated[str, Field(pattern=LANGUAGE_PATTERN)]], BeforeValidator(comma_list)]


def _counts(value: Any) -> Any:
    """'a=1,b=2' as {'a': '1', 'b': '2'}; what is no string as it is."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in comma_list(value)]
    if bad := [code for code, _, count in pairs if not count.isdecimal()]:
        raise ValueError(f"{bad[0]}: expected LANG=N, such as syn-mid=2000, and commas between several")
    return {code: count for code, _, count in pairs}


Counts = Annotated[
    dict[Annotated[str, Field(pattern=LANGUAGE_PATTERN)], Annotated[int, Field(ge=1)]], BeforeValidator(_counts)
]


class Section(BaseModel):
    """A group of keys; unknown ones are refused, values are checked, results are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _none_by_name(cls, values: Any) -> Any:
        """`--set key=none` unsets a key, except where 'none' is one of its choices."""
        if not isinstance(values, dict):
            return values
        for name, value in values.items():  # true would count as 1
            kind = cls.model_fields[name].annotation if name in cls.model_fields else bool
            if kind is not bool and not _is_section(kind) and any(isinstance(part, bool) for part in _parts(value)):
                raise ValueError(f"{name}={value!r}: expected no true or false here")
        named = [name for name, field in cls.model_fields.items() if "none" in get_args(field.annotation)]
        return values | {name: "none" for name in named if name in values and values[name] is None}

    @model_validator(mode="after")
    def _within_64_bits(self) -> Self:
        for name, value in self:
            if any(isinstance(part, int) and abs(part) >= 2**63 for part in _parts(value)):
                raise ValueError(f"{name}: expected numbers below 2**63")
        return self


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _parts(value: Any) -> list[Any]:
    """The value, or what a list or table holds."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]


Kind = TypeVar("Kind", bound=Section)


class ModelConfig(Section):
    """Shape of the encoder (pre-norm Transformer; paper section 3.2 and appendix B)."""

    layers: int = Field(2, ge=1, description="Transformer layers")
    heads: int = Field(4, ge=1, description="attention heads")
    width: int = Field(128, ge=8, description="hidden size")
    head_width: int | None = Field(None, ge=1, description="width of one attention head; default width / heads")
    ffn: int = Field(512, ge=8, description="inner width of the feed-forward layer")
    adapter: int | None = Field(None, ge=1, description="adapter bottleneck; default width / 4 (appendix B)")
    adapter_activation: Literal["gelu", "relu", "tanh", "silu"] = Field(
        "gelu", description="adapter non-linearity; relu (the paper's example) makes finite differences unreliable"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on embeddings and residual branches")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="dropout on attention probabilities")
    language_embeddings: bool = Field(False, description="add a learned embedding of the row's language")
    output_bias: Literal["frequency", "zero"] = Field(
        "frequency", description="bias of the output layer at the start: the corpus's log frequencies, or 0 as in XLM"
    )
    recompute: bool = Field(False, description="recompute activations in the backward pass (less memory, more time)")
    compile: bool = Field(False, description="fuse element-wise work with torch.compile (needs a C++ compiler on CPU)")

    @model_validator(mode="after")
    def _head_width_divides(self) -> ModelConfig:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"model.heads={self.heads} does not divide model.width={self.width}: "
                "change one of them or set model.head_width (the paper's 12 x 64 over 512)"
            )
        return self

    @property
    def kv_channels(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def adapter_width(self) -> int:
        """Bottleneck width of an adapter: a quarter of the model by default (appendix B)."""
        return self.adapter or max(1, self.width // 4)


class DataConfig(Section):
    """What a step is made of (DESIGN.md's data contract)."""

    sequence_length: int = Field(128, ge=8, description="tokens in a row, packed without padding")
    mask: float = Field(0.15, gt=0, lt=1, description="share of tokens predicted (80/10/10 masked/random/kept)")
    temperature: float = Field(
        1.4286, gt=0, description="T of P_i = (n_i / sum n)^(1/T), n_i in sentences; 1 is proportional"
    )
    only: Languages | None = Field(
        None, description="train on these of the languages; the others keep the modules of init="
    )
    mixed: bool = Field(False, description="mix languages by row inside a step; default: one language a step")
    synthetic_sentences: int = Field(20000, ge=200, description="sentences a language of corpus=synthetic")
    synthetic_limit: Counts = Field(
        {}, description="training sentences kept of some of its languages, e.g. syn-mid=2000: low-resource versions"
    )
    eval_rows: int = Field(256, ge=1, description="rows of the validation split scored per language")


class TrainConfig(Section):
    """Optimisation; AdamW and the schedules of XLM."""

    steps: int = Field(600, ge=1, description="optimizer steps")
    batch: int = Field(32, ge=1, description="rows of a global batch, over all ranks and micro-batches")
    micro_batch: int | None = Field(None, ge=1, description="rows a rank handles at once; default: all its rows")
    seed: int = Field(0, ge=0, description="seed of initialisation, data order, masks and dropout")
    precision: Precision = Field(
        "auto", description="auto: fp16 on CUDA, bf16 on a CPU with bf16 arithmetic, else fp32"
    )
    max_hours: float | None = Field(None, gt=0, description="stop (resumable) this many hours after the start")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    schedule: Literal["inverse_sqrt", "constant"] = Field(
        "inverse_sqrt", description="after warm-up: lr * sqrt(warmup / step), or lr"
    )
    warmup: int = Field(100, ge=0, description="steps of linear warm-up from 1e-7")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first decay rate")
    beta2: float = Field(0.98, ge=0, lt=1, description="Adam's second decay rate")
    eps: float = Field(1e-6, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay (AdamW)")
    clip: float = Field(5.0, ge=0, description="clip the global gradient norm; 0 switches it off")
    freeze: Literal["none", "shared"] = Field(
        "none", description="shared: with init=, train language modules only (and the rows of new pieces)"
    )
    spike: float | None = Field(
        10.0, gt=0, description="skip a step whose loss is so many standard deviations above its mean; none: never"
    )
    epoch_steps: int = Field(100, ge=1, description="steps between evaluations (the paper's epoch: 10000)")
    save_steps: int | None = Field(None, ge=1, description="steps between checkpoints; default: every epoch")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, beside the best")


class MetaConfig(Section):
    """The meta step of the meta_* variants (paper section 4, Algorithm 1, appendix B)."""

    beta: float | None = Field(
        None, gt=0, description="step of the lookahead (Eq. 3); default: the current learning rate"
    )
    lookahead: Literal["sgd", "adam"] = Field(
        "sgd", description="rule of the lookahead: the paper's, or Adam's own step"
    )
    order: Literal["phi_first", "theta_first"] = Field(
        "phi_first", description="Algorithm 1's order, or that of the authors' released code"
    )
    terms: Literal["both", "direct"] = Field("both", description="direct: leave the second-order term out (a control)")
    difference: Literal["central", "one_sided"] = Field("central", description="finite difference of Eq. 8")
    radius: Literal["auto"] | Annotated[float, Field(gt=0, le=0.5)] = Field(
        "auto", description="displacement |e v| / |theta| of Eq. 8: 'auto' (controlled online), or a number"
    )
    check_every: int = Field(100, ge=0, description="steps between self-checks of the difference; 0 switches them off")
    batch: int | None = Field(None, ge=1, description="global rows of the validation loss; default train.batch")
    languages_per_step: int | None = Field(
        None, ge=2, description="languages of the validation loss in a step (unbiased); default: all"
    )
    every: int = Field(1, ge=1, description="only every k-th step is a meta step")
    between: Literal["freeze", "plain"] = Field("freeze", description="language modules in the steps between")


class ConflictSection(Section):
    """How the conflict between languages' gradients is measured (paper, section 3.1)."""

    sequences: int | None = Field(
        None, ge=1, description="rows of a gradient; default 4096 (the paper's), on a CPU 64; fewer if text is short"
    )
    micro_batch: int = Field(32, ge=1, description="rows a rank handles at once")
    sketch: Literal["auto", "exact"] | Annotated[int, Field(ge=16)] = Field(
        "auto",
        description="dimension of each component's random projection (standard error (1-cos^2)/sqrt(dimension)), or "
        "exact: all gradients are kept; auto: exact to 4 languages, then 4096",
    )


class ConflictConfig(ConflictSection):
    """Gradient conflict during pretraining (paper, figure 3); without effect on the training."""

    every: int = Field(0, ge=0, description="steps between measurements; 0: off")


class ParallelConfig(Section):
    """Process layout: tensor-parallel groups of neighbours, data parallel across them."""

    tensor: int = Field(1, ge=1, description="ranks that share one copy of the model (megatron tensor parallel)")
    timeout: float = Field(10.0, gt=0, description="minutes a rank waits for another before it declares the job lost")


class TrackingConfig(Section):
    """MLflow; the address comes from MLflow's own MLFLOW_TRACKING_URI (default: sqlite:///mlflow.db)."""

    enabled: bool = Field(True, description="record the run in MLflow")
    experiment: str = Field("mlinterf_ds", min_length=1, description="MLflow experiment name")
    parent: str | None = Field(None, description="MLflow run that a pretraining run is nested under")
    tags: dict[str, str] = Field({}, description="further tags of the run: --set tracking.tags.KEY=VALUE")


class RunConfig(Section):
    """Everything a pretraining run depends on."""

    name: str = Field("pretrain", min_length=1, description="names the run in MLflow and in the default output folder")
    corpus: str = Field("synthetic", description="folder made by tools/prepare_corpus.py, or 'synthetic'")
    languages: Languages | None = Field(None, description="comma-separated codes; default: all the corpus has")
    variant: Variant = Field("adpt", description="which module is language-specific (paper, table 2)")
    output: str | None = Field(None, description="folder of checkpoints and summary; default runs/<name>-<time>")
    resume: str = Field("", description="'auto': continue from the newest checkpoint in output; or a checkpoint folder")
    restarts: int = Field(0, ge=0, description="start again this often by itself after a fault (with resume=auto)")
    treatment: Literal["none", "pcgrad"] = Field(
        "none", description="pcgrad: project conflicting languages' gradients (joint training, data.mixed=true)"
    )
    init: str | None = Field(
        None, description="start from the weights of a checkpoint or a transformers folder; language modules are added"
    )
    model: ModelConfig = ModelConfig()  # type: ignore[call-arg]
    data: DataConfig = DataConfig()  # type: ignore[call-arg]
    train: TrainConfig = TrainConfig()  # type: ignore[call-arg]
    meta: MetaConfig = MetaConfig()  # type: ignore[call-arg]
    conflict: ConflictConfig = ConflictConfig()  # type: ignore[call-arg]
    parallel: ParallelConfig = ParallelConfig()  # type: ignore[call-arg]
    tracking: TrackingConfig = TrackingConfig()  # type: ignore[call-arg]

    @property
    def routing(self) -> str:
        """The variant's architecture: which module is language-specific, however it is trained."""
        return self.variant.removeprefix("meta_")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        languages = self.languages or []
        if len(set(languages)) != len(languages):
            raise ValueError(f"languages={','.join(languages)} names a language twice: name each once")
        if self.languages is not None and not languages:
            raise ValueError("languages is empty: name at least one, or leave it out for all the corpus has")
        if self.variant == "mono" and len(languages) > 1:
            raise ValueError(f"variant=mono takes one language, languages has {len(languages)}: use variant=joint")
        tensor = self.parallel.tensor
        for key, value in (("model.heads", self.model.heads), ("model.ffn", self.model.ffn)):
            if value % tensor:
                raise ValueError(f"{key}={value} is not divisible by parallel.tensor={tensor}: change one of them")
        if self.variant.endswith("adpt") and self.model.adapter_width % tensor:
            raise ValueError(
                f"adapter bottleneck {self.model.adapter_width} is not divisible by parallel.tensor={tensor}: "
                "set model.adapter to a multiple of it"
            )
        if self.train.freeze == "shared" and (
            self.variant not in ("ffn", "attn", "adpt") or not (self.init or self.resume)
        ):
            raise ValueError(
                f"train.freeze=shared trains language modules alone on a model that init= names (now {self.init}): set it, "
                f"and variant=ffn, attn or adpt (now {self.variant})"
            )
        if self.variant.startswith("meta_"):
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


def load_config(
    recipes: list[str | Path] | None = None,
    overrides: list[str] | None = None,
    kind: type[Kind] = RunConfig,  # type: ignore[assignment]
) -> Kind:
    """Defaults, then each recipe in order, then each `section.key=value` in order."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for recipe in recipes or []:
        _merge(merged, _read_recipe(Path(recipe)), origin, str(recipe))
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"--set {override}: expected section.key=value, e.g. --set train.steps=1000")
        tree: Any = None if value.lower() in ("none", "null") else value
        parts = key.strip().split(".")
        if len(parts) > DEEPEST:
            raise UserError(f"--set {override}: unknown key; --help lists every key")
        for part in reversed(parts):
            tree = {part: tree}
        _merge(merged, tree, origin, f"--set {override}")
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        raise UserError(_explain(error, kind, origin)) from None


def _read_recipe(path: Path) -> dict[str, Any]:
    shipped = Path(__file__).resolve().parents[1] / "launch" / "recipes" / f"{path}.toml"
    given = os.path.isfile(path)  # unlike Path's, no error for a name that is too long
    if not given and len(path.parts) == 1 and os.path.isfile(shipped):
        path, given = shipped, True  # `--recipe small` names a shipped recipe
    if not given:
        known = ", ".join(sorted(file.stem for file in shipped.parent.glob("*.toml")))
        raise UserError(f"--recipe {path}: no such file; give a TOML file or one of the shipped recipes: {known}")
    with refusing(f"{path}: not a TOML file"):
        return tomllib.loads(path.read_text(encoding="utf-8"))


def _merge(into: dict[str, Any], new: dict[str, Any], origin: dict[str, str], where: str, prefix: str = "") -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key, {}), dict):
            _merge(into.setdefault(key, {}), value, origin, where, f"{prefix}{key}.")
        else:
            into[key] = value
            origin[f"{prefix}{key}"] = where


def _explain(error: ValidationError, kind: type[Section], origin: dict[str, str]) -> str:
    """Each problem on a line: key, value, where it was set, what was expected."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        value = problem.get("input")
        parent = key.rpartition(".")[0]
        where = next(
            (found for name, found in origin.items() if name in (key, parent) or name.startswith(f"{key}.")), ""
        )
        place = f" ({where})" if where else ""
        if problem["type"] == "extra_forbidden":
            lines.append(f"{key}={value!r}{place}: unknown key; {_nearest(key, kind)}")
        elif problem["type"] == "value_error":  # our own validators name key and value themselves
            lines.append(problem["msg"].removeprefix("Value error, ") + place)
        else:
            lines.append(f"{key}={value!r}{place}: {problem['msg']}")
    return "\n".join(lines)


def _nearest(key: str, kind: type[Section]) -> str:
    import difflib

    known = [name for name, _, _ in fields(kind)]
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    close += [name for name in known if name.split(".")[-1] == key.split(".")[-1] and name not in close]
    return f"did you mean {' or '.join(close)}?" if close else "--help lists every key"


def fields(kind: type[Section] = RunConfig, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted key, default, meaning) of every key."""
    rows: list[tuple[str, Any, str]] = []
    for name, field in kind.model_fields.items():
        if isinstance(field.default, Section):
            rows += fields(type(field.default), f"{prefix}{name}.")
        else:
            choices = get_args(field.annotation) if getattr(field.annotation, "__origin__", None) is Literal else ()
            meaning = field.description or ""
            if choices:
                meaning += " [" + " | ".join(map(str, choices)) + "]"
            rows.append((f"{prefix}{name}", field.default, meaning))
    return rows


def describe(kind: type[Section] = RunConfig) -> str:
    """The text of `--help`: a line for each key."""
    rows = fields(kind)
    width = max(len(f"{key}={default}") for key, default, _ in rows)
    return "\n".join(f"  {f'{key}={default}':<{width}}  {meaning}" for key, default, meaning in rows)
