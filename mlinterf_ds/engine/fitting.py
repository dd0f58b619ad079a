"""The largest micro-batch that fits the device.

An attempt runs the forward and backward passes of one micro-batch while it holds as much memory as the vectors of a step
take. It uses neither DeepSpeed nor collectives, so that a size that does not fit leaves nothing behind, and no rank waits
for one that ran out of memory. The ranks then agree on a size that fits all of them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mlinterf_ds.errors import UserError
from mlinterf_ds.model.encoder import SHARED, Rows

if TYPE_CHECKING:
    from mlinterf_ds.engine.engine import Engine

LEAST = 4  # rows of a micro-batch; where fewer would fit, activations are recomputed first
UNTRIED = 16  # rows of a micro-batch under ZeRO 3 and tensor parallelism, where no rank can run a pass alone
ROOM = 0.9  # share of the memory that may be used; the rest is left to fragmentation and the libraries


def fit_micro_batch(engine: Engine, most: int, batches: Callable[[int], Sequence[Rows]], vectors: int) -> str:
    """Sets the engine's micro-batch to the largest power of two up to `most` rows that fits; returns a note for the user.

    batches: makes the batches, of a given number of rows, whose passes are tried. vectors: the number of fp32 vectors as
    long as the shared parameters that a step holds beside masters and moments. On a CPU a rank takes all its rows at once,
    and the note is empty. Raises UserError if not even one row fits.
    """
    if engine.device.type == "cpu":
        return ""
    if engine.stage == 3 or engine.layout.tensor > 1:
        engine.micro = min(most, UNTRIED)
        return (
            f"micro-batches of {engine.micro} rows (auto tries nothing under ZeRO 3 and tensor parallelism: "
            "train.micro_batch=N sets another size)"
        )

    def attempt(rows: int) -> None:
        _pass_over(engine, batches(rows), vectors)

    layers = [module for module in engine.model.modules() if hasattr(module, "recompute")]
    size, recompute = largest(most, LEAST, attempt, engine.device), ""
    if not size:
        for layer in layers:
            layer.recompute = True
        size, recompute = largest(most, 1, attempt, engine.device), ", activations recomputed"
    if not size:
        raise UserError(
            f"train.micro_batch=auto: not even one row fits this {engine.device.type}, activations recomputed: use a "
            "higher ZeRO stage, offload the optimizer (ds_configs/zero2_offload.json), or set parallel.tensor"
        )
    engine.micro = size
    return f"micro-batches of {size} rows (auto{recompute})"


def largest(most: int, least: int, attempt: Callable[[int], None], device: torch.device) -> int:
    """The largest power of two from `least` to `most` whose attempt raises torch.OutOfMemoryError on no rank; 0 if none."""
    size = 1 << (most.bit_length() - 1)
    least = min(least, size)
    while size >= least:
        fits = True
        try:
            attempt(size)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            fits = False
        release(device)  # after the `except`, in which the error still holds the attempt's tensors
        agreed = torch.tensor(float(fits), device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        if agreed.item():
            return size
        size //= 2
    return 0


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has no memory left; CUDA and its libraries, which allocate too, say so in words.

    So does an error that came of such a one: a capture that cannot go on ends with an error of its own.
    """
    words = "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    if isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in words):
        return True
    return error.__context__ is not None and out_of_memory(error.__context__)


def _pass_over(engine: Engine, batches: Sequence[Rows], vectors: int) -> None:
    """Runs forward and backward over each batch, and changes nothing.

    Raises torch.OutOfMemoryError if less than a tenth of the memory is left.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.reset_peak_memory_stats()
    length = vectors * sum(master.numel() for master in engine.spaces[SHARED].masters)
    held = torch.empty(length, dtype=torch.float32, device=engine.device)
    engine.model.train()
    spaces = [engine.spaces[name] for name in engine.groups_of(batches[0].step_languages)]
    engine.passes.require(spaces)
    for batch in batches:
        parameters = [parameter for space in spaces for parameter in space.parameters.values()]
        loss, _ = engine.model(batch.to(engine.device))
        torch.autograd.grad(loss, parameters, allow_unused=True)  # runs no hooks of the parameters
    del held
    if accelerator.max_memory_allocated() > ROOM * accelerator.total_memory():
        raise torch.OutOfMemoryError


def release(device: torch.device) -> None:
    if device.type != "cpu":
        from deepspeed.accelerator import get_accelerator

        gc.collect()
        get_accelerator().empty_cache()
