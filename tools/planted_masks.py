"""Planted truth for the analysis of masks: does their similarity fall with the distance between languages?

    python tools/planted_masks.py --out runs/planted-masks --seeds 5

For each seed one joint model of four synthetic languages at stated distances is pretrained and analysed
(`launch/analyze.py --set analysis=prune`). Reported: Spearman's rank correlation of the similarity of two languages' masks
with their distance, over all pairs and models pooled and as the mean of each model's own (models differ in the level of all
similarities, which pooling takes for noise), each with a 95% bootstrap interval over models (the units that are drawn); and in
how many pairs both languages are more similar to themselves. What is there already is not computed again.
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
from mlinterf_ds.runtime.session import main as guarded
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the models, analyses and planted.json")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 1000), metavar="N", help="models (default 5)")
    parser.add_argument("--pretrain", action="append", default=[], metavar="KEY=VALUE", help="for the pretraining runs")
    parser.add_argument("--prune", action="append", default=[], metavar="KEY=VALUE", help="for the analyses")
    options = parser.parse_args(words)
    for seed in range(options.seeds):
        model, analysis = options.out / f"model-{seed}", options.out / f"masks-{seed}"
        if not (model / "summary.json").is_file():
            settings = [*PRETRAIN, f"languages={','.join(LANGUAGES)}", f"train.seed={seed}", *options.pretrain]
            launch("pretrain.py", [*settings, f"output={model}"], ["--recipe", "tiny"])
        if not (analysis / "summary.json").is_file():
            launch("analyze.py", [*PRUNE, *options.prune, f"checkpoint={model}", f"output={analysis}"], [])
    found = report([read(options.out / f"masks-{seed}" / "similarity.csv") for seed in range(options.seeds)])
    (options.out / "planted.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return 0


def launch(program: str, settings: Sequence[str], more: Sequence[str]) -> None:
    flags = [word for setting in (*settings, "tracking.enabled=false") for word in ("--set", setting)]
    config = ROOT / "ds_configs" / "zero1.json"
    command = [sys.executable, str(ROOT / "launch" / program), "--deepspeed_config", str(config), *more, *flags]
    if subprocess.run(command).returncode:
        raise UserError(f"launch/{program} failed: its reason stands above")


Similarities = dict[tuple[str, str, str], dict[str, float]]  # (component, left, right) -> measure -> value


def read(path: Path) -> Similarities:
    """The similarities over all layers from an analysis's similarity.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (row["component"], row["left"], row["right"]): {m: float(row[m]) for m in ("cosine", "correlation")}
            for row in csv.DictReader(file)
            if row["layer"] == "all"
        }


def report(models: Sequence[Similarities]) -> dict[str, Any]:
    """By component and measure: rank correlation with its interval, means by pair, and the within-language control."""
    pairs = list(itertools.combinations(LANGUAGES, 2))
    names = ["-".join(pair) for pair in pairs]
    distances = {name: distance(*pair) for name, pair in zip(names, pairs, strict=True)}
    found: dict[str, Any] = {"models": len(models), "distances": distances}
    for component, measure in itertools.product(("all", "attention", "ffn"), ("cosine", "correlation")):
        between = np.array([[model[component, *pair][measure] for pair in pairs] for model in models])
        within = np.array([[model[component, code, code][measure] for code in LANGUAGES] for model in models])
        by_pair = dict(zip(names, between.T.tolist(), strict=True))
        found[f"{component}/{measure}"] = {
            "pooled": transfer_correlation(distances, by_pair),
            "by_model": by_model(list(distances.values()), between),
            "within": within.mean(axis=0).tolist(),
            "between": {name: float(np.mean(values)) for name, values in by_pair.items()},
            "below_within": below(within, between),
        }
    return found


def by_model(distances: Sequence[float], between: np.ndarray) -> dict[str, Any]:
    """Spearman's within each model, (models, pairs): their mean and its interval."""
    found = np.array([rank_correlation(distances, row) for row in between.tolist()])
    draws = np.random.default_rng(0).integers(0, len(found), (RESAMPLES, len(found)))
    low, high = np.quantile(found[draws].mean(axis=1), [0.025, 0.975])
    return {"rho": float(found.mean()), "low": float(low), "high": float(high), "each": found.tolist()}


def below(within: np.ndarray, between: np.ndarray) -> float:
    """Share of models' pairs whose similarity lies below both languages' own; (models, L), (models, pairs)."""
    pairs = np.array(list(itertools.combinations(range(within.shape[1]), 2)))
    return float((between < within[:, pairs].min(axis=2)).mean())


if __name__ == "__main__":
    guarded(main, sys.argv[1:])
