"""The paper's figure 4c: validation perplexity of plain and of meta adapters over training, from the pretraining records."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlinterf_ds.plots import style
from mlinterf_ds.results.records import Analysis, Records

CONVERGENCE = "convergence"
ROWS = ("adpt", "meta_adpt")

Runs = list[dict[int, float]]  # step -> perplexity, of each seed


def draw(records: Records, folder: Path) -> list[Analysis]:
    """A figure for each pair set that was trained in both ways: a panel a language, lines the mean over the seeds that both
    have, bands from the lowest to the highest seed."""
    drawn = []
    for name in dict.fromkeys(m.set for m in records.models if m.kind == "pair"):
        models = {
            row: {m.seed: m for m in records.models if (m.set, m.variant, m.control) == (name, row, "")} for row in ROWS
        }
        seeds = sorted(set.intersection(*(set(found) for found in models.values())))
        if not seeds:
            continue
        languages = models[ROWS[0]][seeds[0]].languages
        path = folder / f"{CONVERGENCE}-{name}.png"
        figure = Figure(figsize=(3.8 * len(languages), 3.2), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, language in zip(figure.subplots(1, len(languages), squeeze=False)[0], languages, strict=True):
            runs = {
                row: [dict(found[seed].history.get(language, [])) for seed in seeds] for row, found in models.items()
            }
            _panel(axes, language, runs)
        style._save(figure, path)
        drawn.append(str(path))
    return [Analysis("all", [], "all", records.seeds[0], CONVERGENCE, {}, drawn)] if drawn else []


def _panel(axes: Axes, language: str, rows: dict[str, Runs]) -> None:
    curves = {row: spread(runs) for row, runs in rows.items()}
    points = [(int(step), value) for curve in curves.values() for step, *values in curve.T for value in values]
    style._frame(axes, language, points, [])
    for index, (row, (steps, mean, low, high)) in enumerate(curves.items()):
        look = style._look(index)
        axes.plot(
            steps,
            mean,
            **look,
            label=f"{row}, {len(rows[row])} seed{'s' * (len(rows[row]) > 1)}",
            linewidth=1.5,
            markersize=4,
        )
        axes.fill_between(steps, low, high, color=look["color"], alpha=0.2, linewidth=0)
    axes.legend(fontsize=8, frameon=False)


def spread(runs: Runs) -> np.ndarray:
    """(4, steps): the steps that all seeds were evaluated at; mean, lowest and highest perplexity there.

    Without step 0: beside an untrained model's perplexity all others look alike.
    """
    common = sorted(set.intersection(*(set(run) for run in runs)) - {0})
    steps = [step for step in common if all(math.isfinite(run[step]) for run in runs)]
    values = np.array([[run[step] for run in runs] for step in steps]).reshape(len(steps), len(runs))
    return np.stack([np.array(steps, dtype=float), values.mean(1), values.min(1), values.max(1)])
