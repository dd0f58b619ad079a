"""Builds what the measurements run: an engine on random tokens with its batches, and the process group it needs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mlinterf_ds.data.tokenizer import Vocabulary

ROOT = Path(__file__).resolve().parents[2]
CODES = [f"l{number}" for number in range(100)]  # language codes


class RandomCorpus:
    """A corpus of random tokens in memory, with the methods that the streams call."""

    def __init__(self, languages: Sequence[str], vocabulary: int):
        self.languages, self.vocabulary = list(languages), Vocabulary(vocabulary)
        self._tokens = np.random.default_rng(0).integers(5, vocabulary, 200_000)

    def sentences(self, lang: str, split: str) -> int:
        return 1000

    def characters(self, lang: str, split: str) -> int:
        return 10_000

    def tokens(self, lang: str, split: str) -> np.ndarray:
        return self._tokens

    def unchanged(self, language: str, split: str) -> bool:
        return True

    def starts_document(self, language: str, split: str, offsets: np.ndarray) -> np.ndarray:
        return np.ones(len(offsets), dtype=bool)


def start(rank: int, world: int, folder: str, threads: int) -> None:
    """Joins this process to a group of `world` ranks that meet in `folder` and share `threads` threads."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    from mlinterf_ds.runtime.output import quiet
    from mlinterf_ds.runtime.parallel import Group

    quiet(Path(folder) / f"rank-{rank}.log")
    Group(1, f"file://{folder}/rendezvous")
    torch.set_num_threads(max(1, threads // world))


def build(
    options: argparse.Namespace, languages: Sequence[str], recipe: str, settings: list[str], ds: str, fast: bool = False
) -> Any:
    """Builds an engine with ds_configs/`ds`.json; fast: compiled and captured as the configuration says.

    Returns it with its configuration and two functions of a step: training and validation batches.
    """
    from mlinterf_ds.data.stream import TrainStream, ValidationStream
    from mlinterf_ds.engine.engine import Engine
    from mlinterf_ds.engine.passes import make_fast
    from mlinterf_ds.engine.precision import read_deepspeed_json
    from mlinterf_ds.model.encoder import Encoder
    from mlinterf_ds.pretrain.config import load_run
    from mlinterf_ds.runtime.parallel import Layout

    config = load_run([recipe], [*options.set, *settings])
    corpus = RandomCorpus(languages, options.vocabulary)
    length = config.data.sequence_length
    model = Encoder(
        config.model, variant=config.routing, languages=languages, vocabulary=options.vocabulary, positions=length
    )
    layout = Layout(dist.get_rank(), dist.get_world_size(), 1)
    engine = Engine(
        model, config.train, read_deepspeed_json(ROOT / "ds_configs" / f"{ds}.json"), options.precision, layout
    )
    if fast:
        make_fast(engine, config.model.compile, config.train.graphs, True)
    stream = TrainStream(corpus, languages, rows=config.train.batch, row_format=config.data.row_format, seed=0)
    held_out = None
    if len(languages) > 1:
        held_out = ValidationStream(
            corpus, languages, rows=config.meta.batch or config.train.batch,
            row_format=config.data.row_format, seed=0,
            languages_per_step=config.meta.languages_per_step,
        )  # fmt: skip

    def ready(batch: Any) -> Any:
        """The batch as training has it: where it is copied to a device, from memory for which the host need not wait."""
        return batch if engine.device.type == "cpu" else batch.pinned()

    def train(step: int) -> list[Any]:
        return [ready(stream.batch(step, *rows)) for rows in engine.slices(config.train.batch)]

    def validation(step: int) -> list[Any]:
        assert held_out is not None
        language = train(step)[0].step_languages[0]
        return [ready(held_out.batch(step, language, *rows)) for rows in engine.slices(held_out.rows)]

    return engine, config, train, validation


def shapes(options: argparse.Namespace) -> list[str]:
    """Returns the settings for `--rows`, `--length` and `--dropout`."""
    settings = [f"train.batch={options.rows}", f"meta.batch={options.rows}", f"data.sequence_length={options.length}"]
    return [*settings, f"model.dropout={options.dropout}", f"model.attention_dropout={options.dropout}"]


def plain_step(engine: Any, batches: list[Any]) -> Callable[[], Any]:
    """A training step on these batches, as a function to time."""
    return lambda: engine.train_step(batches)


def meta_step(engine: Any, section: Any, batches: list[Any], validation: list[Any]) -> Callable[[], Any]:
    """A meta step as the [meta] section says on these batches, as a function to time."""
    from mlinterf_ds.engine.meta_step import MetaStep

    step = MetaStep(engine, section)
    return lambda: step.step(batches, validation)
