"""Curves over training: validation perplexity of one run, or of several models by language (the paper's figures 2 and 4c), and
similarity of pairs of languages (figure 3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from mlinterf_ds.files import write_csv
from mlinterf_ds.plots import style
from mlinterf_ds.plots.style import DARK_GREY, DASHED, GREY, Look, Points

MOST_LABELS = 20  # more lines than this are drawn grey, and only the extremes are named
EXTREMES = 4  # curves that are named at either end of the order
MOST_PANELS = 24  # languages that are drawn; the CSV has all
BASELINE = "mono"  # the model that is dashed
BINS = 40  # points of a curve of training losses

MOST_LINES = 8  # pairs drawn one by one; of more, the mean and the 10th to 90th percentile
WITHIN, BETWEEN = "within a language", "between two"
LONG = 60  # points of a line from which it is drawn as a running mean over the pale points

SeedCurves = Mapping[str, Mapping[str, Mapping[int, Points]]]  # language -> model -> seed -> (step, value)
Curves = Mapping[tuple[str, str], Points]  # (left, right) -> (step or layer, cosine)


# --- one run -----------------------------------------------------------------------------------------------------------
def perplexity_curves(
    history: dict[str, Points], path: Path, *, title: str, baselines: dict[str, float] | None = None
) -> None:
    """Validation perplexity of each language against the training step, as PNG at `path` and SVG beside it.

    history: language -> (step, perplexity); values that are not finite or not positive are left out.
    baselines: language -> perplexity of its unigrams, drawn dashed.
    Lines are named at their right end. Up to 20 languages have a colour and style each; of more, only the highest and lowest
    are named, and the others are grey, with their median.
    """
    curves = {name: sorted(point for point in points if 0 < point[1] < math.inf) for name, points in history.items()}
    curves = {name: points for name, points in curves.items() if points}
    floors = {name: value for name, value in (baselines or {}).items() if name in curves and 0 < value < math.inf}
    order = sorted(curves, key=lambda name: -curves[name][-1][1])  # from the highest line end to the lowest
    named = order if len(order) <= MOST_LABELS else order[:EXTREMES] + order[-EXTREMES:]
    figure = style.new_figure(7.2, max(4.2, 0.235 * len(named) + 1.2))
    axes = figure.add_subplot()
    _frame(axes, title, [point for points in curves.values() for point in points], list(floors.values()))
    if len(order) > len(named):
        _draw_crowd(axes, {name: curves[name] for name in order if name not in named}, len(order))
    looks = {name: style.look(index) for index, name in enumerate(sorted(named))}  # the same in every figure of a run
    for name in named:
        steps, values = zip(*curves[name], strict=True)
        every = max(1, math.ceil(len(steps) / 9))
        first = (len(steps) - 1 + named.index(name)) % every  # lines that lie together do not hide each other's markers
        axes.plot(steps, values, **looks[name], markevery=(first, every), linewidth=1.5, markersize=4, zorder=3)
    _draw_baselines(axes, {name: floors[name] for name in named if name in floors}, looks)
    if not curves:
        axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", color=GREY)
    style.label_ends(figure, axes, {name: curves[name][-1] for name in named}, looks)
    style.save(figure, path)


def _frame(axes: Axes, title: str, points: Points, floors: list[float]) -> None:
    style.scale(axes, [value for _, value in points] + floors)
    style.step_ticks(axes)
    last = max((step for step, _ in points), default=0)
    unit, suffix = (1_000_000, "M") if last >= 10_000_000 else (1_000, "k") if last >= 10_000 else (1, "")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step / unit:,g}{suffix if step else ''}"))
    style.tidy(axes, "both")
    axes.set_xlabel("training step")
    axes.set_ylabel("validation perplexity")
    axes.set_title(title, loc="left", fontsize=11, fontfamily=style.families(title), wrap=True)
    axes.margins(x=0.02)


def _draw_crowd(axes: Axes, curves: dict[str, Points], total: int) -> None:
    """Every further language as a thin grey line, and their median at the steps where all were evaluated."""
    for points in curves.values():
        axes.plot(*zip(*points, strict=True), color=GREY, linewidth=0.6, alpha=0.5, zorder=1)
    steps, values = _at_common_steps(list(curves.values()))
    if steps:
        median = np.median(values, axis=0)
        axes.plot(steps, median, color="#404040", linewidth=2.2, zorder=2, label=f"median of the {len(curves)} in grey")
    note = f"{total} languages: the {EXTREMES} highest and {EXTREMES} lowest at the end are named"
    axes.text(1, 1.01, note, transform=axes.transAxes, ha="right", va="bottom", fontsize=7, color=DARK_GREY)


def _at_common_steps(curves: Sequence[Points]) -> tuple[list[int], np.ndarray]:
    """The steps that all curves have, and their values there, (curves, steps)."""
    tables = [dict(points) for points in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return steps, np.array([[table[step] for step in steps] for table in tables])


def _draw_baselines(axes: Axes, floors: dict[str, float], looks: dict[str, Look]) -> None:
    for index, (name, value) in enumerate(sorted(floors.items())):
        label = "unigram baseline" if index == 0 else None
        # Many dashed lines across the figure would hide the curves: with more than six languages they are short, at the left.
        reach = 1.0 if len(floors) <= 6 else 0.1
        axes.axhline(value, 0, reach, color=looks[name]["color"], linestyle=DASHED, linewidth=1, label=label)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = axes.legend(handles, labels, loc="best", fontsize=8, frameon=True, framealpha=0.9, edgecolor="none")
        for line, text in zip(legend.get_lines(), labels, strict=True):
            line.set_color("#404040" if text.startswith("median") else DARK_GREY)


# --- several models ----------------------------------------------------------------------------------------------------
def seed_curves(curves: SeedCurves, path: Path, *, title: str, label: str, caption: str = "") -> None:
    """A panel a language and a line a model: the mean over its seeds, their range shaded. Saves PNG, SVG and CSV."""
    rows = [
        (language, model, seed, step, value)
        for language, models in curves.items()
        for model, seeds in models.items()
        for seed, points in seeds.items()
        for step, value in points
    ]
    write_csv(path.with_suffix(".csv"), ["language", "model", "seed", "step", "value"], rows)
    caption = style.shortened(caption, len(curves), MOST_PANELS)
    languages = list(curves)[:MOST_PANELS]
    across = min(len(languages), 4 if len(languages) != 3 else 3)
    figure = style.new_figure(max(5.0, 2.5 * across) + 1.6, 2.3 * -(-len(languages) // across) + 1.3)
    models = sorted({model for language in languages for model in curves[language]}, key=lambda m: (m != BASELINE, m))
    looks = style.model_looks(models)
    if BASELINE in looks:
        looks[BASELINE] |= {"linestyle": (0, (5, 2)), "marker": ""}
    handles: dict[str, Any] = {}
    for index, axes in enumerate(style.panels(figure, len(languages), across, sharex=True)):
        handles |= _panel(axes, languages[index], curves[languages[index]], looks)
        if index + across >= len(languages):
            axes.set_xlabel("training step", fontsize=8)
            axes.tick_params(labelbottom=True)
    figure.supylabel(label, fontsize=9)
    shown = [model for model in models if model in handles]
    figure.legend([handles[model] for model in shown], shown, loc="outside right upper", fontsize=8, frameon=False)
    style.finish(figure, path, title, caption)


def _panel(
    axes: Axes, language: str, models: Mapping[str, Mapping[int, Points]], looks: dict[str, Look]
) -> dict[str, Any]:
    """Draws a language's lines and returns them by model."""
    style.scale(axes, [value for seeds in models.values() for points in seeds.values() for _, value in points])
    lines = {model: _draw_mean(axes, list(seeds.values()), looks[model]) for model, seeds in models.items()}
    axes.set_title(language, fontsize=9, loc="left", fontfamily=style.families(language))
    style.step_ticks(axes, 4)
    axes.tick_params(labelsize=7)
    style.tidy(axes, "both")
    return lines


