"""`bench.py conflict`: what measuring the similarity of many languages' gradients costs beside the gradients themselves."""

from __future__ import annotations

import argparse
from typing import Any

from tools.bench.engines import CODES, RandomCorpus, build, shapes


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The paper's model: two gradients of `--rows` sequences for each language, projected one after another."""
    from mlinterf_ds.gradients import measure as conflict
    from mlinterf_ds.gradients.similarity import DRAWS
    from mlinterf_ds.sections import RowFormat

    count = options.languages[-1]
    settings = ["variant=joint", *shapes(options), "meta.languages_per_step=2"]
    engine, config, _, _ = build(options, CODES[:count], "paper", settings, "zero0")
    section = config.conflict.model_copy(update={"sequences": options.rows, "micro_batch": options.rows})
    corpus = RandomCorpus(CODES[:count], options.vocabulary)
    draws = conflict.Draws(
        corpus, corpus.languages, corpus.languages, config=section, row_format=RowFormat(options.length), seed=0,
        engine=engine,
    )  # fmt: skip
    for _ in range(2):
        conflict.gradient(engine, draws.batches("l0", 0, 0))  # to warm up
    _, costs = conflict.measure(engine, draws, conflict.DIMENSION, seed=0)
    gradients = DRAWS * count
    return {
        "languages": count,
        "sequences of a gradient": options.rows,
        "times the gradients alone": costs["ratio"],
        "seconds of a gradient": costs["seconds_gradients"] / gradients,
        "seconds of a similarity": costs["seconds_similarity"] / gradients,  # its share of the products included
        "MB held beyond a gradient": costs["bytes_held"] / 1e6,
        "MB peak beyond a gradient": costs["bytes_peak_increase"] / 1e6,
    }
