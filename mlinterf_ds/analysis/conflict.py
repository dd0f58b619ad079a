"""Gradient conflict (paper, sections 3.1 and 3.3, figure 3): how far languages pull shared parameters apart.

On a checkpoint (`run`) and during pretraining (`Monitor`). The similarity of two languages is the cosine of their
gradients; two batches of one language give the ceiling. A short batch's gradient is noisy, which lowers all cosines alike:
compare with the ceiling, never with 1.

<output>/similarity.csv         layer, component, left, right, cosine: everything measured
<output>/matrix.png/.svg/.csv   the languages' matrices: whole model and components
<output>/components.png/.svg    mean within and between, by layer and component
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.analysis.job import AnalysisJob
from mlinterf_ds.data.windows import TokenSource
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_csv
from mlinterf_ds.gradients.collect import COMPONENTS, Draws
from mlinterf_ds.gradients.similarity import ALL, Similarity, measure, spread
from mlinterf_ds.plots.conflict import FIELDS, by_component, read_curves, training_curves
from mlinterf_ds.plots.heatmaps import heatmaps
from mlinterf_ds.pretrain.config import ConflictConfig

LOGGED_PAIRS = 28  # pairs of languages with a curve of their own in MLflow: 8 languages


def run(job: AnalysisJob) -> dict[str, Any]:
    """Measure a checkpoint's conflict, or draw figure 3 of runs that measured it; the summary."""
    settings = job.config.conflict
    if settings.runs:
        return _draw_runs(job)
    saved = job.model.saved["config"]
    engine = job.engine(settings.micro_batch * job.layout.data, settings.micro_batch)
    draws = Draws(
        job.text,
        job.languages,
        job.model_languages,
        config=settings,
        length=job.model.positions,
        mask_share=saved["data"]["mask"],
        seed=settings.seed,
        engine=engine,
    )
    found, costs = measure(engine, draws, settings.sketch, settings.seed)
    matrix = found.matrix()
    if not np.isfinite(matrix).all():
        raise UserError(
            f"{job.model.path}: a gradient is zero or not finite in {job.precision}: the model has diverged, or try "
            "--set train.precision=fp32"
        )
    summary = {
        "analysis": "conflict",
        "checkpoint": str(job.model.path),
        "step": int(job.model.saved["updates"]) + int(job.model.saved["skipped"]),
        "languages": list(job.languages),
        "sequences": draws.rows,
        "seed": settings.seed,
        **spread(matrix),
        "matrix": matrix.tolist(),
        "corrected": _plain(found.corrected()),
        "components": {part: spread(found.matrix(ALL, part)) for part in _parts(found)},
        "costs": costs,
    }
    if job.first:
        _write(job, found, summary)
        facts = {f"conflict/{name}": summary[name] for name in ("within", "between", "least") if name in summary}
        job.log(facts | {f"conflict/{name}": v for name, v in costs.items() if not isinstance(v, str)}, 0)
        print(_shown(summary), flush=True)
    return summary


def _parts(found: Similarity) -> list[str]:
    return [part for layer, part in found.scopes() if layer == ALL and part != ALL]


def _plain(matrix: np.ndarray) -> list[list[float | None]]:
    return [[float(value) if np.isfinite(value) else None for value in row] for row in matrix]


def _write(job: AnalysisJob, found: Similarity, summary: Mapping[str, Any]) -> None:
    """Table and figures."""
    codes, parts = list(found.languages), _parts(found)
    cosines = [(layer, part, found.matrix(layer, part)) for layer, part in found.scopes()]
    rows = [
        [layer, part, codes[left], codes[right], float(matrix[left, right])]
        for layer, part, matrix in cosines
        for left, right in found.pairs()
    ]
    write_csv(job.output / "similarity.csv", ["layer", "component", "left", "right", "cosine"], rows)
    error = "" if summary["costs"]["sketch"] == "exact" else f"; projected to {summary['costs']['sketch']} dimensions"
    caption = (
        f"{job.model.path}, step {summary['step']}; {summary['sequences']} training sequences a gradient of "
        f"{job.text.folder.name}, seed "
        f"{summary['seed']}{error}\ndiagonal: two batches of one language"
    )
    panels = {"whole model": found.matrix()} | {part: found.matrix(ALL, part) for part in parts}
    title = "Similarity of the languages' gradients"
    heatmaps(panels, codes, codes, job.output / "matrix.png", title=title, label="cosine", caption=caption)
    by_component(by_layer(found), job.output / "components.png", title=title, caption=caption.split("\n")[0])


