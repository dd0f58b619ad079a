"""Tests whether the similarity of masks shows a planted distance: joint models of synthetic languages, over several seeds.

    python tools/planted_masks.py --out runs/planted-masks --seeds 5

For each seed the tool pretrains one joint model of four synthetic languages at known distances and analyses it
(`launch/analyze.py --set analysis=prune`). It reports Spearman's rank correlation of the similarity of two languages' masks
with their distance, pooled over all pairs and models, and as the mean of the correlations within each model (when pooled,
differences between models in the level of all similarities count as noise). Both have a 95% bootstrap interval over models. It
also reports the share of pairs whose two languages are both more similar to themselves than to each other. Models and analyses
that exist in `--out` are used again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.data.synthetic import distance
from mlinterf_ds.errors import UserError
from mlinterf_ds.runtime.program import main as guarded
from mlinterf_ds.tasks.metrics import rank_correlation, transfer_correlation

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("syn", "syn-close", "syn-mid", "syn-far")
PRETRAIN = (
    "variant=joint",
    "train.steps=1500",
    "train.epoch_steps=500",
    "data.sequence_length=32",
    "data.eval_rows=64",
)
PRUNE = ("analysis=prune", "prune.steps=200", "prune.sequences=64")
RESAMPLES = 10_000


def main(words: Sequence[str]) -> int:
    """Trains, analyses and reports; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the models, analyses and planted.json")
    parser.add_argument(
        "--seeds", type=int, default=5, choices=range(1, 1000), metavar="N", help="number of models (default 5)"
    )
    parser.add_argument(
        "--pretrain",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="setting of the pretraining runs; repeatable",
    )
    parser.add_argument(
        "--prune", action="append", default=[], metavar="KEY=VALUE", help="setting of the analyses; repeatable"
    )
    options = parser.parse_args(words)
    for seed in range(options.seeds):
        model, analysis = options.out / f"model-{seed}", options.out / f"masks-{seed}"
        if not (model / "summary.json").is_file():
            settings = [*PRETRAIN, f"languages={','.join(LANGUAGES)}", f"train.seed={seed}", *options.pretrain]
            launch("pretrain.py", [*settings, f"output={model}"], ["--recipe", "tiny"])
        if not (analysis / "summary.json").is_file():
            launch("analyze.py", [*PRUNE, *options.prune, f"checkpoint={model}", f"output={analysis}"], [])
    summary = report([read(options.out / f"masks-{seed}" / "similarity.csv") for seed in range(options.seeds)])
    (options.out / "planted.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    print(json.dumps(summary, indent=2))
    return 0


def launch(program: str, settings: Sequence[str], more: Sequence[str]) -> None:
    """Runs a launcher of this repository on one rank with these settings and further arguments."""
    flags = [word for setting in (*settings, "tracking.enabled=false") for word in ("--set", setting)]
    config = ROOT / "ds_configs" / "zero1.json"
    command = [sys.executable, str(ROOT / "launch" / program), "--deepspeed_config", str(config), *more, *flags]
    if subprocess.run(command).returncode:
        raise UserError(f"launch/{program} failed; the reason is printed above")


Similarities = dict[tuple[str, str, str], dict[str, float]]  # (component, left, right) -> measure -> value


def read(path: Path) -> Similarities:
    """Reads the similarities over all layers from the similarity.csv of an analysis."""
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (row["component"], row["left"], row["right"]): {m: float(row[m]) for m in ("cosine", "correlation")}
            for row in csv.DictReader(file)
            if row["layer"] == "all"
        }


def report(models: Sequence[Similarities]) -> dict[str, Any]:
    """By component and measure: rank correlations with intervals, means by pair, and similarities within languages."""
    pairs = list(itertools.combinations(LANGUAGES, 2))
    names = ["-".join(pair) for pair in pairs]
    distances = {name: distance(*pair) for name, pair in zip(names, pairs, strict=True)}
    summary: dict[str, Any] = {"models": len(models), "distances": distances}
    for component, measure in itertools.product(("all", "attention", "ffn"), ("cosine", "correlation")):
        between = np.array([[model[component, *pair][measure] for pair in pairs] for model in models])
        within = np.array([[model[component, code, code][measure] for code in LANGUAGES] for model in models])
        by_pair = dict(zip(names, between.T.tolist(), strict=True))
        summary[f"{component}/{measure}"] = {
            "pooled": transfer_correlation(distances, by_pair),
            "by_model": by_model(list(distances.values()), between),
            "within": within.mean(axis=0).tolist(),
            "between": {name: float(np.mean(values)) for name, values in by_pair.items()},
            "below_within": below(within, between),
        }
    return summary


def by_model(distances: Sequence[float], between: np.ndarray) -> dict[str, Any]:
    """Spearman's rank correlation within each model, its mean and interval; `between` has the shape (models, pairs)."""
    correlations = rank_correlation(distances, between)
    count = len(correlations)
    draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    low, high = np.quantile(correlations[draws].mean(axis=1), [0.025, 0.975])
    return {"rho": float(correlations.mean()), "low": float(low), "high": float(high), "each": correlations.tolist()}


def below(within: np.ndarray, between: np.ndarray) -> float:
    """The share of pairs less similar than each of their languages is to itself.

    `within` has the shape (models, languages), `between` (models, pairs).
    """
    pairs = np.array(list(itertools.combinations(range(within.shape[1]), 2)))
    return float((between < within[:, pairs].min(axis=2)).mean())


if __name__ == "__main__":
    guarded(main)
