"""`bench.py gpu`: the training steps of the shipped shapes on one accelerator, one after another, in one table."""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from tools.bench.engines import CODES, build, meta_step, plain_step

SMALL = ("paper_8heads", 128, 32_000)  # recipe, rows, pieces
PAPER = ("paper", 512, 32_000)
LARGE = ("large", 128, 200_000)
ONE_SIDED = ["meta.order=simultaneous", "meta.difference=one_sided"]
Case = tuple[str, tuple[str, int, int], str, int, list[str]]  # name, shape, variant, languages, settings
CASES: list[Case] = [
    ("paper_8heads joint, as it stands", SMALL, "joint", 2, ["model.compile=false", "train.graphs=false"]),
    ("paper_8heads joint, compiled", SMALL, "joint", 2, ["train.graphs=false"]),
    ("paper_8heads joint", SMALL, "joint", 2, []),
    ("paper_8heads joint, inside documents", SMALL, "joint", 2, ["data.boundaries=document"]),
    ("paper_8heads adpt", SMALL, "adpt", 2, []),
    ("paper_8heads meta_adpt, central", SMALL, "meta_adpt", 2, []),
    ("paper_8heads meta_adpt, simultaneous, one-sided", SMALL, "meta_adpt", 2, ONE_SIDED),
    ("paper joint", PAPER, "joint", 7, []),
    ("large joint", LARGE, "joint", 2, []),
    ("large adpt, 2 languages", LARGE, "adpt", 2, ["train.micro_batch=32"]),
    ("large adpt, 64 languages", LARGE, "adpt", 64, ["train.micro_batch=32"]),
]
WARM, STEPS = 6, 10


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time, MFU, memory and device-busy share of every case whose name contains one of `--case`."""
    from mlinterf_ds.engine.throughput import PEAKS

    chosen = [case for case in CASES if not options.case or any(part in case[0] for part in options.case)]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = next((value for known, value in PEAKS.items() if known in name), None)
    results = {}
    for case in chosen:
        try:
            results[case[0]] = _measure(options, case, peak)
        except Exception as error:  # whatever one case fails at, the others are measured
            results[case[0]] = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
            if options.profile:
                traceback.print_exc()
        print(case[0], results[case[0]], flush=True)
        if options.json:  # whatever ends this run early leaves the cases before
            options.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return results


def _measure(options: argparse.Namespace, case: Case, peak: float | None) -> dict[str, Any]:
    from mlinterf_ds.engine.throughput import flops_per_row

    _, (recipe, rows, vocabulary), variant, count, settings = case
    own = argparse.Namespace(**vars(options) | {"vocabulary": vocabulary, "precision": options.precision})
    shape = ["data.boundaries=none", "data.positions=row", "train.micro_batch=none", "model.recompute=false"]
    shape += [f"variant={variant}", f"train.batch={options.rows or rows}", f"meta.batch={options.rows or rows}"]
    started = time.perf_counter()
    engine, config, train, validation = build(own, CODES[:count], recipe, [*shape, *settings], "zero2", fast=True)
    run = [plain_step(engine, train(step)) for step in range(2)]
    if variant.startswith("meta_"):
        run = [meta_step(engine, config.meta, train(step), validation(step)) for step in range(2)]
    _reset_peak()
    for number in range(WARM):
        run[number % 2]()
    _wait()
    warm = time.perf_counter() - started
    seconds = min(_timed(run) for _ in range(3))
    row = flops_per_row(config.model, config.data.sequence_length, vocabulary, 38, variant)
    result = {"ms": 1e3 * seconds, "seconds until warm": warm, "GiB": _peak_memory()}
    if peak and not variant.startswith("meta_"):
        result["MFU %"] = 100 * row * config.train.batch / seconds / peak
    if torch.cuda.is_available():
        result["device busy %"] = _busy(run)
    return result


def _timed(run: list[Callable[[], Any]]) -> float:
    begin = time.perf_counter()
    for number in range(STEPS):
        run[number % 2]()
    _wait()
    return (time.perf_counter() - begin) / STEPS


def _busy(run: list[Callable[[], Any]]) -> float:
    """The share of the wall time in which the device computes, in percent, over four steps."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for number in range(4):
            run[number % 2]()
        _wait()
    spans = sorted((e.time_range.start, e.time_range.end) for e in trace.events() if e.device_type.name == "CUDA")
    busy = 0.0
    end = spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 100.0 * busy / (end - spans[0][0])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_memory() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
