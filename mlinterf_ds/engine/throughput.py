"""FLOPs of a row, rows of a step's passes and a device's peak, which give model FLOPs utilisation (MFU); peak memory."""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING

from mlinterf_ds.sections import MetaConfig, ModelConfig, has_adapters, is_meta

if TYPE_CHECKING:
    import torch  # a study's plan counts FLOPs without importing it

# Dense 16-bit tensor-core peak of one device (vendors' data sheets), FLOP/s.
# A name stands before those that it begins with.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "V100": 125e12}
PEAKS |= {"L40S": 362e12, "L40": 181e12, "A10G": 70e12, "A10": 125e12}


def flops_per_row(
    model: ModelConfig, length: int, vocabulary: int, masked: int, variant: str, *, as_computed: bool = False
) -> float:
    """FLOPs of one training row, forward and backward (three times forward); matrix products only.

    Per token and layer: 4 projections of width x inner, 2 of width x ffn, 2 score products of length x inner; per
    masked position the head's dense layer and the decoder; a layer's adapters where the model has them. MFU is usually told
    by these. as_computed=True leaves out what our last layer leaves out: all but the keys and values of the positions that
    no prediction reads.
    """
    inner = model.heads * model.kv_channels
    keys_and_values = 2 * 2 * model.width * inner
    per_token = keys_and_values + 2 * (2 * model.width * inner + 2 * model.width * model.ffn + 2 * length * inner)
    if has_adapters(variant):
        per_token += model.adapters * 2 * 2 * model.width * model.adapter_width
    head = 2 * masked * model.width * (model.width + vocabulary)
    unread = (length - masked) * (per_token - keys_and_values) if as_computed else 0
    return 3.0 * (length * model.layers * per_token - unread + head)


def passes(variant: str, meta: MetaConfig) -> dict[str, float]:
    """The number of passes of an average step by kind: "forward" passes, backward passes to "shared" and to "own" gradients,
    "write"s of displaced weights, and the forward passes over the rows of the "validation" loss.

    A plain step has one pass of each kind and displaces nothing. A meta step adds up its descent, its validation pass, the
    passes of the finite difference, and phase 2 (none of its own where both updates start from one point).
    """
    plain = {"forward": 1.0, "shared": 1.0, "own": 1.0, "write": 0.0, "validation": 0.0}
    if not is_meta(variant):
        return plain
    sided = 0 if meta.terms == "direct" else 1 if meta.difference == "one_sided" else 2
    whole = {"forward": 3.0 + sided, "shared": 3.0, "own": 1.0 + sided + (sided == 1), "write": 2.0 + 2 * sided}
    if meta.order == "simultaneous":  # phase 2 uses the descent's pass, which computes the module's gradient too
        whole |= {"forward": 2.0 + sided, "shared": 2.0, "own": 2.0 + sided}
    whole["validation"] = 1.0
    between = plain | {"own": 0.0} if meta.between == "freeze" else plain
    return {kind: (whole[kind] + (meta.every - 1) * between[kind]) / meta.every for kind in whole}


def rows_passed(variant: str, meta: MetaConfig, rows: int, *, apart: float = 1, frozen: bool = False) -> float:
    """The rows that an average step passes over, `rows` of training text and those of the validation loss, in whole passes.

    A pass to the gradients of one language alone counts two thirds: it skips the products of the shared weights' gradients.
    apart: passes of a plain step over all rows, one for each language under PCGrad. frozen: whether plain steps train languages alone.
    """
    if not is_meta(variant):
        return rows * apart * (2 / 3 if frozen else 1)
    times = passes(variant, meta)
    over_training = times["shared"] - times["validation"] + (times["forward"] - times["shared"]) * 2 / 3
    return rows * over_training + (meta.batch or rows) * times["validation"]


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that one rank can reach: from the data sheet of a known GPU, else as a large matrix product measures."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if known in name and dtype != torch.float32:
                return peak
    size = 1024 if device.type == "cpu" else 8192
    left = torch.ones(size, size, dtype=dtype, device=device)
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < 0.4:
        begin = time.perf_counter()
        product = left @ left
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """The most bytes that this rank has held so far: on the accelerator, or resident on a CPU."""
    from deepspeed.accelerator import get_accelerator

    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(get_accelerator().max_memory_allocated())
