"""Tests whether gradient conflict shows a planted distance: bilingual models of synthetic languages, over several seeds.

python tools/planted_conflict.py --out runs/planted

The tool trains `joint` on syn with a close, a middling and a far relative (`mlinterf_ds.data.synthetic.distance`). It
measures the similarity of gradients between the two languages and within each, and prints the rank correlation of similarity
with distance over pairs and seeds, with its 95% bootstrap interval over seeds. It writes planted.csv and planted.json.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PAIRS = {"close": ("syn", "syn-close"), "mid": ("syn", "syn-mid"), "far": ("syn", "syn-far")}


def train_and_measure(
    options: argparse.Namespace, corpus: Any, pair: Sequence[str], seed: int
) -> list[dict[str, float]]:
    """Trains one model; returns a row for every step of `--at`: similarity within (mean of the two) and between languages."""
    from mlinterf_ds.data.stream import TrainStream
    from mlinterf_ds.engine.engine import Engine
    from mlinterf_ds.engine.precision import read_deepspeed_json
    from mlinterf_ds.gradients.measure import Draws, measure
    from mlinterf_ds.gradients.similarity import spread
    from mlinterf_ds.model.encoder import Encoder
    from mlinterf_ds.pretrain.config import load_run
    from mlinterf_ds.runtime.parallel import Layout

    settings = ["variant=joint", f"train.seed={seed}", f"conflict.sequences={options.rows}", *options.set]
    config = load_run(["tiny"], settings)
    length, train = config.data.sequence_length, config.train
    model = Encoder(
        config.model, variant="joint", languages=pair, vocabulary=corpus.vocabulary_size, positions=length, seed=seed
    )
    engine = Engine(model, train, read_deepspeed_json(ROOT / "ds_configs" / "zero0.json"), "fp32", Layout(0, 1, 1))
    stream = TrainStream(corpus, pair, rows=train.batch, row_format=config.data.row_format, seed=seed)
    draws = Draws(
        corpus, pair, pair, config=config.conflict, row_format=config.data.row_format, seed=seed, engine=engine
    )
    rows = []
    for step in range(max(options.at) + 1):
        if step in options.at:
            similarity, _ = measure(engine, draws, "exact", seed, step)
            matrix = similarity.matrix()
            facts = spread(matrix) | {"corrected": float(similarity.corrected()[0, 1])}
            rows.append({"step": step, **facts, "lowest_within": float(np.diagonal(matrix).min())})
        engine.train_step([stream.batch(step, *part) for part in engine.slices(train.batch)])
    return rows


def summarise(rows: list[dict[str, Any]], steps: Sequence[int]) -> dict[str, Any]:
    """By step: correlations with distance, means, and in how many models both languages were more similar to themselves."""
    from mlinterf_ds.data.synthetic import distance
    from mlinterf_ds.tasks.metrics import transfer_correlation

    closeness = {name: -distance(*pair) for name, pair in PAIRS.items()}
    summary: dict[str, Any] = {"distance": {name: -value for name, value in closeness.items()}}
    for step in steps:
        measured = [row for row in rows if row["step"] == step]
        facts: dict[str, Any] = {}
        for kind in ("between", "corrected"):
            scores: dict[str, Sequence[float]] = {
                name: [row[kind] for row in measured if row["pair"] == name] for name in PAIRS
            }
            facts[kind] = {"correlation with closeness": transfer_correlation(closeness, scores)}
            facts[kind]["mean"] = {name: float(np.mean(values)) for name, values in scores.items()}
        facts["within"] = {
            name: float(np.mean([row["within"] for row in measured if row["pair"] == name])) for name in PAIRS
        }
        facts["models"] = len(measured)
        facts["within above between"] = sum(row["lowest_within"] > row["between"] for row in measured)
        summary[f"step {step}"] = facts
    return summary


def main(words: Sequence[str]) -> int:
    """Trains and measures every pair with every seed; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus, planted.csv and planted.json")
    parser.add_argument("--seeds", type=int, default=5, help="models of each pair (default 5)")
    parser.add_argument("--at", type=int, nargs="+", default=[20, 100, 400], help="steps at which to measure")
    parser.add_argument("--rows", type=int, default=256, help="sequences of a gradient (default 256)")
    parser.add_argument("--sentences", type=int, default=8000, help="sentences of each language (default 8000)")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change recipe tiny")
    options = parser.parse_args(words)
    from mlinterf_ds.data.corpus import Corpus
    from mlinterf_ds.data.prepare.synthetic import prepare_synthetic
    from mlinterf_ds.files import write_csv
    from mlinterf_ds.runtime.output import quiet
    from mlinterf_ds.runtime.parallel import Group

    languages = list(dict.fromkeys(code for pair in PAIRS.values() for code in pair))
    prepare_synthetic(languages, options.sentences, folder=options.out / "corpus")
    os.environ.setdefault("WORLD_SIZE", "1")
    quiet(options.out / "log")
    group = Group(1)
    corpus, rows = Corpus.open(options.out / "corpus"), []
    for seed in range(options.seeds):
        for name, pair in PAIRS.items():
            rows += [{"pair": name, "seed": seed, **facts} for facts in train_and_measure(options, corpus, pair, seed)]
            write_csv(options.out / "planted.csv", list(rows[0]), [list(row.values()) for row in rows])
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    summary = summarise(rows, options.at)
    (options.out / "planted.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    print(json.dumps(summary, indent=1))
    group.leave()
    return 0


if __name__ == "__main__":
    from mlinterf_ds.runtime.program import main as guarded

    guarded(main)
