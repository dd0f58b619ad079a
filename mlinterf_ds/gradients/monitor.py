"""Gradient conflict measured while a run trains (paper, section 3.1 and figure 3).

<output>/conflict.csv   step, scope (model or a component), left, right, cosine
<output>/conflict.png   the cosines against the step
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from mlinterf_ds.data.windows import TokenSource
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.files import write_csv
from mlinterf_ds.gradients.collect import Draws
from mlinterf_ds.gradients.similarity import ALL, Similarity, measure, spread
from mlinterf_ds.plots.conflict import FIELDS, read_curves, training_curves
from mlinterf_ds.sections import ConflictSection

LOGGED_PAIRS = 28  # pairs of languages with a curve of their own in MLflow: 8 languages


class Monitor:
    """Conflict during pretraining: measured before the training of a step, on rows, masks and dropout of its own.

    <output>/conflict.csv   step, scope (model or a component), left, right, cosine
    """

    def __init__(
        self,
        engine: Engine,
        corpus: TokenSource,
        languages: Sequence[str],
        config: ConflictSection,
        output: Path,
        *,
        every: int,
        name: str,
        length: int,
        mask_share: float,
        seed: int,
        text: str,
    ):
        self.engine, self.config, self.every, self.output = engine, config, every, output
        self.name, self.seed = name, seed
        self.draws = Draws(
            corpus,
            languages,
            languages,
            config=config,
            length=length,
            mask_share=mask_share,
            seed=seed,
            engine=engine,
        )
        self.caption = (
            f"{text} text, {self.draws.rows} training sequences a gradient, seed {seed}; dashed: two "
            "batches of one language"
        )
        self.first = engine.layout.rank == 0
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
        similarity, costs = measure(self.engine, self.draws, self.config.sketch, self.seed, step)
        matrix, codes = similarity.matrix(), similarity.languages
        facts = {f"conflict/{name}": value for name, value in spread(matrix).items()}
        facts |= {f"conflict/{name}": costs[name] for name in ("seconds_gradients", "seconds_similarity")}
        pairs = list(similarity.pairs())
        if len(pairs) - len(codes) <= LOGGED_PAIRS:
            facts |= {f"conflict/{codes[left]}-{codes[right]}": float(matrix[left, right]) for left, right in pairs}
        if self.first:
            self._append(step, similarity)
        return facts

    def _append(self, step: int, similarity: Similarity) -> None:
        if not self._table.is_file():
            write_csv(self._table, FIELDS, [])
        codes, rows = similarity.languages, []
        for scope in ("model", *measured_components(similarity)):
            cosines = similarity.matrix(ALL, ALL if scope == "model" else scope)
            rows += [[step, scope, codes[a], codes[b], float(cosines[a, b])] for a, b in similarity.pairs()]
        with self._table.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    def draw(self) -> list[Path]:
        """The figure of what was measured so far; the files written (rank 0)."""
        if not self.first or not self._table.is_file():
            return []
        figure = self.output / "conflict.png"
        curves = {self.name: read_curves(self._table)}
        training_curves(curves, figure, title=f"{self.name}: gradient similarity", caption=self.caption)
        return [self._table, figure]


def measured_components(similarity: Similarity) -> list[str]:
    """The components whose gradients were measured, over all layers."""
    return [part for layer, part in similarity.scopes() if layer == ALL and part != ALL]
