"""Merges DeepSpeed's JSON with the training section: precision, batch sizes, clipping, ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.sections import TrainConfig

# The keys of the JSON's fp16 section that the loss scale reads, each with its least value.
FP16 = {"loss_scale": 0, "initial_scale_power": 0, "loss_scale_window": 1, "hysteresis": 1, "min_loss_scale": 1e-6}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def read_deepspeed_json(path: str | Path) -> dict[str, Any]:
    """Reads a DeepSpeed configuration file; UserError if a section of it cannot be used."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: {error.strerror}; the shipped ones are in ds_configs/") from None
    with refusing(f"{path}: not JSON"):
        settings = json.loads(data)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(settings).__name__}")
    for section in ("fp16", "bf16", "zero_optimization", "data_types"):
        if not isinstance(settings.get(section, {}), dict):
            raise UserError(f"{path}: {section} must be an object in braces, found {settings[section]!r}")
    for key, least in FP16.items():
        value = settings.get("fp16", {}).get(key, "auto")
        if value != "auto" and (type(value) not in (int, float) or not value >= least):
            raise UserError(f'{path}: fp16.{key}={value!r}: expected a number, {least:g} or more, or "auto"')
    for section in settings.keys() & {"optimizer", "scheduler"}:
        raise UserError(f"{path}: remove '{section}': the run configuration decides it (train.lr, train.schedule, ...)")
    return settings


def bf16_arithmetic() -> bool:
    """Whether this device has bf16 arithmetic (a CPU without it emulates bf16, slower than fp32)."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        has = torch.cpu.get_capabilities()
        if has["architecture"] == "x86_64":  # where oneDNN calls bf16 supported although it emulates it
            return bool(has["avx512_bf16"] or has["amx_bf16"])
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(get_accelerator().is_bf16_supported())


def choose_precision(wanted: str, deepspeed_json: dict[str, Any]) -> tuple[str, str]:
    """(precision, the reason in words), from train.precision and the JSON's fp16 and bf16 sections."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    switches = {name: deepspeed_json.get(name, {}).get("enabled", "auto") for name in ("fp16", "bf16")}
    forced = [name for name, enabled in switches.items() if enabled is True]
    refused = [name for name, enabled in switches.items() if enabled is False]
    if len(forced) > 1:
        raise UserError('DeepSpeed\'s JSON enables fp16 and bf16 at once: leave one, or set both to "auto"')
    if wanted != "auto" and ((forced and forced[0] != wanted) or wanted in refused):
        switch = f"{forced[0]}.enabled=true" if forced else f"{wanted}.enabled=false"
        raise UserError(f'train.precision={wanted} contradicts {switch} in DeepSpeed\'s JSON: set the JSON to "auto"')
    device = accelerator.device_name()
    if wanted != "auto" or forced:
        choice, why = (forced[0] if forced else wanted), "as set"
    elif device != "cpu" and accelerator.is_fp16_supported() and "fp16" not in refused:
        choice, why = "fp16", f"auto on {device}"
    elif bf16_arithmetic() and "bf16" not in refused:
        choice, why = "bf16", f"auto: this {device} computes in bf16"
    else:
        choice, why = "fp32", f"auto: this {device} has no 16-bit arithmetic"
    if choice == "fp16" and not accelerator.is_fp16_supported():
        raise UserError(
            f"train.precision=fp16: this {device} has no fp16 arithmetic (GPUs have): use bf16, fp32 or auto"
        )
    if choice == "bf16" and not accelerator.is_bf16_supported():
        raise UserError(f"train.precision=bf16: this {device} does not support bf16; use fp16, fp32 or auto")
    if choice == "bf16" and not bf16_arithmetic():
        why += f" (this {device} emulates bf16: slower than fp32)"
    return choice, why


def resolve(deepspeed_json: dict[str, Any], training: TrainConfig, precision: str, data_ranks: int) -> dict[str, Any]:
    """DeepSpeed's JSON with every "auto" decided; UserError where it contradicts the training section."""
    rows = rows_per_rank(training, data_ranks)
    micro = training.fixed_micro_batch or rows
    decided = {
        "train_batch_size": ("train.batch", training.batch),
        "train_micro_batch_size_per_gpu": ("train.micro_batch", micro),
        "gradient_accumulation_steps": ("train.batch / ranks / train.micro_batch", rows // micro),
        "gradient_clipping": ("train.clip", training.clip),
    }
    for key, (run_key, value) in decided.items():
        in_json = deepspeed_json.get(key, "auto")
        if in_json != "auto" and (type(in_json) not in (int, float) or in_json != value):
            raise UserError(
                f'DeepSpeed\'s JSON says {key}={in_json}, the run says {run_key}={value}: set the JSON to "auto"'
            )
    stage = deepspeed_json.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"zero_optimization.stage={stage!r} in DeepSpeed's JSON: expected 0, 1, 2 or 3")
    zero = dict(deepspeed_json.get("zero_optimization", {}), stage=stage)
    if zero.get("round_robin_gradients"):
        raise UserError("zero_optimization.round_robin_gradients=true is not supported: remove it")
    resolved = {key: value for key, value in deepspeed_json.items() if key not in ("fp16", "bf16", *decided)}
    resolved |= {
        # To DeepSpeed one backward pass is one step; the engine accumulates, clips, scales the loss and updates.
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32", **deepspeed_json.get("data_types", {})},
        "steps_per_print": 2**62,
    }
    if precision != "fp32":
        resolved[precision] = {"enabled": True} | ({"loss_scale": 1.0} if precision == "fp16" else {})
    return resolved


def rows_per_rank(training: TrainConfig, data_ranks: int) -> int:
    """Rows of a global batch that one data-parallel rank takes; UserError if they cannot be shared out evenly."""
    batch, micro = training.batch, training.fixed_micro_batch
    if batch % data_ranks:
        raise UserError(f"train.batch={batch} is not divisible by {data_ranks} data-parallel ranks: change one of them")
    rows = batch // data_ranks
    if micro and rows % micro:
        raise UserError(f"train.micro_batch={micro} does not divide the {rows} rows of a rank (train.batch={batch})")
    return rows
