"""Sections of the configuration that several commands share or that model and engine read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from mlinterf_ds.config import RESUMABLE, Section, key

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Variant = Literal["mono", "joint", "ffn", "attn", "adpt", "share_adpt", "meta_adpt", "meta_ffn", "meta_attn"]
ROUTED = ("ffn", "attn", "adpt")  # architectures in which each language has this module of its own
ADAPTED = ("adpt", "share_adpt")  # architectures with adapters
MASK_SHARE = 0.15  # BERT's
Boundaries = Literal["none", "sentence", "document"]
Positions = Literal["row", "boundary"]
MetaText = Literal["train", "half", "held_out"]
WordState = Literal["first", "mean"]
LANGUAGE_PATTERN = r"^[a-z][a-z0-9_-]*$"


def architecture(variant: str) -> str:
    """Which modules a model has, however they are trained: the variant without 'meta_'."""
    return variant.removeprefix("meta_")


def is_meta(variant: str) -> bool:
    """Whether the meta step trains the language-specific modules."""
    return variant.startswith("meta_")


def is_routed(variant: str) -> bool:
    """Whether each language has modules of its own."""
    return architecture(variant) in ROUTED


def has_adapters(variant: str) -> bool:
    """Whether the model has adapters, of each language or shared."""
    return architecture(variant) in ADAPTED


def comma_list(value: Any) -> Any:
    """The parts of a comma-separated string ('a, b' as ['a', 'b']); a list of one number; a list or None unchanged."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value if isinstance(value, list | tuple | dict) or value is None else [value]


def _each_once(values: list[Any]) -> list[Any]:
    if len(set(values)) != len(values):
        raise PydanticCustomError("repeated", "a value is named twice: name each once")
    return values


EACH_ONCE = AfterValidator(_each_once)  # refuses a list with a repeated value
Languages = Annotated[list[Annotated[str, Field(pattern=LANGUAGE_PATTERN)]], BeforeValidator(comma_list), EACH_ONCE]


def _counts(value: Any) -> Any:
    """'a=1,b=2' as {'a': '1', 'b': '2'}; any value but a string is returned unchanged."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in comma_list(value)]
    if bad := [code for code, _, count in pairs if not count.isdecimal()]:
        raise ValueError(f"{bad[0]}: expected LANG=N, such as syn-mid=2000, and commas between several")
    return {code: count for code, _, count in pairs}


Counts = Annotated[
    dict[Annotated[str, Field(pattern=LANGUAGE_PATTERN)], Annotated[int, Field(ge=1)]], BeforeValidator(_counts)
]
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(comma_list), Field(min_length=1), EACH_ONCE]


@dataclass(frozen=True)
class RowFormat:
    """How text becomes rows of a model's input.

    Tokens see each other within a segment of a row: a sentence, a document (a line that stands alone is one), or the whole
    row (`boundaries="none"`). With `positions="boundary"` a segment's tokens have the positions that they would have in a
    row of their own behind `<s>`, whether the segment stands at the row's beginning or not; with "row" they count from
    the row's beginning.
    """

    length: int  # tokens of a row, `<s>` included
    mask_share: float = MASK_SHARE  # the share of a row's text that is predicted
    boundaries: Boundaries = "document"
    positions: Positions = "boundary"

    @property
    def masked(self) -> int:
        """How many positions of a row are predicted: `round(mask_share * (length - 1))`, at least one."""
        return max(1, round(self.mask_share * (self.length - 1)))

    @property
    def departures(self) -> list[str]:
        """How these rows differ from the paper's, in which every token sees the whole row; in words."""
        if self.boundaries == "none":
            return []
        positions = ", and its position is counted from there" if self.positions == "boundary" else ""
        return [f"a token of a packed row sees its own {self.boundaries} alone{positions}"]


