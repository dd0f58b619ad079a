"""Figures, drawn without pyplot (no global state, no display): a PNG to look at and an SVG to print, each.

Colours are Okabe and Ito's palette for the colour-blind (without its yellow, too pale for lines); line styles and markers
tell lines apart in grey print as well. Dashes always mean a baseline.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

OKABE_ITO = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"]
STYLES: list[Any] = ["-", (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h"]

MOST_LABELS = 20  # more lines than this are drawn grey, and only the extremes are named
EXTREMES = 4  # of each end
WIDE = 10.0  # ratio of largest to smallest value from which the axis is logarithmic
GREY = "#9A9A9A"

Points = list[tuple[int, float]]


def perplexity_curves(
    history: dict[str, Points], path: Path, *, title: str, baselines: dict[str, float] | None = None
) -> None:
    """Validation perplexity per language against the training step, as PNG at `path` and SVG beside it.

    `history` maps a language to its (step, perplexity) points; values that are not finite or not positive are left out.
    `baselines` (a language's unigram perplexity) are dashed. Lines are named at their right end. Up to 20 languages each have
    their own colour and style; of more, only the highest and lowest are named, the others are grey, with their median.
    """
    curves = {name: sorted(p for p in points if _shown(p[1])) for name, points in history.items()}
    curves = {name: points for name, points in curves.items() if points}
    floor = {name: value for name, value in (baselines or {}).items() if name in curves and _shown(value)}
    order = sorted(curves, key=lambda name: curves[name][-1][1], reverse=True)  # as the lines end, from above

    named = order if len(order) <= MOST_LABELS else order[:EXTREMES] + order[-EXTREMES:]
    figure = Figure(figsize=(7.2, max(4.2, 0.235 * len(named) + 1.2)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _frame(axes, title, [p for points in curves.values() for p in points], list(floor.values()))
    if len(order) > len(named):
        _draw_crowd(axes, {name: curves[name] for name in order if name not in named}, len(order))
    looks = {
        name: _look(index) for index, name in enumerate(sorted(named))
    }  # a language keeps its look between figures
    for name in named:
        steps, values = zip(*curves[name], strict=True)
        every = max(1, math.ceil(len(steps) / 9))
        marks = (len(steps) - 1 + named.index(name)) % every  # lines that lie together do not hide each other's markers
        axes.plot(steps, values, **looks[name], markevery=(marks, every), linewidth=1.5, markersize=4, zorder=3)
    _draw_baselines(axes, {name: floor[name] for name in named if name in floor}, looks)
    if not curves:
        axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", color=GREY)
    _label_ends(figure, axes, {name: curves[name][-1] for name in named}, looks)
    _save(figure, path)


def _shown(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _look(index: int) -> dict[str, Any]:
    colour = OKABE_ITO[index % len(OKABE_ITO)]
    style = STYLES[index // len(OKABE_ITO) % len(STYLES)]
    return {"color": colour, "linestyle": style, "marker": MARKERS[index % len(MARKERS)]}


def _scale(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis for positive values that lie far apart; plain numbers on it."""
    if values and max(values) >= WIDE * min(values):
        axes.set_yscale("log")
        narrow = max(values) < 300 * min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))


def _frame(axes: Axes, title: str, points: Points, floor: list[float]) -> None:
    """Axes, their scales and ticks, and the title."""
    values = [value for _, value in points] + floor
    _scale(axes, values)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 2.5, 5, 10]))
    last = max((step for step, _ in points), default=0)
    unit, suffix = (1_000_000, "M") if last >= 10_000_000 else (1_000, "k") if last >= 10_000 else (1, "")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step / unit:,g}{suffix if step else ''}"))
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("training step")
    axes.set_ylabel("validation perplexity")
    axes.set_title(title, loc="left", fontsize=11, fontfamily=_families(title), wrap=True)
    axes.margins(x=0.02)


def _draw_crowd(axes: Axes, curves: dict[str, Points], total: int) -> None:
    """Every further language as a thin grey line, and the median of them at each step where all were evaluated."""
    for points in curves.values():
        axes.plot(*zip(*points, strict=True), color=GREY, linewidth=0.6, alpha=0.5, zorder=1)
    tables = [dict(points) for points in curves.values()]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    if steps:
        median = [float(np.median([table[step] for table in tables])) for step in steps]
        axes.plot(steps, median, color="#404040", linewidth=2.2, zorder=2, label=f"median of the {len(curves)} in grey")
    note = f"{total} languages: the {EXTREMES} highest and {EXTREMES} lowest at the end are named"
    axes.text(1, 1.01, note, transform=axes.transAxes, ha="right", va="bottom", fontsize=7, color="#606060")