def by_layer(found: Similarity) -> dict[str, dict[str, tuple[float, float]]]:
    """component -> layer ('' for what lies outside the layers) -> (mean within, mean between)."""
    table: dict[str, dict[str, tuple[float, float]]] = {}
    for layer, part in [("", "whole model"), *((str(a), p) for p in COMPONENTS for a, q in found.groups if p == q)]:
        outside = layer in ("", "None")
        matrix = found.matrix() if part == "whole model" else found.matrix(None if outside else int(layer), part)
        facts = spread(matrix)
        name = f"{part} (outside)" if layer == "None" and part == "other" else part
        table.setdefault(name, {})["" if outside else layer] = (facts["within"], facts.get("between", np.nan))
    return table


def _shown(summary: Mapping[str, Any]) -> str:
    lines = [f"{'gradient similarity':<22}{'within':>9}{'between':>9}"]
    for name, facts in {"whole model": summary, **summary["components"]}.items():
        between = f"{facts['between']:>9.3f}" if "between" in facts else f"{'-':>9}"
        lines.append(f"{name:<22}{facts['within']:>9.3f}{between}")
    costs = summary["costs"]
    lines.append(
        f"{costs['seconds_gradients']:.1f} s for the gradients of {summary['sequences']} sequences, "
        f"{costs['seconds_similarity']:.1f} s for their similarities ({costs['sketch']})"
    )
    return "\n".join(lines)


def _draw_runs(job: AnalysisJob) -> dict[str, Any]:
    """Figure 3 from the conflict.csv of several runs."""
    places = [str(place) for place in job.config.conflict.runs]
    short = [Path(place).name or place for place in places]
    names = short if len(set(short)) == len(short) else places
    runs = {name: read_curves(Path(place) / "conflict.csv") for name, place in zip(names, places, strict=True)}
    summary: dict[str, Any] = {"analysis": "conflict", "runs": {}}
    for name, curves in runs.items():
        last = {f"{left}-{right}": points[-1] for (left, right), points in curves.items()}
        summary["runs"][name] = {pair: {"step": step, "cosine": value} for pair, (step, value) in last.items()}
    if job.first:
        rows = [(run, *pair, *point) for run, found in runs.items() for pair, line in found.items() for point in line]
        write_csv(job.output / "training.csv", ["run", "left", "right", "step", "cosine"], rows)
        caption = "dashed: two batches of one language. " + ", ".join(map(str, job.config.conflict.runs))
        title = "Gradient similarity during training"
        training_curves(runs, job.output / "training.png", title=title, caption=caption)
    return summary


class Monitor:
    """Conflict during pretraining: measured before the training of a step, on rows, masks and dropout of its own.

    <output>/conflict.csv   step, scope (model or a component), left, right, cosine
    """

    def __init__(
        self,
        engine: Engine,
        corpus: TokenSource,
        languages: Sequence[str],
        config: ConflictConfig,
        output: Path,
        *,
        name: str,
        length: int,
        mask_share: float,
        seed: int,
        text: str,
    ):
        self.engine, self.config, self.output, self.name, self.seed = engine, config, output, name, seed
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
        return self.engine.step % self.config.every == 0

    def measure(self) -> dict[str, float]:
        """Similarities at the engine's step, as metrics; also added to conflict.csv. The same on all ranks."""
        step = self.engine.step
        found, costs = measure(self.engine, self.draws, self.config.sketch, self.seed, step)
        matrix, codes = found.matrix(), found.languages
        facts = {f"conflict/{name}": value for name, value in spread(matrix).items()}
        facts |= {f"conflict/{name}": costs[name] for name in ("seconds_gradients", "seconds_similarity")}
        pairs = list(found.pairs())
        if len(pairs) - len(codes) <= LOGGED_PAIRS:
            facts |= {f"conflict/{codes[left]}-{codes[right]}": float(matrix[left, right]) for left, right in pairs}
        if self.first:
            self._append(step, found)
        return facts

    def _append(self, step: int, found: Similarity) -> None:
        if not self._table.is_file():
            write_csv(self._table, FIELDS, [])
        codes, rows = found.languages, []
        for scope in ("model", *_parts(found)):
            cosines = found.matrix(ALL, ALL if scope == "model" else scope)
            rows += [[step, scope, codes[a], codes[b], float(cosines[a, b])] for a, b in found.pairs()]
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
