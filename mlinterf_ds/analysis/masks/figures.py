"""The tables and figures of the masks; `main.py` lists them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlinterf_ds.analysis.job import AnalysisJob
from mlinterf_ds.analysis.masks.similarity import Masks
from mlinterf_ds.files import write_csv
from mlinterf_ds.gradients.similarity import ALL
from mlinterf_ds.plots.heatmaps import heatmaps
from mlinterf_ds.plots.masks import extremes_figure, layers_figure

TITLE = "Similarity of the languages' masks"


def write_tables(output: Path, masks: Masks, scores: Sequence[dict[str, Any]]) -> None:
    """Write masks.csv, pruned.csv, similarity.csv and extremes.csv. scores: a row for each language and seed."""
    codes = list(masks.languages)
    runs = [f"{code}/{seed}" for code in codes for seed in masks.seeds]
    pi_of_groups = masks.pi.reshape(len(runs), -1).T
    groups = zip(masks.layer, masks.component, masks.names, masks.parameters, strict=True)
    rows = [[*group, *(f"{v:.6g}" for v in values)] for group, values in zip(groups, pi_of_groups, strict=True)]
    write_csv(output / "masks.csv", ["layer", "component", "group", "parameters", *runs], rows)
    write_csv(output / "pruned.csv", list(scores[0]), [list(score.values()) for score in scores])
    similar = []
    for layer, component in masks.scopes():
        cosine, correlation = (masks.matrix(layer, component, centred=centred) for centred in (False, True))
        for a, b in masks.pairs():
            similar.append([layer, component, codes[a], codes[b], _cell(cosine[a, b]), _cell(correlation[a, b])])
    write_csv(output / "similarity.csv", ["layer", "component", "left", "right", "cosine", "correlation"], similar)
    extremes = [
        [code, name, *map(float, values)] for index, code in enumerate(codes) for name, values in masks.extremes(index)
    ]
    write_csv(output / "extremes.csv", ["chosen_by", "group", *codes], extremes)


def draw_figures(job: AnalysisJob, masks: Masks, summary: dict[str, Any]) -> None:
    """Draw layers, extremes and matrix, each as PNG and SVG with the numbers behind it as CSV."""
    codes, output = list(masks.languages), job.output
    groups = ", ".join(f"{count} {kind}" for kind, count in summary["groups"].items())
    caption = (
        f"{job.model.path}, step {summary['step']}, text of {job.text.folder.name}\n{groups}; lambda {summary['penalty']:g}, {summary['steps']} steps of "
        f"{summary['rows']} rows, seeds {', '.join(map(str, masks.seeds))}"
    )
    by_layer = {part: {layer: masks.matrix(layer, part) for layer in masks.layers} for part in masks.components}
    note = f"{caption}\ndashed: two seeds of one language"
    layers_figure(by_layer, codes, output / "layers.png", title=TITLE, caption=note)
    extremes = {code: masks.extremes(index) for index, code in enumerate(codes)}
    extremes_figure(extremes, codes, output / "extremes.png", title="Groups of extreme pi", caption=caption)
    panels = {"whole model": masks.matrix()} | {part: masks.matrix(ALL, part) for part in masks.components}
    note = f"{caption}\ndiagonal: two seeds of one language"
    heatmaps(panels, codes, codes, output / "matrix.png", title=TITLE, label="cosine of pi", caption=note)


def _cell(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else ""
