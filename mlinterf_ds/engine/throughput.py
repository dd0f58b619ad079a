"""A row's FLOPs and the device's peak, which give model FLOPs utilisation (MFU); and the peak memory."""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING

from mlinterf_ds.sections import ModelConfig, has_adapters

if TYPE_CHECKING:
    import torch  # a study's plan counts FLOPs without importing it

# Dense 16-bit tensor-core peak of one device (vendors' data sheets), FLOP/s.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "V100": 125e12, "L40": 181e12, "A10": 125e12}


def flops_per_row(model: ModelConfig, length: int, vocabulary: int, masked: int, variant: str) -> float:
    """FLOPs of one training row, forward and backward (three times forward); matrix products only.

    Per token and layer: 4 projections of width x inner, 2 of width x ffn, 2 score products of length x inner; per
    masked position the head's dense layer and the decoder; two adapters a layer where the model has them.
    """
    inner = model.heads * model.kv_channels
    per_token = 2 * (4 * model.width * inner + 2 * model.width * model.ffn + 2 * length * inner)
    if has_adapters(variant):
        per_token += 2 * 2 * 2 * model.width * model.adapter_width
    head = 2 * masked * model.width * (model.width + vocabulary)
    return 3.0 * (length * model.layers * per_token + head)


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
