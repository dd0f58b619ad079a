"""Figures of gradient conflict: similarity during training (the paper's figure 3), and by layer and component."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import read_csv
from mlinterf_ds.plots import style
from mlinterf_ds.plots.heatmaps import heading

FIELDS = ["step", "scope", "left", "right", "cosine"]  # of conflict.csv
MOST_LINES = 8  # pairs drawn one by one; of more, the mean and the range
SMOOTHED = 60  # points of a line from which it is drawn as a running mean over the pale points

Curves = dict[tuple[str, str], list[tuple[int, float]]]  # (left, right) -> (step, cosine)


def read_curves(path: Path, scope: str = "model") -> Curves:
    """The lines of a conflict.csv. UserError if it is not one."""
    found: Curves = {}
    for row in read_csv(path, FIELDS, "a run writes it with --set conflict.every=N (its output folder is meant)"):
        if row["scope"] == scope:
            with refusing(f"{path}: not a table of {','.join(FIELDS)}"):
                found.setdefault((row["left"], row["right"]), []).append((int(row["step"]), float(row["cosine"])))
    if not found:
        raise UserError(f"{path}: has no measurement of scope {scope!r}")
    return found


def training_curves(runs: Mapping[str, Curves], path: Path, *, title: str, caption: str = "") -> None:
    """Gradient similarity against the training step: within a language dashed (the ceiling), between two solid.

    `runs` maps a run's name to its curves; the name is left out of the labels where there is only one. PNG and SVG.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    dashed: set[str] = set()
    bands: dict[str, tuple[list[float], list[float]]] = {}
    for run, curves in runs.items():
        suffix = f" ({run})" if len(runs) > 1 else ""
        if len(curves) <= MOST_LINES:
            chosen = {f"{left} – {right}{suffix}": points for (left, right), points in curves.items()}
            lines |= chosen
            dashed |= {f"{left} – {right}{suffix}" for left, right in curves if left == right}
            continue
        for within in (True, False):
            name = ("within a language" if within else "between two") + suffix
            lines[name], bands[name] = _summary([p for (a, b), p in curves.items() if (a == b) == within])
            dashed |= {name} if within else set()
    lines = {name: kept for name, points in lines.items() if (kept := sorted(p for p in points if math.isfinite(p[1])))}
    figure = Figure(figsize=(7.2, max(4.2, 0.25 * len(lines) + 1.5)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _frame(axes)
    looks = {name: _look(index, name in dashed) for index, name in enumerate(sorted(lines))}
    for name, points in lines.items():
        _draw(axes, points, looks[name], bands.get(name))
    style._label_ends(figure, axes, {name: _smooth(points)[-1] for name, points in lines.items()}, looks, ".2f")
    heading(figure, title, caption + "; band: 10th to 90th percentile of the pairs" * bool(bands))
    style._save(figure, path)


def _summary(curves: list[list[tuple[int, float]]]) -> tuple[list[tuple[int, float]], tuple[list[float], list[float]]]:
    """Mean of many pairs at every step, and their 10th and 90th percentiles."""
    steps = sorted({step for points in curves for step, _ in points})
    tables = [dict(points) for points in curves]
    values = [[table[step] for table in tables if step in table] for step in steps]
    mean = [(step, float(np.mean(found))) for step, found in zip(steps, values, strict=True)]
    low, high = ([float(np.percentile(found, q)) for found in values] for q in (10, 90))
    return mean, (low, high)


def _look(index: int, dashed: bool) -> dict[str, Any]:
    look = style._look(index)
    return look | {"linestyle": (0, (5, 3)) if dashed else "-"}


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A running mean over a twentieth of a long line; a short one as it is."""
    if len(points) <= SMOOTHED:
        return points
    half = len(points) // 40
    values = [value for _, value in points]
    return [(step, float(np.mean(values[max(0, i - half) : i + half + 1]))) for i, (step, _) in enumerate(points)]


def _draw(
    axes: Axes, points: list[tuple[int, float]], look: dict[str, Any], band: tuple[list[float], list[float]] | None
) -> None:
    steps, values = zip(*points, strict=True)
    if len(points) > SMOOTHED:
        axes.plot(steps, values, color=look["color"], linewidth=0.6, alpha=0.3, zorder=1)
    elif band and len(band[0]) == len(points):
        axes.fill_between(steps, *band, color=look["color"], alpha=0.15, linewidth=0, zorder=1)
    _, smoothed = zip(*_smooth(points), strict=True)
    every = max(1, len(points) // 9)
    axes.plot(steps, smoothed, **look, markevery=every, linewidth=1.5, markersize=4, zorder=3)


def _frame(axes: Axes) -> None:
    axes.axhline(0, color="#606060", linewidth=0.8, zorder=2)
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel("training step")
    axes.set_ylabel("cosine of the gradients")
    axes.margins(x=0.02)


def by_component(
    table: Mapping[str, Mapping[str, tuple[float, float]]], path: Path, *, title: str, caption: str = ""
) -> None:
    """Mean similarity by layer, a panel a component: (within a language, between two) under component and layer.

    A component that lies outside the layers has the one layer ''. PNG and SVG.
    """
    parts = list(table)
    layered = [part for part in parts if "" not in table[part]]
    flat = [part for part in parts if "" in table[part]]
    count = max([len(table[part]) for part in layered], default=1)
    sizes = [max(1.6, 0.32 * count)] * len(layered) + [max(1.2, 0.7 * len(flat))] * bool(flat)
    figure = Figure(figsize=(sum(sizes) + 1.6, 3.9), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(sizes), sharey=True, squeeze=False, width_ratios=sizes)[0]
    for axes, part in zip(grid, layered, strict=False):
        _panel(axes, list(table[part]), list(table[part].values()), joined=True)
        axes.set_title(part, fontsize=9)
        axes.set_xlabel("layer")
    if flat:
        _panel(grid[-1], [part.replace(" ", "\n") for part in flat], [table[part][""] for part in flat], joined=False)
    grid[0].set_ylabel("cosine of the gradients")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    heading(figure, title, caption)
    style._save(figure, path)


def _panel(axes: Axes, names: list[str], values: list[tuple[float, float]], *, joined: bool) -> None:
    places = np.arange(len(names))
    ceilings, between = np.array(values, dtype=float).T
    line: dict[str, Any] = {"linestyle": "-" if joined else "none", "linewidth": 1.5, "markersize": 5}
    dash = line | ({"linestyle": (0, (5, 3))} if joined else {})
    axes.plot(places, ceilings, color=style.OKABE_ITO[0], marker="s", label="within a language", **dash)
    if np.isfinite(between).any():
        axes.plot(places, between, color=style.OKABE_ITO[1], marker="o", label="between two", **line)
    axes.axhline(0, color="#606060", linewidth=0.8)
    axes.grid(True, axis="y", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    every = max(1, len(names) // 12)
    axes.set_xticks(places[::every], names[::every], fontsize=8)
    axes.set_xlim(-0.5, len(names) - 0.5)
