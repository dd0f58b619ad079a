"""Computes what a run needs before it starts: parameters, memory of a rank by kind, communication, seconds of a step.

Everything is arithmetic on the run configuration; tests/parity/test_plan.py compares it with what real runs hold and send.
Legend: w is the model's width, f its feed-forward width, a its adapter width, v the padded vocabulary, n the tokens of a
micro-batch, m its masked positions, b the bytes of a working weight. All languages use the "shared" parameters; "own"
parameters belong to one language.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from mlinterf_ds.engine.throughput import flops_per_row, passes, rows_passed
from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.sections import MetaConfig, has_adapters, is_meta, is_routed

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FEW_LANGUAGES = 8  # more than that, and train.idle_languages=auto keeps idle ones on the host (engine/engine.py)
STATE = 12  # bytes of an fp32 master weight and its two moments
PERSISTENT = 10_000  # ZeRO 3 keeps parameters of at most so many elements whole (stage3_param_persistence_threshold)
BUCKET = 20_000_000  # elements that are reduced at once (reduce_bucket_size)
LIVE = 1_000_000_000  # elements that ZeRO 3 keeps gathered from the forward to the backward pass (DeepSpeed's default)


@dataclass(frozen=True)
class PlannedLayout:
    """How a planned run is divided over ranks, and the precision of its weights."""

    ranks: int
    tensor: int  # ranks of a tensor-parallel group
    stage: int  # ZeRO's stage
    precision: str

    @property
    def data(self) -> int:
        return self.ranks // self.tensor

    @property
    def share(self) -> int:
        """The number of ranks over which master weights and moments are divided."""
        return self.data if self.stage else 1


@dataclass(frozen=True)
class ParameterCount:
    """The number of elements that one tensor-parallel rank holds, before ZeRO divides them."""

    shared: int
    own: int  # one language's own parameters
    languages: int  # how many languages have parameters of their own
    small: int  # the shared parameters that ZeRO 3 never divides
    matrix: int  # the largest matrix of a layer
    together: int  # how many languages' own parameters a step trains

    @property
    def trained(self) -> int:
        """The languages' own parameters that a step trains."""
        return self.own * self.together

    @property
    def total(self) -> int:
        return self.shared + self.own * self.languages