def _draw_mean(axes: Axes, seeds: Sequence[Points], look: Look) -> Any:
    steps, values = _at_common_steps(seeds)
    if len(seeds) > 1:
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.15, linewidth=0)
    look = look | {"marker": look["marker"] or "o"} if len(steps) == 1 else look
    every = max(1, len(steps) // 6)
    (line,) = axes.plot(steps, values.mean(axis=0), **look, markevery=every, markersize=3, linewidth=1.3)
    return line


def binned(points: Points, first: int, last: int, bins: int = BINS) -> Points:
    """Means over up to `bins` equal stretches of the steps after `first` up to `last`, each at its last step."""
    width = max(1, -(-(last - first) // bins))
    stretches: dict[int, list[float]] = {}
    for step, value in points:
        if first < step <= last and math.isfinite(value):
            stretches.setdefault((step - first - 1) // width, []).append(value)
    return [
        (min(last, first + (index + 1) * width), float(np.mean(values))) for index, values in sorted(stretches.items())
    ]


# --- pairs of languages ------------------------------------------------------------------------------------------------
class Line(NamedTuple):
    """A pair of languages, or many pairs."""

    within: bool  # a language with itself, which is drawn dashed: the ceiling of what two can reach
    pairs: int
    rows: list[tuple[int, float, float, float]]  # step or layer, mean of the pairs, their 10th and 90th percentile


def pair_lines(curves: Curves, suffix: str = "") -> dict[str, Line]:
    """The lines to draw by their names. Points that are not finite are left out, and so are pairs without any."""
    finite = {pair: [point for point in points if math.isfinite(point[1])] for pair, points in curves.items()}
    groups: dict[tuple[bool, str], list[Points]] = {}
    for (left, right), points in finite.items():
        name = f"{left}–{right}" if len(finite) <= MOST_LINES else WITHIN if left == right else BETWEEN
        groups.setdefault((left == right, name + suffix), []).extend([points] * bool(points))
    lines = {}
    for (within, name), members in sorted(groups.items(), key=lambda group: not group[0][0]):
        values: dict[int, list[float]] = {}
        for step, value in itertools.chain(*members):
            values.setdefault(step, []).append(value)
        rows = []
        for step in sorted(values):
            low, mean, high = np.percentile(values[step], 10), np.mean(values[step]), np.percentile(values[step], 90)
            rows.append((step, float(mean), float(low), float(high)))
        if rows:
            lines[name] = Line(within, len(members), rows)
    return lines


def training_curves(runs: Mapping[str, Curves], path: Path, *, title: str, caption: str = "") -> None:
    """Draws gradient similarity against the training step: within a language dashed (the ceiling), between two solid.

    runs: a run's name, which is left out of the labels where it is the only one, -> its curves. Saves PNG and SVG.
    """
    lines: dict[str, Line] = {}
    for run, curves in runs.items():
        lines |= pair_lines(curves, f" ({run})" if len(runs) > 1 else "")
    figure = style.new_figure(7.2, max(4.2, 0.25 * len(lines) + 1.5))
    axes = figure.add_subplot()
    axes.axhline(0, color=DARK_GREY, linewidth=0.8, zorder=2)
    style.tidy(axes, "both")
    style.step_ticks(axes)
    axes.set_xlabel("training step")
    axes.set_ylabel("cosine of the gradients")
    axes.margins(x=0.02)
    looks = {name: style.look(index, DASHED if lines[name].within else "-") for index, name in enumerate(sorted(lines))}
    for name, line in lines.items():
        draw_pair(axes, line, looks[name])
    style.label_ends(figure, axes, {name: _smooth(line)[-1] for name, line in lines.items()}, looks, ".2f")
    style.finish(figure, path, title, caption + band_note(lines))


def band_note(lines: Mapping[str, Line]) -> str:
    return "; band: 10th to 90th percentile of the pairs" * any(line.pairs > 1 for line in lines.values())


def _smooth(line: Line) -> Points:
    """A running mean over a twentieth of a long line; a short line as it is."""
    half = len(line.rows) // 40 if len(line.rows) > LONG else 0
    means = [mean for _, mean, *_ in line.rows]
    return [(row[0], float(np.mean(means[max(0, i - half) : i + half + 1]))) for i, row in enumerate(line.rows)]


def draw_pair(axes: Axes, line: Line, look: Look, label: str | None = None) -> None:
    steps, means, low, high = zip(*line.rows, strict=True)
    if len(steps) > LONG:
        axes.plot(steps, means, color=look["color"], linewidth=0.6, alpha=0.3, zorder=1)
    elif line.pairs > 1:
        axes.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0, zorder=1)
    every = max(1, len(steps) // 9)
    points = zip(*_smooth(line), strict=True)
    axes.plot(*points, **look, markevery=every, linewidth=1.5, markersize=4, zorder=3, label=label)
