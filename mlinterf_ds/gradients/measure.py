"""Measures how similar languages' gradients of the shared parameters are (paper, section 3.1): once, or while a run trains.

Legend: L languages; a gradient's number is as in `mlinterf_ds.gradients.similarity`.
"""

from __future__ import annotations

import csv
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlinterf_ds.data.batch import Batch, Masker, key
from mlinterf_ds.data.windows import TokenSource, Windows, split_windows
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.space import Vector
from mlinterf_ds.engine.throughput import peak_memory
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import read_csv, write_csv
from mlinterf_ds.gradients.similarity import ALL, DRAWS, Exact, Similarity, Sketch, pairs, spread
from mlinterf_ds.meta.bilevel import norm
from mlinterf_ds.model.encoder import SHARED, Rows
from mlinterf_ds.sections import ConflictSection, RowFormat

if TYPE_CHECKING:
    from mlinterf_ds.plots.curves import Curves

PAPERS_ROWS, CPU_ROWS = 4096, 64  # rows of a gradient in the paper, and by default on a CPU
MOST_EXACT = 4  # languages up to which sketch=auto keeps whole gradients
DIMENSION = 4096  # dimension of the projection for more languages
FIELDS = ["step", "scope", "left", "right", "cosine"]  # columns of conflict.csv
LOGGED_PAIRS = 28  # pairs of languages with a curve of their own in MLflow: 8 languages


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
        row_format: RowFormat,
        seed: int,
        engine: Engine,
    ):
        self.languages = tuple(languages)
        self._known = list(known)
        self._windows: dict[str, Windows] = {}
        for code in self.languages:
            self._windows[code] = windows = split_windows(
                corpus, code, "train", row_format, key(seed, "conflict", code)
            )
            if len(windows.tokens) < DRAWS * windows.width:
                raise UserError(
                    f"language {code!r}: its 'train' split has {len(windows.tokens)} tokens, too few for two different rows of "
                    f"{row_format.length}: give it more text or leave it out of `languages`"
                )
        on_cpu = engine.device.type == "cpu"
        self.rows = _rows(config, {code: w.count for code, w in self._windows.items()}, engine.layout.data, on_cpu)
        self._slices = engine.slices(self.rows, config.micro_batch)
        self._maskers = {
            (code, draw): Masker(seed, f"conflict/{code}/{draw}", row_format, corpus.vocabulary)
            for code in self.languages
            for draw in range(DRAWS)
        }

    def batches(self, language: str, draw: int, measurement: int) -> list[Batch]:
        """This rank's micro-batches; their loss is the mean over the masked positions of all rows."""
        index, windows = self._known.index(language), self._windows[language]
        masker, first = self._maskers[language, draw], measurement * windows.count + draw * self.rows
        batches = []
        for start, stop in self._slices:
            rows, languages = windows.visit(first + np.arange(start, stop)), np.full(stop - start, index)
            weights = np.full(stop - start, 1 / (self.rows * masker.masked))
            batches.append(masker.batch(*rows, weights, languages, (index,), step=measurement, start=start))
        return batches


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

    An overflow (fp16) halves the loss scale for this gradient only; at scale 1 infinities and NaN stay. The engine's
    state is afterwards as before.
    """
    engine.settle()
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


def measure(
    engine: Engine, draws: Draws, sketch: str | int, seed: int, measurement: int = 0
) -> tuple[Similarity, dict[str, Any]]:
    """Measures the similarities of the languages' gradients at the engine's weights.

    sketch: the projection's dimension, "exact", or "auto" (exact up to MOST_EXACT languages). Returns them with their
    costs: seconds, and bytes of this rank beyond the model and one gradient.
    """
    from deepspeed.accelerator import get_accelerator

    dimension = sketch if sketch != "auto" else "exact" if len(draws.languages) <= MOST_EXACT else DIMENSION
    seconds, last = {"gradients": 0.0, "similarity": 0.0}, time.perf_counter()

    def lap(work: str) -> None:
        """Adds the seconds since the last lap to those of `work`, after the device's work."""
        nonlocal last
        get_accelerator().synchronize()
        now = time.perf_counter()
        seconds[work] += now - last
        last = now

    table = Exact(engine) if dimension == "exact" else Sketch(engine, int(dimension), seed)
    lap("similarity")
    peak = 0
    for language, draw in itertools.product(draws.languages, range(DRAWS)):  # in the order of the gradients' numbers
        vector = gradient(engine, draws.batches(language, draw, measurement))
        lap("gradients")
        peak = peak or peak_memory(engine.device)  # one gradient has been computed, nothing compared
        table.add(vector)
        del vector
        lap("similarity")
    products = table.products()
    lap("similarity")
    costs = {
        "seconds_gradients": seconds["gradients"],
        "seconds_similarity": seconds["similarity"],
        "ratio": 1 + seconds["similarity"] / seconds["gradients"],
        "bytes_held": table.bytes,
        "bytes_peak_increase": peak_memory(engine.device) - peak,
    }
    return Similarity(draws.languages, table.groups, products), costs | {"sketch": dimension}