class ModelConfig(Section):
    """Shape of the encoder (paper section 3.2 and appendix B)."""

    layers: int = key(2, "Transformer layers", ge=1)
    heads: int = key(4, "attention heads", ge=1)
    width: int = key(128, "hidden size", ge=8)
    head_width: int | None = key(None, "width of one attention head; default width / heads", ge=1)
    ffn: int = key(512, "inner width of the feed-forward layer", ge=8)
    adapter: int | None = key(None, "adapter bottleneck; default width / 4 (appendix B)", ge=1)
    adapter_activation: Literal["gelu", "relu", "tanh", "silu"] = key(
        "gelu", "adapter non-linearity; relu (the paper's example) makes finite differences unreliable"
    )
    adapter_after: Literal["both", "ffn"] = key(
        "both", "adapters after attention and feed-forward, or after the latter"
    )
    adapter_on: Literal["output", "sum"] = key(
        "output", "an adapter reads the sublayer's output (Houlsby et al.), or its sum with the residual (X-MOD, MAD-X)"
    )
    adapter_norm: Literal["none", "own", "layer"] = key(
        "none",
        "LayerNorm of an adapter's input: one of its own, which languages share, or the sublayer's once more",
    )
    adapter_skip: Literal["sum", "normed"] = key(
        "sum", "what an adapter's result is added to: the sum (MAD-X), or its normed form that the adapter read (X-MOD)"
    )
    dropout: float = key(0.1, "dropout on embeddings and residual branches", ge=0, lt=1)
    attention_dropout: float = key(0.1, "dropout on attention probabilities", ge=0, lt=1)
    norm: Literal["pre", "post"] = key(
        "pre", "LayerNorm before each sublayer, or after each residual sum (XLM, BERT, RoBERTa)"
    )
    embedding_norm: bool = key(False, "LayerNorm on the embeddings (XLM, BERT, RoBERTa)")
    epsilon: float = key(1e-5, "added to a LayerNorm's variance", gt=0)
    position_kind: Literal["learned", "rotary"] = key(
        "learned",
        "a table of learned positions is added to the embeddings, or queries and keys are rotated by theirs (Su et al., 2021)",
    )
    positions: int | None = key(
        None, "the longest row with its offset, and rows of the position table; default: data.sequence_length", ge=1
    )
    position_offset: int = key(0, "row of a text's first position (fairseq's models: 2, after the padding's)", ge=0)
    token_types: int = key(0, "rows of a token-type table, whose first is added to every token (BERT: 2)", ge=0)
    language_embeddings: bool = key(False, "add a learned embedding of the row's language")
    output_bias: Literal["frequency", "zero"] = key(
        "frequency", "bias of the output layer at the start: the corpus's log frequencies, or 0 as in XLM"
    )
    compile: Literal["auto"] | bool = key(
        "auto", "compile embeddings, layers and loss with torch.compile; auto: on accelerators", RESUMABLE
    )
    recompute: bool = key(False, "recompute activations in the backward pass (less memory, more time)")

    @model_validator(mode="after")
    def _head_width_divides(self) -> ModelConfig:
        if self.head_width is None and self.width % self.heads:
            raise ValueError(
                f"model.heads={self.heads} does not divide model.width={self.width}: "
                "change one of them or set model.head_width (the paper's 12 x 64 over 512)"
            )
        return self

    @model_validator(mode="after")
    def _rotates_pairs_of_channels(self) -> ModelConfig:
        if self.position_kind == "rotary" and self.kv_channels % 2:
            raise ValueError(
                f"model.position_kind=rotary turns pairs of a head's channels, and a head has {self.kv_channels}: "
                "set model.head_width to an even number"
            )
        if self.position_kind == "rotary" and self.position_offset:
            raise ValueError(
                f"model.position_offset={self.position_offset} is a row of the position table, which a model with "
                "model.position_kind=rotary lacks: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _adapters_stand_somewhere(self) -> ModelConfig:
        normed = self.adapter_norm != "none"
        if (normed and self.adapter_on != "sum") or (self.adapter_skip == "normed" and not normed):
            raise ValueError(
                f"model.adapter_on={self.adapter_on}, model.adapter_norm={self.adapter_norm}, model.adapter_skip="
                f"{self.adapter_skip}: a norm needs adapter_on=sum, and adapter_skip=normed needs a norm: change one"
            )
        return self

    @property
    def longest_row(self) -> int | None:
        """The longest row that the model reads, in tokens; None: data.sequence_length."""
        return None if self.positions is None else self.positions - self.position_offset

    @property
    def adapters(self) -> int:
        """The number of adapters in a layer."""
        return 1 if self.adapter_after == "ffn" else 2

    @property
    def kv_channels(self) -> int:
        """The width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def adapter_width(self) -> int:
        """Bottleneck width of an adapter: a quarter of the model by default (appendix B)."""
        return self.adapter or max(1, self.width // 4)


class PrecisionSection(Section):
    """Arithmetic, which a command without other training keys has too."""

    precision: Precision = key(
        "auto", "arithmetic; auto: fp16 on CUDA, bf16 on a CPU with bf16 arithmetic, else fp32", RESUMABLE
    )


class TrainConfig(PrecisionSection):
    """Optimisation with AdamW and the schedules of XLM."""

    steps: int = key(600, "optimizer steps", RESUMABLE, ge=1)
    batch: int = key(32, "rows of a global batch, over all ranks and micro-batches", ge=1)
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] | None = key(
        None,
        "rows a rank handles at once; default: all its rows; auto: on an accelerator as many as fit, found by trying",
        RESUMABLE,
    )
    seed: int = key(0, "seed of initialisation, data order, masks and dropout", ge=0)
    max_hours: float | None = key(None, "hours after which the run saves and stops; it can be resumed", RESUMABLE, gt=0)
    lr: float = key(1e-3, "peak learning rate", gt=0)
    schedule: Literal["inverse_sqrt", "constant"] = key(
        "inverse_sqrt", "rate after the warm-up: lr * sqrt(warmup / step), or lr"
    )
    warmup: int = key(100, "steps of linear warm-up from 1e-7", ge=0)
    beta1: float = key(0.9, "Adam's first decay rate", ge=0, lt=1)
    beta2: float = key(0.98, "Adam's second decay rate", ge=0, lt=1)
    eps: float = key(1e-6, "Adam's epsilon", gt=0)
    weight_decay: float = key(0.01, "decoupled weight decay (AdamW)", ge=0)
    clip: float = key(5.0, "clip the global gradient norm; 0 switches it off", ge=0)
    graphs: Literal["auto"] | bool = key(
        "auto", "replay forward and backward passes as CUDA graphs; auto: where they can be captured", RESUMABLE
    )
    idle_languages: Literal["auto", "host", "device"] = key(
        "auto",
        "where masters and moments of languages lie that a step does not train; auto: on the host with more than 8 "
        "languages on an accelerator",
        RESUMABLE,
    )
    freeze: Literal["none", "shared"] = key(
        "none", "shared: train only the language modules (and the rows of new pieces) of the model that init= names"
    )
    spike: float | None = key(
        10.0, "skip a step whose loss lies this many standard deviations above its mean; none: never", RESUMABLE, gt=0
    )
    epoch_steps: int = key(100, "steps between evaluations (the paper's epoch: 10000)", ge=1)
    save_steps: int | None = key(None, "steps between checkpoints; default: every epoch", RESUMABLE, ge=1)
    keep: int = key(2, "number of newest checkpoints kept, beside the best", RESUMABLE, ge=1)

    @property
    def fixed_micro_batch(self) -> int | None:
        """Rows of a micro-batch, where the configuration says how many."""
        return None if self.micro_batch == "auto" else self.micro_batch


class MetaConfig(Section):
    """The meta step of the meta_* variants (paper section 4, Algorithm 1, appendix B)."""

    beta: float | None = key(None, "step of the lookahead (Eq. 3); default: the current learning rate", gt=0)
    lookahead: Literal["sgd", "adam"] = key("sgd", "rule of the lookahead: the paper's, or Adam's own step")
    order: Literal["phi_first", "theta_first", "simultaneous"] = key(
        "phi_first",
        "Algorithm 1's order, that of the authors' released code, or both updates from one point (a pass less)",
    )
    reuse: bool = key(
        False,
        "every row trains both: theta's gradient on the validation rows and phi's ordinary one join the step "
        "(a departure from Algorithm 1; needs order=simultaneous)",
    )
    text: MetaText = key(
        "train",
        "rows of the validation loss: training text that the step does not read; half: the training text's "
        "second half, of which training proper reads the first; held_out: the corpus's meta split",
    )
    terms: Literal["both", "direct"] = key("both", "direct: leave the second-order term out (a control)")
    difference: Literal["central", "one_sided"] = key("central", "kind of finite difference in Eq. 8")
    radius: Literal["auto"] | Annotated[float, Field(gt=0, le=0.5)] = key(
        "auto", "displacement |e v| / |theta| of Eq. 8: a number, or auto: adapted while training"
    )
    check_every: int = key(100, "steps between self-checks of the finite difference; 0: off", ge=0)
    batch: int | None = key(None, "global rows of the validation loss; default train.batch", ge=1)
    languages_per_step: int | None = key(
        None, "languages drawn for the validation loss of a step, weighted without bias; default: all", ge=2
    )
    every: int = key(1, "k: only every k-th step is a meta step", ge=1)
    between: Literal["freeze", "plain"] = key(
        "freeze", "what the language modules do in the steps between: stay, or train plainly"
    )

    @model_validator(mode="after")
    def _reuse_needs_one_point(self) -> MetaConfig:
        if self.reuse and self.order != "simultaneous":
            raise ValueError(
                f"meta.reuse=true needs meta.order=simultaneous (now {self.order}): set it, or meta.reuse=false"
            )
        return self

    def departures(self, mixed: bool) -> list[str]:
        """How the meta step differs from Algorithm 1 with a held-out L^val, in words; mixed: steps mix languages."""
        texts = {
            "train": "reads training text that the step itself does not read",
            "half": "reads the second half of the training text, and training proper the first",
        }
        orders = {
            "theta_first": "updates the shared parameters before the language's",
            "simultaneous": "updates shared and language-specific parameters from one point",
        }
        said = [f"the meta step's validation loss {texts[self.text]}"] if self.text in texts else []
        said += [f"the meta step {orders[self.order]}"] if self.order in orders else []
        said += ["the rows of the validation loss train the shared parameters too"] * self.reuse
        said += ["a meta step updates the modules of all languages of its rows, which are mixed"] * mixed
        return said + ["the meta step looks ahead along Adam's step"] * (self.lookahead == "adam")


class ConflictSection(Section):
    """How the conflict between languages' gradients is measured (paper, section 3.1)."""

    sequences: int | None = key(
        None, "rows of each gradient; default 4096 as in the paper, 64 on a CPU; fewer where the text is short", ge=1
    )
    micro_batch: int = key(32, "rows a rank handles at once", ge=1)
    sketch: Literal["auto", "exact"] | Annotated[int, Field(ge=16)] = key(
        "auto",
        "dimension of each component's random projection (standard error (1-cos^2)/sqrt(dimension)), or "
        "exact: whole gradients are kept; auto: exact up to 4 languages, 4096 above",
    )


class ParallelConfig(Section):
    """Process layout: tensor-parallel groups of neighbours, data parallel across them."""

    tensor: int = key(1, "ranks that share one copy of the model (megatron tensor parallel)", ge=1)
    timeout: float = key(10.0, "minutes a rank waits for another before it declares the job lost", gt=0)


class TrackingConfig(Section):
    """Recording in MLflow, at the address in MLflow's own MLFLOW_TRACKING_URI (default: sqlite:///mlflow.db)."""

    enabled: bool = key(True, "record the run in MLflow")
    experiment: str = key("mlinterf_ds", "MLflow experiment name", min_length=1)
    parent: str | None = key(None, "MLflow run under which this one is nested, where its checkpoint names none")
    tags: dict[str, str] = key({}, "further tags of the run: --set tracking.tags.KEY=VALUE")
