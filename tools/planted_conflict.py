"""Does gradient conflict show a planted distance? Bilingual models of the synthetic languages, each with several seeds.

python tools/planted_conflict.py --out runs/planted

Trains `joint` on syn with a close, a middling and a far relative (`mlinterf_ds.data.synthetic.distance`), measures the
similarity of the two languages' gradients and that within each, and prints the rank correlation of similarity with
distance over pairs and seeds, with its 95% bootstrap interval over seeds. Writes planted.csv and planted.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PAIRS = {"close": ("syn", "syn-close"), "mid": ("syn", "syn-mid"), "far": ("syn", "syn-far")}


def train_and_measure(
    options: argparse.Namespace, corpus: Any, pair: Sequence[str], seed: int
) -> list[dict[str, float]]:
    """One model; at every step of `--at`: step, within (mean of the two), between."""
    from mlinterf_ds.data.stream import TrainStream
    from mlinterf_ds.engine.engine import Engine
    from mlinterf_ds.engine.precision import read_json
    from mlinterf_ds.gradients.collect import Draws
    from mlinterf_ds.gradients.similarity import measure, spread
    from mlinterf_ds.model.encoder import Encoder
    from mlinterf_ds.pretrain.config import load_run
    from mlinterf_ds.runtime import parallel

    own = ["variant=joint", f"train.seed={seed}", f"conflict.sequences={options.rows}", *options.set]
    config = load_run(["tiny"], own)
    length, train = config.data.sequence_length, config.train
    model = Encoder(
        config.model, variant="joint", languages=pair, vocabulary=corpus.vocabulary_size, positions=length, seed=seed
    )
    engine = Engine(model, config, read_json(ROOT / "ds_configs" / "zero0.json"), "fp32", parallel.current(1))
    stream = TrainStream(corpus, pair, rows=train.batch, length=length, seed=seed, mask_share=config.data.mask)
    draws = Draws(
        corpus, pair, pair, config=config.conflict, length=length, mask_share=config.data.mask, seed=seed, engine=engine
    )
    found = []
    for step in range(max(options.at) + 1):
        if step in options.at:
            similarity, _ = measure(engine, draws, "exact", seed, step)
            matrix = similarity.matrix()
            facts = spread(matrix) | {"corrected": float(similarity.corrected()[0, 1])}
            found.append({"step": step, **facts, "lowest_within": float(np.diagonal(matrix).min())})
        engine.train_step([stream.batch(step, *rows) for rows in engine.slices(train.batch)])
    return found


def summarise(rows: list[dict[str, Any]], steps: Sequence[int]) -> dict[str, Any]:
    """By step: correlations with distance, means, and how often within was above between."""
    from mlinterf_ds.data.synthetic import distance
    from mlinterf_ds.tasks.metrics import transfer_correlation

    closeness = {name: -distance(*pair) for name, pair in PAIRS.items()}
    summary: dict[str, Any] = {"distance": {name: -value for name, value in closeness.items()}}
    for step in steps:
        here = [row for row in rows if row["step"] == step]
        facts: dict[str, Any] = {}
        for kind in ("between", "corrected"):
            scores = {name: [row[kind] for row in here if row["pair"] == name] for name in PAIRS}
            facts[kind] = {"correlation with closeness": transfer_correlation(closeness, scores)}
            facts[kind]["mean"] = {name: float(np.mean(values)) for name, values in scores.items()}
        facts["within"] = {n: float(np.mean([r["within"] for r in here if r["pair"] == n])) for n in PAIRS}
        facts["models"] = len(here)
        facts["within above between"] = sum(row["lowest_within"] > row["between"] for row in here)
        summary[f"step {step}"] = facts
    return summary


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--seeds", type=int, default=5)
    found.add_argument("--at", type=int, nargs="+", default=[20, 100, 400], help="steps measured")
    found.add_argument("--rows", type=int, default=256, help="sequences of a gradient")
    found.add_argument("--sentences", type=int, default=8000, help="of each language")
    found.add_argument("--set", action="append", default=[], metavar="key=value", help="change the tiny recipe")
    options = found.parse_args(words)
    from mlinterf_ds.data.corpus import Corpus
    from mlinterf_ds.data.prepare.synthetic import prepare_synthetic
    from mlinterf_ds.files import write_csv
    from mlinterf_ds.runtime import parallel, session

    languages = list(dict.fromkeys(code for pair in PAIRS.values() for code in pair))
    prepare_synthetic(languages, options.sentences, folder=options.out / "corpus")
    os.environ.setdefault("WORLD_SIZE", "1")
    session.quiet(options.out / "log")
    parallel.start(1)
    corpus, rows = Corpus.open(options.out / "corpus"), []
    for seed in range(options.seeds):
        for name, pair in PAIRS.items():
            rows += [{"pair": name, "seed": seed, **facts} for facts in train_and_measure(options, corpus, pair, seed)]
            write_csv(options.out / "planted.csv", list(rows[0]), [list(row.values()) for row in rows])  # so far
            print({key: round(v, 3) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    summary = summarise(rows, options.at)
    (options.out / "planted.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    parallel.stop()
    return summary


def command(words: Sequence[str]) -> int:
    main(words)
    return 0


if __name__ == "__main__":
    from mlinterf_ds.runtime.session import main as guarded

    guarded(command, sys.argv[1:])