class Monitor:
    """Conflict during pretraining: measured before the training of a step, on rows, masks and dropout of its own.

    <output>/conflict.csv   step, scope (model or a component), left, right, cosine
    <output>/conflict.png   the cosines against the step (paper, figure 3)
    """

    def __init__(
        self,
        engine: Engine,
        draws: Draws,
        output: Path,
        *,
        every: int,
        sketch: str | int,
        name: str,
        seed: int,
        text: str,
    ):
        self.engine, self.draws, self.output, self.every, self.sketch = engine, draws, output, every, sketch
        self.name, self.seed, self.first = name, seed, engine.layout.rank == 0
        self.caption = (
            f"{text} text, {draws.rows} training sequences a gradient, seed {seed}; dashed: two batches of one language"
        )
        self._table = output / "conflict.csv"
        if self.first and self._table.is_file():  # a resumed run measures again from its checkpoint on
            with self._table.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(FIELDS)]  # a killed run leaves half a line
            write_csv(self._table, FIELDS, [row for row in rows[1:] if int(row[0]) < engine.step])

    @property
    def due(self) -> bool:
        """Whether this step is one to measure."""
        return self.engine.step % self.every == 0

    def measure(self) -> dict[str, float]:
        """Similarities at the engine's step, as metrics; also added to conflict.csv. The same on all ranks."""
        step = self.engine.step
        similarity, costs = measure(self.engine, self.draws, self.sketch, self.seed, step)
        matrix, codes = similarity.matrix(), similarity.languages
        facts = {f"conflict/{name}": value for name, value in spread(matrix).items()}
        facts |= {f"conflict/{name}": costs[name] for name in ("seconds_gradients", "seconds_similarity")}
        indices = pairs(len(codes))
        if len(indices) - len(codes) <= LOGGED_PAIRS:
            facts |= {f"conflict/{codes[left]}-{codes[right]}": float(matrix[left, right]) for left, right in indices}
        if self.first:
            if not self._table.is_file():
                write_csv(self._table, FIELDS, [])
            scopes = {"model": matrix} | {part: similarity.matrix(ALL, part) for part in similarity.components}
            rows = [
                [step, scope, codes[a], codes[b], float(m[a, b])] for scope, m in scopes.items() for a, b in indices
            ]
            with self._table.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
        return facts

    def draw(self) -> list[Path]:
        """Draws all measurements so far; returns the files written (rank 0)."""
        if not self.first or not self._table.is_file():
            return []
        from mlinterf_ds.plots.curves import training_curves  # it loads matplotlib

        figure = self.output / "conflict.png"
        curves = {self.name: read_curves(self._table)}
        training_curves(curves, figure, title=f"{self.name}: gradient similarity", caption=self.caption)
        return [self._table, figure]


def read_curves(path: Path) -> Curves:
    """The whole model's similarities in a conflict.csv. UserError if the file is missing, no such table, or has none."""
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in read_csv(path, FIELDS, "a run writes it with --set conflict.every=N (its output folder is meant)"):
        if row["scope"] == "model":
            with refusing(f"{path}: not a table of {','.join(FIELDS)}"):
                curves.setdefault((row["left"], row["right"]), []).append((int(row["step"]), float(row["cosine"])))
    if not curves:
        raise UserError(f"{path}: has no measurement of scope 'model'")
    return curves
