"""Bars by category (the paper's figure 1), and differences with their intervals. Each is a PNG, an SVG and a CSV of its values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes

from mlinterf_ds.files import write_csv
from mlinterf_ds.plots import style
from mlinterf_ds.plots.style import DARK_GREY, DASHED

FLOORS = {"majority": DASHED, "lexical": (0, (1, 1.2))}  # series that are lines across their categories
HATCHES = ["", "////", "....", "xxxx", "\\\\\\\\"]  # tell bars apart in grey print
MOST_ACROSS = 22  # how many bars a row has at most
MOST_CATEGORIES = 40  # categories that are drawn; the CSV has all


class Value(NamedTuple):
    """A bar or point and the ends of its whiskers, NaN for none."""

    category: str  # "sw with en"
    series: str  # "mono", "joint", "larger"
    value: float
    low: float = math.nan
    high: float = math.nan


def bars(values: Sequence[Value], path: Path, *, title: str, label: str, caption: str = "") -> None:
    """Groups of bars, one group a category and one colour a series, with their values above them."""
    categories, series, caption = _prepare(values, path, caption)
    series = [name for name in series if name not in FLOORS]
    across = max(1, MOST_ACROSS // len(series))
    down = -(-len(categories) // across)
    across = -(-len(categories) // down)  # rows of about equal length
    figure = style.new_figure(max(5.2, 0.4 * len(series) * across + 2.4), 2.5 * down + 1.4)
    grid = figure.subplots(down, 1, squeeze=False, sharey=True)[:, 0]
    for row, axes in enumerate(grid):
        _draw_row(axes, values, categories[row * across : (row + 1) * across], series)
        axes.set_xlim(-0.5, across - 0.5)
    figure.supylabel(label, fontsize=9)
    style.legend_beside(figure, grid[0], "right upper")
    style.finish(figure, path, title, caption)


def _draw_row(axes: Axes, values: Sequence[Value], categories: list[str], series: list[str]) -> None:
    width, looks = 0.8 / len(series), style.model_looks(series)
    for number, name in enumerate(series):
        of_series = [value for value in values if value.series == name and value.category in categories]
        shift = (number - (len(series) - 1) / 2) * width
        positions = [categories.index(value.category) + shift for value in of_series]
        axes.bar(
            positions, [value.value for value in of_series], width * 0.94, label=name, linewidth=0, edgecolor="white",
            color=looks[name]["color"], hatch=HATCHES[number % len(HATCHES)],
        )  # fmt: skip
        for position, value in zip(positions, of_series, strict=True):
            top = value.value if math.isnan(value.high) else value.high
            if not math.isnan(value.low):
                axes.plot([position, position], [value.low, value.high], color="black", linewidth=1)
            text = f"{value.value:.2f}" if abs(value.value) < 10 else f"{value.value:.1f}"
            axes.annotate(text, (position, top), (0, 2), textcoords="offset points", ha="center", fontsize=6.5)
    for value in (value for value in values if value.series in FLOORS and value.category in categories):
        middle, labelled = categories.index(value.category), axes.get_legend_handles_labels()[1]
        label = None if value.series in labelled else value.series
        axes.plot(
            [middle - 0.45, middle + 0.45], [value.value] * 2, color=DARK_GREY, linewidth=1.2, label=label,
            linestyle=FLOORS[value.series],
        )  # fmt: skip
    axes.set_xticks(range(len(categories)), [name.replace(" with ", "\nwith ") for name in categories], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(y=0.15)
    style.tidy(axes, "y")


def intervals(values: Sequence[Value], path: Path, *, title: str, label: str, caption: str = "") -> None:
    """A point and its interval on a line for each category, with zero marked."""
    categories, series, caption = _prepare(values, path, caption)
    figure = style.new_figure(6.4, max(2.4, 0.3 * len(categories) + 1.7))
    axes, looks = figure.add_subplot(), style.model_looks(series)
    for number, name in enumerate(series):
        of_series = [value for value in values if value.series == name and value.category in categories]
        shift = (number - (len(series) - 1) / 2) * 0.6 / len(series)
        positions = [-categories.index(value.category) - shift for value in of_series]
        look = looks[name] | {"linestyle": "none"}
        axes.plot([value.value for value in of_series], positions, **look, markersize=5, label=name, zorder=3)
        for position, value in zip(positions, of_series, strict=True):
            if not math.isnan(value.low):
                axes.plot([value.low, value.high], [position, position], color=look["color"], linewidth=1.5)
    axes.axvline(0, color=DARK_GREY, linewidth=1)
    axes.set_yticks([-row for row in range(len(categories))], categories, fontsize=8)
    axes.set_xlabel(label)
    axes.margins(y=0.08)
    style.tidy(axes, "x")
    if len(series) > 1:
        style.legend_beside(figure, axes, "upper right", ncols=len(series))
    style.finish(figure, path, title, caption)


def _prepare(values: Sequence[Value], path: Path, caption: str) -> tuple[list[str], list[str], str]:
    """Writes the CSV and returns the categories to draw, the series and the caption."""
    write_csv(path.with_suffix(".csv"), Value._fields, values)
    categories = list(dict.fromkeys(value.category for value in values))
    series = list(dict.fromkeys(value.series for value in values))
    return categories[:MOST_CATEGORIES], series, style.shortened(caption, len(categories), MOST_CATEGORIES)
