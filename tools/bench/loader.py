"""`bench.py loader`: how many tokens of batches one core makes a second, for training and for the validation loss of a meta step."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the batches of `paper` on the synthetic corpus, or on that of `--set corpus=FOLDER`."""
    from mlinterf_ds.data.corpus import open_corpus
    from mlinterf_ds.data.stream import TrainStream, ValidationStream
    from mlinterf_ds.pretrain.config import load_run

    shape = [f"train.batch={options.rows}", f"data.sequence_length={options.length}"]
    config = load_run(["paper"], [*options.set, *shape])
    data = config.data
    corpus = open_corpus(config.corpus, config.languages, data.synthetic_sentences, data.synthetic_limit)
    kind: dict[str, Any] = {"rows": options.rows, "row_format": data.row_format, "seed": config.train.seed}
    train = TrainStream(corpus, corpus.languages, temperature=data.temperature, **kind)
    validation = ValidationStream(corpus, corpus.languages, text="train", training=train, **kind)
    batches = {
        "training batches": lambda step: train.batch(step),
        "validation batches": lambda step: validation.batch(step, 0),
    }
    tokens = options.rows * options.length
    result: dict[str, Any] = {"corpus": str(corpus.folder), "tokens of a batch": tokens}
    for name, make in batches.items():
        seconds = sorted(core_seconds(make, range(options.rounds + 1))[1:])
        result[f"{name}, tokens a second a core"] = tokens / seconds[len(seconds) // 2]
    return result


def core_seconds(make: Callable[[int], Any], steps: Sequence[int]) -> list[float]:
    """Seconds of a core that the batch of each step takes: those of this process, in which other programs have no part."""
    seconds = []
    for step in steps:
        started = time.process_time()
        make(step)
        seconds.append(time.process_time() - started)
    return seconds
