"""Gradient conflict (paper, sections 3.1 and 3.3, figure 3): how far languages pull shared parameters apart.

It is measured here on a checkpoint, and by `gradients/measure.py` during pretraining. The similarity of two languages is the
cosine of their gradients. Two batches of one language give the ceiling: the gradient of a short batch is noisy, which lowers all
cosines alike, so compare with the ceiling and never with 1.

<output>/similarity.csv         layer, component, left, right, cosine: everything measured
<output>/matrix.png/.svg/.csv   the languages' matrices: whole model and components
<output>/components.png/.svg    mean within and between, by layer and component
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.analysis.job import AnalysisJob
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_csv
from mlinterf_ds.gradients.measure import Draws, measure, read_curves
from mlinterf_ds.gradients.similarity import ALL, COMPONENTS, Similarity, pairs, spread, spread_table
from mlinterf_ds.plots.curves import training_curves
from mlinterf_ds.plots.heatmaps import heatmaps
from mlinterf_ds.plots.similarity import by_component


def run(job: AnalysisJob) -> dict[str, Any]:
    """Measure a checkpoint's conflict, or draw figure 3 of runs that measured it; the summary."""
    settings = job.config.conflict
    if settings.runs:
        return _draw_runs(job)
    engine = job.engine(settings.micro_batch * job.layout.data, settings.micro_batch)
    draws = Draws(
        job.text, job.languages, job.model.languages, config=settings, row_format=job.model.row_format,
        seed=settings.seed, engine=engine,
    )  # fmt: skip
    similarity, costs = measure(engine, draws, settings.sketch, settings.seed)
    matrix = similarity.matrix()
    if not np.isfinite(matrix).all():
        raise UserError(
            f"{job.model.path}: a gradient is zero or not finite in {job.precision}: the model has diverged, or try "
            "--set train.precision=fp32"
        )
    summary = {
        "analysis": "conflict",
        "checkpoint": str(job.model.path),
        "step": job.model.step,
        "languages": list(job.languages),
        "sequences": draws.rows,
        "seed": settings.seed,
        **spread(matrix),
        "matrix": matrix.tolist(),
        "corrected": [[x if math.isfinite(x) else None for x in row] for row in similarity.corrected().tolist()],
        "components": {part: spread(similarity.matrix(ALL, part)) for part in similarity.components},
        "costs": costs,
    }
    if job.first:
        _write(job, similarity, summary)
        facts = {f"conflict/{name}": summary[name] for name in ("within", "between", "least") if name in summary}
        job.log(facts | {f"conflict/{name}": v for name, v in costs.items() if not isinstance(v, str)}, 0)
        print(spread_table("gradient similarity", {"whole model": summary, **summary["components"]}))
        print(
            f"{costs['seconds_gradients']:.1f} s for the gradients of {draws.rows} sequences, "
            f"{costs['seconds_similarity']:.1f} s for their similarities ({costs['sketch']})", flush=True,
        )  # fmt: skip
    return summary


def _write(job: AnalysisJob, similarity: Similarity, summary: Mapping[str, Any]) -> None:
    """Write similarity.csv and draw both figures."""
    codes, rows = list(similarity.languages), []
    for layer, part in similarity.scopes():
        matrix = similarity.matrix(layer, part)
        rows += [[layer, part, codes[a], codes[b], float(matrix[a, b])] for a, b in pairs(len(codes))]
    write_csv(job.output / "similarity.csv", ["layer", "component", "left", "right", "cosine"], rows)
    error = "" if summary["costs"]["sketch"] == "exact" else f"; projected to {summary['costs']['sketch']} dimensions"
    caption = (
        f"{job.described}; {summary['sequences']} training sequences a gradient, seed {summary['seed']}{error}\n"
        "diagonal: two batches of one language"
    )
    panels = {"whole model": similarity.matrix()} | {
        part: similarity.matrix(ALL, part) for part in similarity.components
    }
    title = "Similarity of the languages' gradients"
    heatmaps(
        panels, codes, codes, job.output / "matrix.png", title=title, label="cosine", caption=caption, signed=True,
        noise={name: similarity.noise(ALL if name == "whole model" else name) for name in panels},
    )  # fmt: skip
    by_component(by_layer(similarity), job.output / "components.png", title=title, caption=caption.split("\n")[0])


def by_layer(similarity: Similarity) -> dict[str, dict[str, tuple[float, float]]]:
    """component -> layer ('' for what lies outside the layers) -> (mean within, mean between)."""
    table: dict[str, dict[str, tuple[float, float]]] = {}
    groups = sorted(similarity.groups, key=lambda group: COMPONENTS.index(group[1]))
    for layer, part in [(ALL, ALL), *groups]:
        facts = spread(similarity.matrix(layer, part))
        name = "whole model" if part == ALL else "other (outside)" if (layer, part) == (None, "other") else part
        layer_name = str(layer) if isinstance(layer, int) else ""
        table.setdefault(name, {})[layer_name] = (facts["within"], facts.get("between", np.nan))
    return table


def _draw_runs(job: AnalysisJob) -> dict[str, Any]:
    """Draw figure 3 from the conflict.csv of several runs; the summary holds the last similarity of each pair."""
    folders = [str(folder) for folder in job.config.conflict.runs]
    short = [Path(folder).name or folder for folder in folders]
    names = short if len(set(short)) == len(short) else folders
    runs = {name: read_curves(Path(folder) / "conflict.csv") for name, folder in zip(names, folders, strict=True)}
    summary: dict[str, Any] = {"analysis": "conflict", "runs": {}}
    for name, curves in runs.items():
        last = {f"{left}-{right}": points[-1] for (left, right), points in curves.items()}
        summary["runs"][name] = {pair: {"step": step, "cosine": value} for pair, (step, value) in last.items()}
    if job.first:
        rows = [(run, *pair, *point) for run, curves in runs.items() for pair, line in curves.items() for point in line]
        write_csv(job.output / "training.csv", ["run", "left", "right", "step", "cosine"], rows)
        title, caption = "Gradient similarity during training", "dashed: two batches of one language"
        training_curves(runs, job.output / "training.png", title=title, caption=caption)
    return summary