def _linear(out: int, into: int, tensor: int, *, column: bool) -> list[int]:
    """Elements of the weight and of the bias of a column- or row-parallel linear layer on one rank."""
    return [out * into // tensor, out // tensor if column else out]


def parameters(config: RunConfig, languages: int, vocabulary: int, tensor: int) -> ParameterCount:
    """Counts the encoder's parameters (mlinterf_ds/model) on one rank of a tensor-parallel group of size `tensor`."""
    model, routing = config.model, config.routing
    w, inner = model.width, model.heads * model.kv_channels
    v = -(-vocabulary // 64) * 64
    attention = _linear(3 * inner, w, tensor, column=True) + _linear(w, inner, tensor, column=False)
    ffn = _linear(model.ffn, w, tensor, column=True) + _linear(w, model.ffn, tensor, column=False)
    a = model.adapter_width
    adapters = model.adapters * (_linear(a, w, tensor, column=True) + _linear(w, a, tensor, column=False))
    parts = {"attn": attention, "ffn": ffn, "adpt": adapters if has_adapters(routing) else []}
    if is_routed(routing) and routing not in parts:
        raise UserError(
            f"variant={config.variant}: the plan does not count its modules; add them to {Path(__file__).name}"
        )
    own = parts.pop(routing, [])
    own_norms = model.adapters if has_adapters(routing) and model.adapter_norm == "own" else 0
    layer = [(2 + own_norms) * [w, w], *parts.values()]
    in_layer = [size for part in layer for size in part]
    outside = [
        v * w // tensor,
        (model.positions or config.data.sequence_length) * w * (model.position_kind == "learned"),
        model.token_types * w,
    ]  # embeddings
    outside += [w, w] * ((model.norm == "pre") + model.embedding_norm)
    outside += [w * w, w, w, w, v // tensor]  # head
    if model.language_embeddings:
        outside.append(languages * w)
    sizes = in_layer * model.layers + outside
    return ParameterCount(
        shared=sum(sizes),
        own=sum(own) * model.layers,
        languages=languages if own else 0,
        small=sum(size for size in sizes if size <= PERSISTENT),
        matrix=max(in_layer),
        together=languages
        if config.data.meta_rows
        else len(config.data.only or range(languages))
        if config.data.mixed
        else 1,
    )


def memory(
    config: RunConfig, count: ParameterCount, layout: PlannedLayout, vocabulary: int, on_gpu: bool = True
) -> dict[str, float]:
    """Bytes that one rank holds at the fullest moment of a step, by kind.

    "weights" and "optimizer" (master weights and moments) are those of the shared parameters; "own modules" are the weights,
    masters and moments of all languages' own parameters. "gradients" include DeepSpeed's buffers, "gathered" are the weights
    that ZeRO 3 collects for a pass, "meta step" the vectors that a meta step keeps beside the gradients, and "activations"
    are those of one micro-batch.
    """
    b, d = BYTES[layout.precision], layout.share
    cut = layout.data if layout.stage == 3 else 1
    size = {
        "weights": b * ((count.shared - count.small) / cut + count.small if cut > 1 else count.shared),
        "optimizer": STATE * count.shared / d,
        "own modules": count.own * (count.languages * b / cut + _with_state_here(config, count, on_gpu) * STATE / d),
    }
    vector, own = 4 * count.shared / d, 4 * count.trained / d
    size["gradients"] = _gradients(count, layout, vector, own)
    if layout.stage == 3:
        size["gathered"] = b * min(LIVE, count.shared - count.small) if layout.data > 1 else 0.0
    if is_meta(config.variant):
        size["meta step"] = _meta_vectors(config.meta, vector, own, size["gradients"])
        if config.meta.order != "simultaneous":  # the first update of two in turn may be undone
            size["meta step"] += STATE * count.trained / d
    rows = micro_rows(config, layout.data)
    size["activations"] = activations(config, rows, vocabulary, layout, on_gpu)
    if config.variant == "meta_ffn" and not config.model.recompute and layout.stage < 3:
        # A pass asks for the gradients of the languages that the step trains, so the layers of the others do not keep their inputs.
        # (Under ZeRO 3 they do: DeepSpeed replaces the linear layer by one that always keeps its input.)
        others = 1 - min(1, count.together / (config.meta.languages_per_step or count.languages))
        tokens = rows * ((config.model.layers - 1) * config.data.sequence_length + config.data.row_format.masked)
        size["activations"] -= others * b * tokens * (config.model.width + config.model.ffn / layout.tensor)
    return size


def _with_state_here(config: RunConfig, count: ParameterCount, on_gpu: bool) -> int:
    """How many languages' masters and moments lie on the device: all, or where idle ones lie on the host the step's and those
    still written back from the step before."""
    kept = config.train.idle_languages
    on_host = kept == "host" or (kept == "auto" and on_gpu and count.languages > FEW_LANGUAGES)
    return min(2 * count.together, count.languages) if on_host else count.languages


def _meta_vectors(meta: MetaConfig, vector: float, own: float, gradients: float) -> float:
    """Bytes of vectors that a meta step holds beside its gradients, at its fullest moment; `vector` is one of theta, `own` one of the
    languages' parameters that it trains.

    The validation pass still holds the descent direction, and in a run's first step, which tries radii, the vectors of the
    try before; the last displaced pass holds v and two gradients of phi.
    """
    descent = (1 + (meta.lookahead == "adam")) * vector
    if meta.radius == "auto" and meta.terms == "both":
        descent += (2 + (meta.order == "simultaneous")) * vector + 3 * own
    displaced = 2 * vector + 3 * own - gradients if meta.terms == "both" else 0.0
    if (
        meta.order == "simultaneous"
    ):  # the descent's gradients are kept for the update, and those of the validation rows
        descent += own
        displaced += vector + own + (vector if meta.reuse and meta.lookahead == "adam" else 0.0)
    return max(descent, displaced)


def _gradients(count: ParameterCount, layout: PlannedLayout, vector: float, own: float) -> float:
    """Bytes of gradients and of DeepSpeed's buffers for them at the end of a pass; `vector`: of an fp32 one of the shared
    parameters, `own`: of the languages' own that the step trains."""
    b, stage = BYTES[layout.precision], layout.stage
    if stage == 3:
        return own + vector + b * BUCKET
    if stage == 0 or layout.data == 1:  # nothing is partitioned: the buffer of arriving gradients, and their fp32 sum
        return (b + 4) * (count.shared + count.trained)
    return own + _partitioned_gradients(count, layout, vector)


def _partitioned_gradients(count: ParameterCount, layout: PlannedLayout, vector: float) -> float:
    """Bytes of the shared parameters' gradients under ZeRO 1 and 2."""
    b, stage = BYTES[layout.precision], layout.stage
    if stage == 1 and layout.precision == "bf16":  # BF16_Optimizer keeps whole fp32 sums beside the 16-bit gradients
        return 4 * count.shared + max(b * count.shared, vector)
    size = 2 * vector  # the averaged pieces, and the flat vector that sums them
    if layout.precision == "fp16":
        size += 4 * BUCKET  # two buffers of 16-bit elements
    if layout.precision == "fp32" and layout.data > 1:  # a piece is a view that keeps its parameter's whole gradient
        size += b * count.matrix
    return size


def micro_rows(config: RunConfig, data: int) -> int:
    """Rows of a micro-batch: `train.micro_batch`, or all rows of a rank where the configuration leaves it open or to the device."""
    return config.train.fixed_micro_batch or max(1, config.train.batch // data)


def activations(config: RunConfig, rows: int, vocabulary: int, layout: PlannedLayout, on_gpu: bool) -> float:
    """Bytes that a forward pass of `rows` rows saves for its backward pass; flash attention saves no score matrix."""
    model, b, w, tensor = config.model, BYTES[layout.precision], config.model.width, layout.tensor
    n, m = rows * config.data.sequence_length, rows * config.data.row_format.masked
    inner = model.heads * model.kv_channels / tensor
    layer, last = _saved_by_layer(config, layout, n, n, on_gpu), _saved_by_layer(config, layout, n, m, on_gpu)
    last += b * m * w  # the outputs of the last layer's first norm that are read are copied
    if tensor > 1:
        last += b * n * inner  # all queries are computed, and those that are read copied
    layers = model.layers * b * n * w + layer if model.recompute else (model.layers - 1) * layer + last
    dropped = (1 if on_gpu else b) * n * w if model.dropout else 0.0  # the mask of the embeddings' dropout
    v = -(-vocabulary // 64) * 64 / tensor
    head = (
        b * m * 5 * w + 8 * m + 4 * m * v
    )  # inputs of final norm, dense layer, GELU, norm and decoder; the fp32 softmax
    mask = 0.0
    if config.data.boundaries != "none" and on_gpu:  # a boolean per pair of tokens, and each layer's copy in numbers
        mask = rows * config.data.sequence_length**2 * (1 + b * (1 if model.recompute else model.layers))
    return layers + dropped + 8 * n + head + mask


def _saved_by_layer(config: RunConfig, layout: PlannedLayout, n: int, m: int, on_gpu: bool) -> float:
    """Bytes that a layer saves which reads `n` tokens and computes `m` of them.

    Those are inputs and outputs of both norms and of the GELU; queries, keys, values and what attention makes of them; the
    statistics of norms and softmax; the masks of dropout; an adapter's input, and the input and output of its activation.
    """
    model, tensor, b = config.model, layout.tensor, BYTES[layout.precision]
    w, f = model.width, model.ffn / tensor
    inner, heads = model.heads * model.kv_channels / tensor, model.heads / tensor
    saved = b * (n * (2 * w + 2 * inner) + m * (2 * w + 2 * inner + 2 * f)) + 4 * (2 * n + m * (2 + heads))
    if not on_gpu and layout.precision != "fp32":  # a CPU writes attention out: scaled queries and the scores' softmax
        saved += b * m * (inner + heads * config.data.sequence_length)
    elif model.position_kind == "rotary":  # turned queries and keys, beside the values' buffer with those of before
        saved += b * (n + (m if m == n else 0)) * inner
    if has_adapters(config.variant):
        saved += model.adapters * b * m * (w + 2 * model.adapter_width / tensor)
    return saved + (2 * (1 if on_gpu else b) * m * w if model.dropout else 0.0)


Volume = dict[str, float]  # collective -> bytes


def data_parallel_volume(config: RunConfig, count: ParameterCount, layout: PlannedLayout) -> Volume:
    """Bytes of the whole tensors that one rank enters into the data-parallel collectives of a step, by collective."""
    if layout.data == 1:
        return {}
    b, times, stage = BYTES[layout.precision], passes(config.variant, config.meta), layout.stage
    shared, own = b * count.shared, b * count.trained
    micro = max(1, config.train.batch // layout.data // micro_rows(config, layout.data))
    if stage == 0:
        return {"all_reduce": 4 * times["shared"] * count.shared + 4 * times["own"] * count.trained}
    volume = {"reduce_scatter": 4 * times["own"] * count.trained * micro, "all_gather": 0.0}
    writes = times["write"] + 1
    if stage == 3:
        cut = b * (count.shared - count.small) + own  # DeepSpeed may keep some from the forward to the backward pass
        volume["all_gather"] = micro * (times["forward"] * 2 * cut) + writes * b * count.small
        volume["reduce_scatter"] += micro * times["shared"] * shared
        return volume
    volume["all_reduce"] = times["shared"] * shared * (micro if stage == 2 else 1)
    volume["all_gather"] = writes * shared + own * (
        1 + is_meta(config.variant) / config.meta.every
    )  # phi is written twice
    return volume


def tensor_parallel_volume(config: RunConfig, layout: PlannedLayout) -> float:
    """Bytes of the tensors that one rank enters into the tensor-parallel all-reduces of a step."""
    if layout.tensor == 1:
        return 0.0
    model, b, times = config.model, BYTES[layout.precision], passes(config.variant, config.meta)
    rows = config.train.batch / layout.data
    n, m = rows * config.data.sequence_length, rows * config.data.row_format.masked
    sums = 2 + (
        model.adapters if has_adapters(config.variant) else 0
    )  # row-parallel linear layers of a transformer layer
    outputs = sums * ((model.layers - 1) * n + m)  # the last layer computes what is read, but queries of all tokens
    forward = model.width * b * (outputs * (2 if model.recompute else 1) + n)
    backward = model.width * b * (outputs + n)
    # A pass to one language's gradients ends at the first layer's own module, before the gradient of the attention's input.
    ends_early = (times["forward"] - times["shared"]) * model.width * b * n * (config.routing in ("adpt", "ffn"))
    return times["forward"] * (forward + backward + 3 * 4 * m) - ends_early


def step_flops(config: RunConfig, vocabulary: int) -> float:
    """FLOPs of the products that an average step computes over all ranks, those computed again included."""
    masked, length = config.data.row_format.masked, config.data.sequence_length
    row = flops_per_row(config.model, length, vocabulary, masked, config.variant, as_computed=True)
    return rows_passed(config.variant, config.meta, config.train.batch) * row * (4 / 3 if config.model.recompute else 1)


def model_flops(config: RunConfig, vocabulary: int) -> float:
    """FLOPs of an average step's passes as MFU counts them: every layer at every position, nothing twice."""
    row = flops_per_row(
        config.model, config.data.sequence_length, vocabulary, config.data.row_format.masked, config.variant
    )
    return row * rows_passed(config.variant, config.meta, config.train.batch)


def ring(collective: str, size: float, ranks: int) -> float:
    """Bytes that a rank sends in a ring collective over a tensor of `size` bytes."""
    return size * (ranks - 1) / ranks * (2 if collective == "all_reduce" else 1)


@dataclass(frozen=True)
class Device:
    """An accelerator and its links, from the vendors' data sheets."""

    memory: float  # bytes
    peak: float  # dense 16-bit FLOP/s
    near: float  # bytes/s each way to the other accelerators of its host
    far: float  # bytes/s each way to other hosts: its share of the host's network
    bandwidth: float  # bytes/s between the device and its memory


DEVICES = {
    "h200": Device(141e9, 989e12, 450e9, 50e9, 4.8e12),
    "h100": Device(80e9, 989e12, 450e9, 50e9, 3.35e12),
    "a100": Device(80e9, 312e12, 300e9, 25e9, 2e12),
    "a100-40": Device(40e9, 312e12, 300e9, 25e9, 1.56e12),
    "v100": Device(32e9, 125e12, 150e9, 12.5e9, 9e11),
    "l40": Device(48e9, 181e12, 32e9, 12.5e9, 8.64e11),
    "a10": Device(24e9, 125e12, 32e9, 6e9, 6e11),
    "rtx6000-ada": Device(48e9, 364e12, 32e9, 3e9, 9.6e11),
    "a6000": Device(48e9, 155e12, 56e9, 3e9, 7.68e11),
    "rtx5090": Device(32e9, 209e12, 64e9, 1.2e9, 1.79e12),  # workstations: ten gigabits a second from a host
    "rtx4090": Device(24e9, 165e12, 32e9, 1.2e9, 1.01e12),
    "rtx3090": Device(24e9, 71e12, 32e9, 1.2e9, 9.36e11),
}
USABLE = 0.9  # share of the memory; the rest goes to the driver, the libraries and fragmentation


def communication_seconds(
    config: RunConfig, count: ParameterCount, layout: PlannedLayout, device: Device, per_host: int
) -> dict[str, float]:
    """Seconds of a step's collectives, counted in full, as if none of them overlapped with arithmetic."""
    link = device.far if layout.ranks > per_host else device.near
    volume = data_parallel_volume(config, count, layout)
    sent = {name: ring(name, size, layout.data) / link for name, size in volume.items()}
    inside = ring("all_reduce", tensor_parallel_volume(config, layout), layout.tensor)
    return sent | {"tensor parallel": inside / (device.near if layout.tensor <= per_host else device.far)}


def divides(config: RunConfig, layout: PlannedLayout, per_host: int) -> bool:
    """Whether this layout divides the model's matrices and the batch without remainder."""
    model = config.model
    if layout.ranks % layout.tensor or layout.tensor > per_host or config.train.batch % layout.data:
        return False
    cut = [model.heads, model.ffn, *([model.adapter_width] if has_adapters(config.variant) else [])]
    rows = config.train.batch // layout.data
    micro = config.train.fixed_micro_batch
    return (
        all(size % layout.tensor == 0 for size in cut)
        and math.gcd(64, layout.tensor) == layout.tensor
        and not (micro and rows % micro)
    )
