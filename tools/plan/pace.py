"""How long a step takes: products, attention, element-wise work, updates of the parameters, and waiting for the host.

A pass takes as long as the device computes, or as long as the host needs to launch its kernels if that is longer. The
counts describe the model without a compiler; what a compiler and graphs save shows in measured rates (`plan.py --calibrate`).
Legend: w is the model's width, i the heads' widths together, f the feed-forward width, a the adapter width, b the bytes of
a working weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlinterf_ds.engine.throughput import flops_per_row, passes
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.sections import has_adapters, is_meta
from tools.plan.arithmetic import BYTES, Device, ParameterCount, PlannedLayout, micro_rows

# Kernels of a forward and backward pass: of a layer, of an adapter, and of embeddings, head and loss.
LAYER_KERNELS, ADAPTER_KERNELS, OTHER_KERNELS = 110, 13, 120
ROTARY_KERNELS = (
    28  # of a layer, with rotary positions: four products, two sums and a copy each for queries and keys, twice
)
OWN_KERNELS, OWN_BYTES = 0.75, 0.9  # share of them, and of the moved bytes, in a pass to one language's gradients alone
RECOMPUTED = 1.4  # kernels and moved bytes with a second forward pass, in those of one


@dataclass(frozen=True)
class Rates:
    """What a device reaches. The defaults of a device are shares of its data sheet that an H100 was measured to reach."""

    products: float  # FLOP/s of matrix products
    attention: float  # FLOP/s of attention's two products, which are fused with the softmax between them
    elementwise: float  # bytes/s of element-wise kernels, sums and norms, as `moved` counts bytes
    memory: float  # bytes/s of long vectors: updates of the parameters
    launch: float  # seconds that the host takes to launch a kernel
    held: (
        float  # bytes of a pass's activations at its fullest moment, in those that it saves (`arithmetic.activations`)
    )

    @classmethod
    def expected(cls, device: Device, precision: str) -> Rates:
        peak = device.peak / (16 if precision == "fp32" else 1)
        return cls(0.79 * peak, 0.14 * peak, 0.46 * device.bandwidth, 0.78 * device.bandwidth, 36e-6, 2.0)


def moved(config: RunConfig, layout: PlannedLayout, vocabulary: int, rows: float) -> float:
    """Bytes that the element-wise kernels of a forward and backward pass over `rows` rows read and write.

    Of a token and layer: two norms (10 w), two dropouts (10 w) and residual sums (12 w) with their gradients, the GELU
    (5 f), sums of bias gradients (3 i + 2 w + f), queries, keys and values put together again (6 i); of rotary positions
    32 i; of an adapter 10 w + 6 a. Of a logit: casts to fp32 and back, the cross entropy's passes in fp32, the sum of the bias's gradient.
    """
    model, b, masked = config.model, BYTES[layout.precision], config.data.row_format.masked
    w, i, f = model.width, model.heads * model.kv_channels / layout.tensor, model.ffn / layout.tensor
    token = (38 if model.dropout else 28) * w + 9 * i + 6 * f
    token += 32 * i * (model.position_kind == "rotary")
    if has_adapters(config.variant):
        token += model.adapters * (10 * w + 6 * model.adapter_width / layout.tensor)
    tokens = rows * (
        (model.layers - 1) * config.data.sequence_length + masked
    )  # the last layer computes only what is read
    logits = rows * masked * vocabulary / layout.tensor
    return b * token * tokens * (RECOMPUTED if model.recompute else 1) + (44 + 5 * b) * logits


def pass_seconds(
    config: RunConfig, layout: PlannedLayout, rates: Rates, vocabulary: int, rows: float, *, own: bool = False
) -> dict[str, float]:
    """Seconds by cause of one forward and backward pass over a micro-batch; own: to one language's gradients alone."""
    model, length, masked = config.model, config.data.sequence_length, config.data.row_format.masked
    whole = rows * flops_per_row(model, length, vocabulary, masked, config.variant, as_computed=True)
    queries = (model.layers - 1) * length + masked
    attention = rows * 3 * queries * 2 * 2 * length * model.heads * model.kv_channels
    again = 4 / 3 if model.recompute else 1.0
    adapters = model.adapters * has_adapters(config.variant)
    kernels = OTHER_KERNELS + model.layers * (
        LAYER_KERNELS + adapters * ADAPTER_KERNELS + ROTARY_KERNELS * (model.position_kind == "rotary")
    )
    seconds = {
        "products": again * (2 / 3 if own else 1) * (whole - attention) / layout.tensor / rates.products,
        "attention": again * attention / layout.tensor / rates.attention,
        "element-wise": (OWN_BYTES if own else 1) * moved(config, layout, vocabulary, rows) / rates.elementwise,
    }
    host = kernels * (OWN_KERNELS if own else 1) * (RECOMPUTED if model.recompute else 1) * rates.launch
    return seconds | {"waiting for launches": max(0.0, host - sum(seconds.values()))}


def update_seconds(config: RunConfig, count: ParameterCount, layout: PlannedLayout, rates: Rates) -> float:
    """Seconds of an average step outside its passes: gradients summed up, AdamW, working weights, the meta step's vectors.

    Bytes of a parameter: 10 to add a 16-bit gradient to an fp32 sum, for each micro-batch; 46 for norm, clipping, AdamW
    and cast; in a meta step 14 for each write of displaced weights and 48 for the norms and sums of its vectors.
    """
    times = passes(config.variant, config.meta)
    micro = max(1, config.train.batch // layout.data // micro_rows(config, layout.data))
    shared = 10 * micro * times["shared"] + (46 + 14 * times["write"] + 48 * is_meta(config.variant)) / layout.share
    own = (10 * micro * times["own"] + 46 / layout.share) * (count.own > 0)
    return (shared * count.shared + own * count.trained) / rates.memory


def compute_seconds(
    config: RunConfig, count: ParameterCount, layout: PlannedLayout, rates: Rates, vocabulary: int
) -> dict[str, float]:
    """Seconds of an average step on one rank by cause, without communication."""
    times, rows = passes(config.variant, config.meta), config.train.batch / layout.data
    validation_rows = (config.meta.batch or config.train.batch) / layout.data
    size = micro_rows(config, layout.data)
    counts = [  # passes over micro-batches: how many, of which rows, to which gradients
        (times["shared"] - times["validation"], rows, False),
        (times["validation"], validation_rows, False),
        (times["forward"] - times["shared"], rows, True),
    ]
    seconds: dict[str, float] = {}
    for number, of_rows, own in counts:
        one = min(size, of_rows)
        for cause, spent in pass_seconds(config, layout, rates, vocabulary, one, own=own).items():
            seconds[cause] = seconds.get(cause, 0.0) + number * of_rows / one * spent
    return seconds | {"updates": update_seconds(config, count, layout, rates)}
