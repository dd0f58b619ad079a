"""`bench.py plan`: times of steps of many shapes over that of one step, as measured and as tools/plan.py predicts them."""

from __future__ import annotations

import argparse
from typing import Any

from mlinterf_ds.sections import is_meta
from tools.bench.engines import CODES, build, meta_step, plain_step, shapes
from tools.bench.timing import Work, interleaved, ratio
from tools.plan import arithmetic


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Compares arithmetic alone, on one rank; tests/parity/test_plan.py compares the planned traffic with the real one."""
    base = ["model.width=256", "model.ffn=1024", "model.heads=4", "model.layers=4", "meta.check_every=0"]
    changed = {
        "joint": [],
        "twice the width": ["model.width=512", "model.ffn=2048", "model.heads=8"],
        "twice the layers": ["model.layers=8"],
        "rows of four times the length": [f"data.sequence_length={4 * options.length}", f"train.batch={options.rows // 4}"],
        "recomputed": ["model.recompute=true"],
        "in four micro-batches": [f"train.micro_batch={options.rows // 4}"],
        "adpt": ["variant=adpt"],
        "meta_adpt": ["variant=meta_adpt"],
        "meta_adpt, one-sided": ["variant=meta_adpt", "meta.difference=one_sided"],
        "meta_adpt, direct term": ["variant=meta_adpt", "meta.terms=direct"],
        "meta_ffn": ["variant=meta_ffn"],
    }  # fmt: skip
    work: Work = {}
    flops: dict[str, float] = {}
    for name, own in changed.items():
        settings = ["variant=joint", *shapes(options), *base, *own]
        engine, config, train, validation = build(options, CODES[:4], "tiny", settings, "zero1")
        flops[name] = arithmetic.step_flops(config, options.vocabulary)
        if is_meta(config.variant):
            work[name] = meta_step(engine, config.meta, train(0), validation(0))
        else:
            work[name] = plain_step(engine, train(0))
    seconds = interleaved(work, options.rounds)
    planned = {name: count / flops["joint"] for name, count in flops.items()}
    measured = {name: ratio(times, seconds["joint"]) for name, times in seconds.items()}
    return {
        "measured": measured,
        "planned": planned,
        "planned in measured": {name: planned[name] / measured[name]["median"] for name in work},
    }
