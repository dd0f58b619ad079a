"""Figures of interference: bars (the paper's figure 1), differences with intervals, curves by language (figures 2 and 4c).

Each is a PNG and an SVG, with what is drawn in a CSV beside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlinterf_ds.files import write_csv
from mlinterf_ds.plots import style
from mlinterf_ds.plots.heatmaps import heading

HATCHES = ["", "////", "....", "xxxx", "\\\\\\\\"]  # tell bars apart in grey print
BASELINE = "mono"  # dashed in curves
MOST_PANELS = 24  # languages drawn; the CSV has all
BARS_ACROSS = 22  # of one row
MOST_CATEGORIES = 40  # bars or intervals drawn: likewise
BINS = 40  # points of a curve of training losses


class Value(NamedTuple):
    """A bar or a point with its whiskers (NaN: none)."""

    category: str  # "sw with en"
    series: str  # "mono", "joint", "larger"
    value: float
    low: float = math.nan
    high: float = math.nan


Points = list[tuple[int, float]]
Curves = Mapping[str, Mapping[str, Mapping[int, Points]]]  # language -> model -> seed -> (step, value)


def bars(values: Sequence[Value], path: Path, *, title: str, label: str, caption: str = "") -> None:
    """Groups of bars, a group a category and a colour a series, their values above them. PNG, SVG, CSV."""
    categories, series, caption = _prepared(values, path, caption)
    across = max(1, BARS_ACROSS // len(series))
    down = -(-len(categories) // across)
    across = -(-len(categories) // down)  # rows of about equal length
    width = max(5.2, 0.4 * len(series) * across + 2.4)
    figure = Figure(figsize=(width, 2.5 * down + 1.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, 1, squeeze=False, sharey=True)[:, 0]
    for row, axes in enumerate(grid):
        _bars(axes, values, categories[row * across : (row + 1) * across], series)
        axes.set_xlim(-0.5, across - 0.5)
    figure.supylabel(label, fontsize=9)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8, frameon=False)
    heading(figure, title, caption)
    style._save(figure, path)


def _bars(axes: Axes, values: Sequence[Value], categories: list[str], series: list[str]) -> None:
    width = 0.8 / len(series)
    for number, name in enumerate(series):
        mine = [value for value in values if value.series == name and value.category in categories]
        places = [categories.index(value.category) + (number - (len(series) - 1) / 2) * width for value in mine]
        look: dict[str, Any] = {"color": style.OKABE_ITO[(0, 1, 6, 2, 3, 5)[number % 6]], "edgecolor": "white"}
        look["hatch"] = HATCHES[number % len(HATCHES)]
        axes.bar(places, [value.value for value in mine], width * 0.94, label=name, linewidth=0, **look)
        for place, value in zip(places, mine, strict=True):
            top = value.value if math.isnan(value.high) else value.high
            if not math.isnan(value.low):
                axes.plot([place, place], [value.low, value.high], color="black", linewidth=1)
            shown = f"{value.value:.2f}" if abs(value.value) < 10 else f"{value.value:.1f}"
            axes.annotate(shown, (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=6.5)
    axes.set_xticks(range(len(categories)), [name.replace(" with ", "\nwith ") for name in categories], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(y=0.15)
    _tidy(axes, "y")


def intervals(values: Sequence[Value], path: Path, *, title: str, label: str, caption: str = "") -> None:
    """A point and its interval a line, zero marked: right of it is interference. PNG, SVG, CSV."""
    categories, series, caption = _prepared(values, path, caption)
    figure = Figure(figsize=(6.4, max(2.4, 0.3 * len(categories) + 1.7)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, name in enumerate(series):
        mine = [value for value in values if value.series == name and value.category in categories]
        places = [-categories.index(v.category) - (number - (len(series) - 1) / 2) * 0.6 / len(series) for v in mine]
        look = style._look(number) | {"linestyle": "none"}
        axes.plot([value.value for value in mine], places, **look, markersize=5, label=name, zorder=3)
        for place, value in zip(places, mine, strict=True):
            if not math.isnan(value.low):
                axes.plot([value.low, value.high], [place, place], color=look["color"], linewidth=1.5)
    axes.axvline(0, color="#606060", linewidth=1)
    axes.set_yticks([-place for place in range(len(categories))], categories, fontsize=8)
    axes.set_xlabel(label)
    axes.margins(y=0.08)
    _tidy(axes, "x")
    if len(series) > 1:
        figure.legend(loc="outside upper right", ncols=len(series), fontsize=8, frameon=False)
    heading(figure, title, caption)
    style._save(figure, path)


def curves(found: Curves, path: Path, *, title: str, label: str, caption: str = "") -> None:
    """A panel a language, a line a model: the mean over its seeds, and the range of the seeds shaded. PNG, SVG, CSV."""
    rows = [
        (language, model, seed, step, value)
        for language, models in found.items()
        for model, seeds in models.items()
        for seed, points in seeds.items()
        for step, value in points
    ]
    write_csv(path.with_suffix(".csv"), ["language", "model", "seed", "step", "value"], rows)
    caption = _shortened(caption, len(found), MOST_PANELS)
    languages = list(found)[:MOST_PANELS]
    across = min(len(languages), 4 if len(languages) != 3 else 3)
    down = -(-len(languages) // across)
    figure = Figure(figsize=(max(5.0, 2.5 * across) + 1.6, 2.3 * down + 1.3), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False, sharex=True)
    models = sorted({model for language in languages for model in found[language]}, key=lambda m: (m != BASELINE, m))
    looks = {model: style._look(number) for number, model in enumerate(models)}
    if BASELINE in looks:
        looks[BASELINE] |= {"linestyle": (0, (5, 2)), "marker": ""}
    handles: dict[str, Any] = {}
    for index, axes in enumerate(grid.flat):
        if index >= len(languages):
            axes.set_visible(False)
            continue
        models_here = found[languages[index]]
        style._scale(axes, [v for seeds in models_here.values() for line in seeds.values() for _, v in line])
        for model, seeds in models_here.items():
            handles.setdefault(model, _line(axes, list(seeds.values()), looks[model]))
        axes.set_title(languages[index], fontsize=9, loc="left", fontfamily=style._families(languages[index]))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=[1, 2, 2.5, 5, 10]))
        axes.tick_params(labelsize=7)
        _tidy(axes, "both")
        if index + across >= len(languages):
            axes.set_xlabel("training step", fontsize=8)
            axes.tick_params(labelbottom=True)
    figure.supylabel(label, fontsize=9)
    shown = [model for model in models if model in handles]
    figure.legend([handles[model] for model in shown], shown, loc="outside right upper", fontsize=8, frameon=False)
    heading(figure, title, caption)
    style._save(figure, path)


def _line(axes: Axes, seeds: Sequence[Points], look: dict[str, Any]) -> Any:
    tables = [dict(points) for points in seeds]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    values = np.array([[table[step] for step in steps] for table in tables])  # (seeds, steps)
    if len(seeds) > 1:
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.15, linewidth=0)
    look = look | {"marker": look["marker"] or "o"} if len(steps) == 1 else look
    (line,) = axes.plot(
        steps, values.mean(axis=0), **look, markevery=max(1, len(steps) // 6), markersize=3, linewidth=1.3
    )
    return line


def binned(points: Points, first: int, last: int, bins: int = BINS) -> Points:
    """Means over up to `bins` equal stretches of the steps after `first`, each at its last step."""
    width = max(1, -(-(last - first) // bins))
    sums: dict[int, list[float]] = {}
    for step, value in points:
        if first < step <= last and math.isfinite(value):
            sums.setdefault((step - first - 1) // width, []).append(value)
    return [(min(last, first + (at + 1) * width), float(np.mean(values))) for at, values in sorted(sums.items())]


def _prepared(values: Sequence[Value], path: Path, caption: str) -> tuple[list[str], list[str], str]:
    """Writes the CSV; the categories to draw, the series, and the caption."""
    write_csv(path.with_suffix(".csv"), Value._fields, values)
    categories = list(dict.fromkeys(value.category for value in values))
    series = list(dict.fromkeys(value.series for value in values))
    return categories[:MOST_CATEGORIES], series, _shortened(caption, len(categories), MOST_CATEGORIES)


def _shortened(caption: str, count: int, most: int) -> str:
    return f"{caption}; the first {most} of {count} are drawn, the CSV has all" if count > most else caption


def _tidy(axes: Axes, grid: Literal["x", "y", "both"]) -> None:
    axes.grid(True, axis=grid, color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
