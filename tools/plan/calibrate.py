"""`plan.py --calibrate`: measures within a minute what the device at hand reaches, and keeps it for later plans.

Products and long sums are timed alone. What a training step adds comes from our own steps: those over few rows take as
long as the host needs for their launches, those over many rows as long as the device computes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import write_json
from mlinterf_ds.pretrain.config import RunConfig
from tools.plan import pace
from tools.plan.arithmetic import DEVICES, PlannedLayout, memory, parameters

VOCABULARY = 32_000


def rates_file(gpu: str) -> Path:
    """Where the measured rates of a device are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mlinterf_ds" / f"rates-{gpu}.json"


def kept_rates(gpu: str, precision: str) -> pace.Rates | None:
    """The rates that were measured on such a device in this precision, if they were."""
    path = rates_file(gpu)
    if not path.is_file():
        return None
    with refusing(f"{path}: not what plan.py --calibrate writes", "; measure again, or remove it"):
        rates = {name: pace.Rates(**values) for name, values in json.loads(path.read_bytes()).items()}
        if any(not (math.isfinite(value) and value > 0) for kept in rates.values() for value in asdict(kept).values()):
            raise ValueError("a rate is not above 0")
    return rates.get(precision)


def name_of_device() -> str:
    """The device at hand as `--gpu` names it. Raises UserError for one that plans do not know."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("plan.py --calibrate measures a GPU, and there is none here: run it where you will train")
    name = torch.cuda.get_device_name()
    if not (gpu := known_as(name)):
        raise UserError(f"{name}: a device that plans do not know; they know {', '.join(sorted(DEVICES))}")
    return gpu


def known_as(name: str) -> str:
    """What `--gpu` calls a device of this name; '' if plans do not know it."""
    letters = name.lower().replace(" ", "")
    known = [gpu for gpu in DEVICES if all(part in letters for part in gpu.split("-"))]
    return max(known, key=len, default="")


def calibrate(precision: str) -> tuple[str, pace.Rates]:
    """Measures the device at hand and adds its rates in this precision to those kept; its name and the rates."""
    gpu = name_of_device()
    rates = measure(precision, few=8, many=128)
    path = rates_file(gpu)
    kept = json.loads(path.read_bytes()) if kept_rates(gpu, precision) else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, kept | {precision: asdict(rates)})
    return gpu, rates


def measure(precision: str, few: int, many: int, settings: tuple[str, ...] = ()) -> pace.Rates:
    """Rates from products, a long sum, and our steps over `few` and `many` rows of the shape of `paper_8heads`."""

    from tools.bench.engines import build, plain_step, start
    from tools.bench.timing import interleaved

    start(0, 1, tempfile.mkdtemp(), len(os.sched_getaffinity(0)))
    options = argparse.Namespace(vocabulary=VOCABULARY, precision=precision, set=list(settings))
    work: dict[str, Callable[[], Any]] = {}
    for name, rows in (("few", few), ("many", many)):
        held = _allocated(reset=True)
        shape = ["variant=joint", f"train.batch={rows}", f"train.micro_batch={rows}"]
        engine, config, train, _ = build(options, ["l0"], "paper_8heads", shape, "zero0", fast=True)
        work[name] = plain_step(engine, train(0))
        for _ in range(6):  # compiled, and captured as a graph
            work[name]()
    added = _allocated(peak=True) - held
    seconds = {name: min(times) for name, times in interleaved(work, 5).items()}
    alone = _alone(engine.device, next(engine.model.parameters()).dtype, many)
    alone = replace(alone, held=held_share(config, precision, many, added))
    return solve(config, precision, few, many, seconds, alone)


def _alone(device: Any, dtype: Any, rows: int) -> pace.Rates:
    """The rates of products, attention and long sums, each timed alone."""
    import torch

    size = 8192 if device.type != "cpu" else 512
    left = torch.randn(size, size, device=device).to(dtype)
    vector = torch.zeros(size * size, device=device)
    query = torch.randn(rows, 8, 256, 64, device=device).to(dtype).requires_grad_()

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).backward(query.detach())
        query.grad = None

    products = 2 * size**3 / best_seconds(lambda: left @ left)
    attention = 3 * 2 * 2 * rows * 8 * 256 * 256 * 64 / best_seconds(attend)
    memory = 3 * vector.nbytes / best_seconds(lambda: vector.add_(vector))
    return pace.Rates(products, attention, memory, memory, 1e-9, 1.0)


def solve(config: Any, precision: str, few: int, many: int, seconds: dict[str, float], alone: pace.Rates) -> pace.Rates:
    """The rates of element-wise work and of launches that explain the seconds of our steps; `alone`: those measured alone."""
    layout = PlannedLayout(1, 1, 0, precision)
    count = parameters(config, 1, VOCABULARY, 1)
    updates = pace.update_seconds(config, count, layout, alone)
    planned = pace.pass_seconds(config, layout, alone, VOCABULARY, many)
    left = seconds["many"] - updates - planned["products"] - planned["attention"]
    least = 0.2 * planned["element-wise"]  # kernels that need not go to memory are fast, but not without end
    elementwise = pace.moved(config, layout, VOCABULARY, many) / max(left, least)
    launches = seconds["few"] - updates
    kernels = pace.OTHER_KERNELS + config.model.layers * pace.LAYER_KERNELS
    return replace(alone, elementwise=elementwise, launch=max(launches, 1e-6) / kernels)


def _allocated(*, reset: bool = False, peak: bool = False) -> int:
    """Bytes that tensors take on the accelerator, now or (`peak`) at most since the last reset; 0 on a CPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return 0
    if reset:
        accelerator.reset_peak_memory_stats()
    return int(accelerator.max_memory_allocated() if peak else accelerator.memory_allocated())


def held_share(config: RunConfig, precision: str, rows: int, added: int) -> float:
    """The bytes that an engine and its steps took (`added`) beside weights, masters, moments and gradients, in the activations
    that are counted."""
    layout, count = PlannedLayout(1, 1, 0, precision), parameters(config, 1, VOCABULARY, 1)
    planned = memory(config, count, layout, VOCABULARY)
    counted = planned.pop("activations")
    return max(1.0, (added - sum(planned.values())) / counted)


def best_seconds(run: Callable[[], Any]) -> float:
    """The least seconds of a run among ten."""
    from deepspeed.accelerator import get_accelerator

    times = []
    for _ in range(11):
        started = time.perf_counter()
        run()
        get_accelerator().synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])
