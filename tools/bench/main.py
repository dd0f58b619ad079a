"""Measures training steps side by side. Both sides of a ratio run in turn in one process, so noise disturbs them alike.

python tools/bench.py step        our step against transformers' XLM-RoBERTa and against the step's bare matrix products
python tools/bench.py meta        a meta step in plain steps, by kind of difference and number of languages; its memory
python tools/bench.py languages   a step with 100 languages in the model against 2, on two ranks
python tools/bench.py conflict    the similarity of 32 languages' gradients beside the gradients themselves
python tools/bench.py gpu         the shipped shapes on an accelerator: ms a step, MFU, memory, share of the time it is busy
python tools/bench.py loader      tokens of batches that one core makes a second
python tools/bench.py plan        steps of eleven shapes and variants in steps of one, measured and as tools/plan.py predicts
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tools.bench import conflict, gpu, languages, loader, meta, plan, step
from tools.bench.engines import start

MEASUREMENTS = {
    "step": step.measure, "meta": meta.measure, "languages": languages.measure, "conflict": conflict.measure,
    "gpu": gpu.measure, "plan": plan.measure, "loader": loader.measure,
}  # fmt: skip


def show(result: dict[str, Any], indent: int = 0) -> None:
    """Prints the nested result; a ratio as its median with its range."""
    for name, value in result.items():
        if isinstance(value, dict) and set(value) == {"median", "least", "most"}:
            print(f"{' ' * indent}{name:<44}{value['median']:8.2f}   ({value['least']:.2f} to {value['most']:.2f})")
        elif isinstance(value, dict):
            print(f"{' ' * indent}{name}")
            show(value, indent + 2)
        else:
            print(f"{' ' * indent}{name:<44}{value:8.2f}" if isinstance(value, float) else f"{name:<44}{value}")


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("mode", choices=[*MEASUREMENTS], nargs="?", default="step", help="what to measure (default step)")
    add(
        "--rows",
        type=int,
        help="rows of a batch (default: 16; gpu: those of each case; meta 32, with as many validation rows; conflict 64; loader 512)",
    )
    add("--case", nargs="+", help="`gpu`: only the cases whose names contain one of these")
    add("--length", type=int, help="tokens of a row (default: 128; loader 256)")
    add("--vocabulary", type=int, help="pieces of the vocabulary (default: 32000; languages 2000)")
    add("--precision", choices=["fp32", "bf16", "fp16"], help="of weights and arithmetic (default fp32; gpu bf16)")
    add("--dropout", type=float, default=0.1, help="all dropout rates (default 0.1)")
    add("--variant", default="joint", help="the variant that `step` trains (default joint)")
    add(
        "--languages",
        type=int,
        nargs="+",
        default=[2, 8, 32],
        help="language counts of `meta`; `conflict` uses the last",
    )
    add("--rounds", type=int, default=7, help="how often each step is measured (default 7)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of all ranks together")
    add(
        "--set", action="append", default=[], metavar="section.key=value", help="change the recipe's shapes; repeatable"
    )
    add("--profile", action="store_true", help="also print the operators of our step by the time they take themselves")
    add("--json", type=Path, help="write the result to this file too")
    options = parser.parse_args(words)
    options.rows = options.rows or {"meta": 32, "conflict": 64, "loader": 512, "gpu": None}.get(options.mode, 16)
    options.precision = options.precision or ("bf16" if options.mode == "gpu" else "fp32")
    options.length = options.length or {"loader": 256}.get(options.mode, 128)
    options.vocabulary = options.vocabulary or (2000 if options.mode == "languages" else 32_000)
    return options


def main(words: Sequence[str]) -> int:
    """Runs the measurement that the command line names and prints its result; returns the exit code."""
    options = arguments(words)
    if options.mode != "languages":  # that measurement starts ranks of its own
        start(0, 1, tempfile.mkdtemp(), options.threads)
        from deepspeed.accelerator import get_accelerator

        from mlinterf_ds.engine.precision import bf16_arithmetic

        on_cpu = get_accelerator().device_name() == "cpu"
        if on_cpu and options.precision == "bf16" and not bf16_arithmetic():
            print("warning: this processor emulates bf16, some 100 times slower than fp32", file=sys.stderr)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    machine = {"device": device, "threads": options.threads}
    facts = machine | {"torch": torch.__version__, "precision": options.precision, "rounds": options.rounds}
    result = {"mode": options.mode, **facts, **MEASUREMENTS[options.mode](options)}
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0
