"""Figures of gradient conflict: similarity during training (the paper's figure 3), and by layer and component."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import read_csv
from mlinterf_ds.plots import style
from mlinterf_ds.plots.style import DARK_GREY, DASHED, OKABE_ITO, Look, Points

FIELDS = ["step", "scope", "left", "right", "cosine"]  # columns of conflict.csv
MOST_LINES = 8  # pairs drawn one by one; of more, their mean and range
LONG = 60  # points of a line from which it is drawn as a running mean over the pale points

Curves = dict[tuple[str, str], Points]  # (left, right) -> (step, cosine)
Band = tuple[list[float], list[float]]  # 10th and 90th percentile at every step


def read_curves(path: Path, scope: str = "model") -> Curves:
    """Reads the measurements of one scope from a conflict.csv. UserError if the file is missing, no such table, or has none."""
    curves: Curves = {}
    for row in read_csv(path, FIELDS, "a run writes it with --set conflict.every=N (its output folder is meant)"):
        if row["scope"] == scope:
            with refusing(f"{path}: not a table of {','.join(FIELDS)}"):
                curves.setdefault((row["left"], row["right"]), []).append((int(row["step"]), float(row["cosine"])))
    if not curves:
        raise UserError(f"{path}: has no measurement of scope {scope!r}")
    return curves


def training_curves(runs: Mapping[str, Curves], path: Path, *, title: str, caption: str = "") -> None:
    """Draws gradient similarity against the training step: within a language dashed (the ceiling), between two solid.

    runs: a run's name, which is left out of the labels where it is the only one, -> its curves. Saves PNG and SVG.
    """
    lines: dict[str, Points] = {}
    dashed: set[str] = set()
    bands: dict[str, Band] = {}
    for run, curves in runs.items():
        suffix = f" ({run})" if len(runs) > 1 else ""
        if len(curves) <= MOST_LINES:
            lines |= {f"{left} – {right}{suffix}": points for (left, right), points in curves.items()}
            dashed |= {f"{left} – {right}{suffix}" for left, right in curves if left == right}
            continue
        for within in (True, False):
            name = ("within a language" if within else "between two") + suffix
            lines[name], bands[name] = _summary([points for (a, b), points in curves.items() if (a == b) == within])
            dashed |= {name} if within else set()
    finite = {name: sorted(point for point in points if math.isfinite(point[1])) for name, points in lines.items()}
    lines = {name: points for name, points in finite.items() if points}
    figure = style.new_figure(7.2, max(4.2, 0.25 * len(lines) + 1.5))
    axes = figure.add_subplot()
    axes.axhline(0, color=DARK_GREY, linewidth=0.8, zorder=2)
    style.tidy(axes, "both")
    style.step_ticks(axes)
    axes.set_xlabel("training step")
    axes.set_ylabel("cosine of the gradients")
    axes.margins(x=0.02)
    looks = {name: style.look(index, DASHED if name in dashed else "-") for index, name in enumerate(sorted(lines))}
    for name, points in lines.items():
        _draw(axes, points, looks[name], bands.get(name))
    style.label_ends(figure, axes, {name: _smooth(points)[-1] for name, points in lines.items()}, looks, ".2f")
    style.finish(figure, path, title, caption + "; band: 10th to 90th percentile of the pairs" * bool(bands))


def _summary(curves: list[Points]) -> tuple[Points, Band]:
    """The mean of many pairs at every step, and their band."""
    steps = sorted({step for points in curves for step, _ in points})
    tables = [dict(points) for points in curves]
    values = [[table[step] for table in tables if step in table] for step in steps]
    mean = [(step, float(np.mean(cosines))) for step, cosines in zip(steps, values, strict=True)]
    low, high = ([float(np.percentile(cosines, percent)) for cosines in values] for percent in (10, 90))
    return mean, (low, high)


def _smooth(points: Points) -> Points:
    """A running mean over a twentieth of a long line; a short line as it is."""
    if len(points) <= LONG:
        return points
    half = len(points) // 40
    values = [value for _, value in points]
    return [(step, float(np.mean(values[max(0, i - half) : i + half + 1]))) for i, (step, _) in enumerate(points)]


def _draw(axes: Axes, points: Points, look: Look, band: Band | None) -> None:
    steps, values = zip(*points, strict=True)
    if len(points) > LONG:
        axes.plot(steps, values, color=look["color"], linewidth=0.6, alpha=0.3, zorder=1)
    elif band and len(band[0]) == len(points):
        axes.fill_between(steps, *band, color=look["color"], alpha=0.15, linewidth=0, zorder=1)
    _, smoothed = zip(*_smooth(points), strict=True)
    every = max(1, len(points) // 9)
    axes.plot(steps, smoothed, **look, markevery=every, linewidth=1.5, markersize=4, zorder=3)


def by_component(
    table: Mapping[str, Mapping[str, tuple[float, float]]], path: Path, *, title: str, caption: str = ""
) -> None:
    """Draws mean similarity by layer, a panel a component. Saves PNG and SVG.

    table: component -> layer -> (within a language, between two); a component outside the layers has the one layer ''.
    """
    layered = [part for part in table if "" not in table[part]]
    flat = [part for part in table if "" in table[part]]
    count = max([len(table[part]) for part in layered], default=1)
    widths = [max(1.6, 0.32 * count)] * len(layered) + [max(1.2, 0.7 * len(flat))] * bool(flat)
    figure = style.new_figure(sum(widths) + 1.6, 3.9)
    grid = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, part in zip(grid, layered, strict=False):
        _panel(axes, list(table[part]), list(table[part].values()), joined=True)
        axes.set_title(part, fontsize=9)
        axes.set_xlabel("layer")
    if flat:
        _panel(grid[-1], [part.replace(" ", "\n") for part in flat], [table[part][""] for part in flat], joined=False)
    grid[0].set_ylabel("cosine of the gradients")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    style.finish(figure, path, title, caption)


def _panel(axes: Axes, names: list[str], values: list[tuple[float, float]], *, joined: bool) -> None:
    positions = np.arange(len(names))
    within, between = np.array(values, dtype=float).T
    line: dict[str, Any] = {"linestyle": "-" if joined else "none", "linewidth": 1.5, "markersize": 5}
    dash = line | ({"linestyle": DASHED} if joined else {})
    axes.plot(positions, within, color=OKABE_ITO[0], marker="s", label="within a language", **dash)
    if np.isfinite(between).any():
        axes.plot(positions, between, color=OKABE_ITO[1], marker="o", label="between two", **line)
    axes.axhline(0, color=DARK_GREY, linewidth=0.8)
    style.tidy(axes, "y")
    every = max(1, len(names) // 12)
    axes.set_xticks(positions[::every], names[::every], fontsize=8)
    axes.set_xlim(-0.5, len(names) - 0.5)
