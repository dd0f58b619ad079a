"""Gradients of the shared parameters, one language and one batch at a time, at any layout.

Legend: L languages; a gradient's number is 2 * (its language's index) + draw, draw 0 or 1: two batches of a language
without a row in common, whose similarity is the ceiling of what two languages can reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from mlinterf_ds.data.batch import Batch, Masker, key
from mlinterf_ds.data.windows import TokenSource, Windows
from mlinterf_ds.engine.engine import Engine, Rows
from mlinterf_ds.engine.space import Vector
from mlinterf_ds.errors import UserError
from mlinterf_ds.meta.bilevel import norm
from mlinterf_ds.model.encoder import SHARED
from mlinterf_ds.sections import ConflictSection

DRAWS = 2
PAPERS_ROWS, CPU_ROWS = 4096, 64  # rows of a gradient
Group = tuple[int | None, str]  # (layer or None, component)
COMPONENTS = ("attention", "ffn", "embedding", "other")  # other: norms, shared adapters, the head's own parameters


def group_of(name: str) -> Group:
    """The layer and component of a parameter.

    The word embeddings are the output matrix too, and their gradient is the sum of both uses.
    """
    if name.startswith("embeddings."):
        return None, "embedding"
    if not name.startswith("block.layers."):
        return None, "other"
    _, _, layer, module, *_ = name.split(".")
    return int(layer), {"self_attention": "attention", "mlp": "ffn"}.get(module, "other")


class Draws:
    """Batches for measuring: rows of the `train` split, with masks and an order of their own.

    Every measurement takes fresh rows of every language; a measurement is numbered by the step of training, or 0 on a
    checkpoint. A batch is a function of (seed, measurement, language, draw) and does not depend on other languages.
    """

    def __init__(
        self,
        corpus: TokenSource,
        languages: Sequence[str],
        known: Sequence[str],
        *,
        config: ConflictSection,
        length: int,
        mask_share: float,
        seed: int,
        engine: Engine,
    ):
        self.languages = tuple(languages)
        self._known = list(known)
        self._windows = {}
        for code in self.languages:
            tokens = corpus.tokens(code, "train")
            if len(tokens) < DRAWS * (length - 1):
                raise UserError(
                    f"language {code!r}: its 'train' split has {len(tokens)} tokens, too few for two different rows of "
                    f"{length}: give it more text or leave it out of `languages`"
                )
            self._windows[code] = Windows(
                tokens, length - 1, key(seed, "conflict", code), partial(corpus.unchanged, code, "train")
            )
        on_cpu = engine.device.type == "cpu"
        self.rows = _rows(config, {code: w.count for code, w in self._windows.items()}, engine.layout.data, on_cpu)
        self._slices = engine.slices(self.rows, config.micro_batch)
        self._maskers = {
            (code, draw): Masker(seed, f"conflict/{code}/{draw}", length, corpus.vocabulary_size, mask_share)
            for code in self.languages
            for draw in range(DRAWS)
        }

    def batches(self, language: str, draw: int, measurement: int) -> list[Batch]:
        """This rank's micro-batches; their loss is the mean over the masked positions of all rows."""
        index, windows = self._known.index(language), self._windows[language]
        masker, first = self._maskers[language, draw], measurement * windows.count + draw * self.rows
        return [
            masker.batch(
                windows.visit(first + np.arange(start, stop)),
                np.full(stop - start, 1 / (self.rows * masker.masked)),
                np.full(stop - start, index),
                (index,),
                step=measurement,
                start=start,
            )
            for start, stop in self._slices
        ]


def _rows(config: ConflictSection, counts: dict[str, int], data_ranks: int, on_cpu: bool) -> int:
    """The rows of a gradient: as configured, or else the paper's number (a CPU's is smaller) as far as texts suffice."""
    shortest = min(counts, key=lambda code: counts[code])
    most = counts[shortest] // DRAWS
    wanted = config.sequences or min(CPU_ROWS if on_cpu else PAPERS_ROWS, most)
    if config.sequences is None:
        wanted -= wanted % data_ranks
    if wanted > most or wanted == 0:
        raise UserError(
            f"conflict.sequences={config.sequences or data_ranks}: language {shortest!r} has {counts[shortest]} rows in "
            f"its 'train' split, which makes two batches of at most {most} rows without a row in common: set "
            f"conflict.sequences to {most} or fewer, or leave the language out"
        )
    if wanted % data_ranks:
        raise UserError(f"conflict.sequences={wanted} is not divisible by {data_ranks} data-parallel ranks: change it")
    return wanted


def gradient(engine: Engine, batches: Sequence[Rows]) -> Vector:
    """This rank's shards (fp32, unscaled) of the gradient of the shared parameters on these micro-batches.

    An overflow (fp16) halves the loss scale for this gradient only; at scale 1 what is not finite stays so. The engine's
    state is afterwards as before.
    """
    space, scale = engine.spaces[SHARED], engine.scale.value
    try:
        while True:
            engine.accumulate(batches, [space])
            scaled = space.gradient()
            if engine.scale.value == 1.0:
                return scaled
            if math.isfinite(norm(space, scaled)):
                return [shard.div_(engine.scale.value) for shard in scaled]
            engine.scale.value = max(1.0, engine.scale.value / 2)
    finally:
        engine.scale.value = scale


def gradients(engine: Engine, draws: Draws, measurement: int) -> Iterator[Vector]:
    """Every language's gradients, in the order of their numbers."""
    for language in draws.languages:
        for draw in range(DRAWS):
            yield gradient(engine, draws.batches(language, draw, measurement))