def _draw_baselines(axes: Axes, floor: dict[str, float], looks: dict[str, dict[str, Any]]) -> None:
    for index, (name, value) in enumerate(sorted(floor.items())):
        label = "unigram baseline" if index == 0 else None
        # Many full-width dashes would hide the curves: with more than six languages they stop short at the left.
        reach = 1.0 if len(floor) <= 6 else 0.1
        axes.axhline(value, 0, reach, color=looks[name]["color"], linestyle=(0, (5, 3)), linewidth=1, label=label)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = axes.legend(handles, labels, loc="best", fontsize=8, frameon=True, framealpha=0.9, edgecolor="none")
        for line, text in zip(legend.get_lines(), labels, strict=True):
            line.set_color("#404040" if text.startswith("median") else "#606060")


def _label_ends(
    figure: Figure,
    axes: Axes,
    ends: dict[str, tuple[int, float]],
    looks: dict[str, dict[str, Any]],
    form: str = ",.1f",
) -> None:
    """Each line's name and last value to the right of its end, moved apart where they would touch."""
    if not ends:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # the labels must not move the scale they are placed by
    to_axes = axes.transData + axes.transAxes.inverted()
    names = sorted(ends, key=lambda name: ends[name][1])
    at = [float(to_axes.transform((0, ends[name][1]))[1]) for name in names]
    spread = _apart(at, gap=min(11 / (figure.get_figheight() * 72 * 0.8), 1 / len(at)))
    fixed: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False, "scalex": False, "scaley": False}
    for name, true, shown in zip(names, at, spread, strict=True):
        text = f"{name}  {ends[name][1]:{form}}"
        axes.plot([1.0, 1.025], [true, shown], color=GREY, linewidth=0.5, **fixed)
        axes.plot([1.03, 1.05, 1.07], [shown] * 3, **looks[name], markevery=[1], markersize=4, linewidth=1.5, **fixed)
        axes.text(1.08, shown, text, transform=axes.transAxes, va="center", fontsize=8, fontfamily=_families(text))


def _apart(wanted: Iterable[float], gap: float) -> list[float]:
    """Positions in [0, 1] near the ascending `wanted`, at least `gap` apart: touching ones form blocks round their mean."""
    blocks: list[tuple[float, int]] = []  # (mean of what its members want, how many)

    def edges(block: tuple[float, int]) -> tuple[float, float]:
        half = (block[1] - 1) / 2 * gap
        centre = max(half, min(block[0], 1 - half))
        return centre - half, centre + half

    for position in wanted:
        block = (position, 1)
        while blocks and edges(block)[0] - edges(blocks[-1])[1] < gap:
            mean, size = blocks.pop()
            block = (mean * size + block[0] * block[1]) / (size + block[1]), size + block[1]
        blocks.append(block)
    return [edges(block)[0] + index * gap for block in blocks for index in range(block[1])]


@functools.cache
def _characters(file: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(file).get_charmap())


def _families(text: str) -> list[str]:
    """matplotlib's default family and, if it lacks characters of `text`, the installed ones that have them."""
    families = ["DejaVu Sans"]
    missing = {ord(c) for c in text if not c.isspace()} - _characters(font_manager.findfont("DejaVu Sans"))
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: ("Sans" not in font.name, font.name)):
        if not missing:
            break
        if "Last Resort" in font.name:  # has every character, drawn as a box
            continue
        try:  # the face it would be drawn with; the list, as a bare name would be read as a fontconfig pattern
            face = font_manager.findfont(font_manager.FontProperties(family=[font.name]))
            has = missing & _characters(face)
        except (OSError, RuntimeError):  # a broken font file
            continue
        if has:
            families.append(font.name)
            missing -= has
    return families


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, kind in ((path, "png"), (path.with_suffix(".svg"), "svg")):
        temporary = target.with_name(f".{target.name}.new")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # no installed font has it
            figure.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)
        os.replace(temporary, target)
