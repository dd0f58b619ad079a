"""Figures of language-specific parameters: similarity of masks by layer (the paper's 4a), groups of extreme pi (its 4b)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlinterf_ds.files import write_csv
from mlinterf_ds.plots import style
from mlinterf_ds.plots.heatmaps import heading

MOST_LINES = 8  # lines drawn one by one; of more, the mean and the 10th to 90th percentile
MOST_PANELS = 4  # languages of figure 4b
DASHED = (0, (5, 3))


def layers_figure(
    matrices: Mapping[str, Mapping[int, np.ndarray]],
    languages: Sequence[str],
    path: Path,
    *,
    title: str,
    caption: str = "",
) -> None:
    """Figure 4a: cosine of pi against the layer, a panel a component; within a language dashed, between two solid.

    matrices: component -> layer -> (L, L), within a language on the diagonal (NaN: not measured). PNG, SVG and CSV.
    """
    parts = list(matrices)
    lines = {part: _lines(matrices[part], languages) for part in parts}
    _write_lines(path.with_suffix(".csv"), lines)
    if any(len(values) > 1 for found in lines.values() for _, values in found.values()):
        caption += "; bands: 10th to 90th percentile"
    layers = max(len(found) for found in matrices.values())
    figure = Figure(figsize=(1.2 + len(parts) * max(2.6, 0.3 * layers), 3.9), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axes, part in zip(grid, parts, strict=True):
        _layers_panel(axes, lines[part], sorted(matrices[part]))
        axes.set_title(part, fontsize=9)
    grid[0].set_ylabel("cosine of pi")
    handles, labels = grid[0].get_legend_handles_labels()
    families = style._families("".join(labels))
    legend = figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False, handlelength=3.2)
    for text in legend.get_texts():
        text.set_fontfamily(families)
    heading(figure, title, caption)
    style._save(figure, path)


Lines = dict[str, tuple[bool, np.ndarray]]  # name -> (within a language, (members, layers))


def _lines(matrices: Mapping[int, np.ndarray], languages: Sequence[str]) -> Lines:
    stacked = np.stack([matrices[layer] for layer in sorted(matrices)])  # (layers, L, L)
    count = len(languages)
    within = {f"{code}–{code}": stacked[:, place, place] for place, code in enumerate(languages)}
    within = {name: values for name, values in within.items() if np.isfinite(values).any()}
    pairs = itertools.combinations(range(count), 2)
    between = {f"{languages[a]}–{languages[b]}": stacked[:, a, b] for a, b in pairs}
    if len(within) + len(between) <= MOST_LINES:
        return {name: (True, values[None]) for name, values in within.items()} | {
            name: (False, values[None]) for name, values in between.items()
        }
    found: Lines = {"within a language": (True, np.stack(list(within.values())))} if within else {}
    return found | {"between two": (False, np.stack(list(between.values())))}


def _layers_panel(axes: Axes, lines: Lines, layers: Sequence[int]) -> None:
    for index, (name, (dashed, values)) in enumerate(lines.items()):
        look = style._look(index) | {"linestyle": DASHED if dashed else "-"}
        if len(values) > 1:
            low, high = np.nanpercentile(values, [10, 90], axis=0)
            axes.fill_between(layers, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.plot(layers, np.nanmean(values, axis=0), **look, linewidth=1.5, markersize=5, label=name)
    if not lines:
        axes.text(0.5, 0.5, "one language, one seed", transform=axes.transAxes, ha="center", color=style.GREY)
    _plain_frame(axes)
    axes.set_ylim(top=1.04)
    axes.grid(True, axis="y", color="#E6E6E6", linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlim(min(layers) - 0.4, max(layers) + 0.4)
    axes.set_xlabel("layer")


def _plain_frame(axes: Axes) -> None:
    axes.axhline(0, color="#606060", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write_lines(path: Path, lines: Mapping[str, Lines]) -> None:
    """CSV lines `component,line,layer,mean,p10,p90`."""
    rows = [
        [part, name, layer, np.nanmean(values[:, layer]), *np.nanpercentile(values[:, layer], [10, 90])]
        for part, found in lines.items()
        for name, (_, values) in found.items()
        for layer in range(values.shape[1])
    ]
    write_csv(path, ["component", "line", "layer", "mean", "p10", "p90"], rows)


def extremes_figure(
    chosen: Mapping[str, Sequence[tuple[str, np.ndarray]]],
    languages: Sequence[str],
    path: Path,
    *,
    title: str,
    caption: str = "",
) -> None:
    """Figure 4b: a panel a language, bars at its most negative and most positive groups, markers for the other languages.

    chosen: language -> (group, normalised values (L,)), ascending. At most four panels are drawn. PNG and SVG.
    """
    shown = list(chosen)[:MOST_PANELS]
    bars = max(len(chosen[code]) for code in shown)
    figure = Figure(figsize=(max(5.5, 0.32 * bars + 1.4), 0.7 + 2.9 * len(shown)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, code in zip(grid, shown, strict=True):
        _extremes_panel(axes, code, chosen[code], languages)
    note = (
        f"\nthe first {MOST_PANELS} of {len(chosen)} languages; all are in the CSV" if len(chosen) > len(shown) else ""
    )
    heading(figure, title, caption + note)
    style._save(figure, path)


def _extremes_panel(axes: Axes, code: str, found: Sequence[tuple[str, np.ndarray]], languages: Sequence[str]) -> None:
    places, own = np.arange(len(found), dtype=float), list(languages).index(code)
    places[len(found) // 2 :] += 0.8  # a gap between the two ends
    values = np.stack([value for _, value in found])  # (groups, L)
    axes.bar(places, values[:, own], width=0.62, color="#B8B8B8", edgecolor="#606060", linewidth=0.6, label=code)
    others = [place for place in range(len(languages)) if place != own]
    if len(others) <= MOST_LINES:
        for index, place in enumerate(others):
            look: dict[str, Any] = style._look(index) | {"linestyle": "none"}
            axes.plot(places, values[:, place], **look, markersize=5, label=languages[place])
    else:
        rest = values[:, others]
        low, high = np.percentile(rest, [10, 90], axis=1)
        middle = np.median(rest, axis=1)
        axes.errorbar(
            places, middle, [middle - low, high - middle], fmt="o", color=style.OKABE_ITO[0], markersize=4,
            linewidth=1, label=f"median and 80% of {len(others)} others",
        )  # fmt: skip
    _plain_frame(axes)
    axes.set_xticks(places, [name for name, _ in found], rotation=90, fontsize=7)
    axes.set_ylim(-1.08, 1.08)
    axes.set_ylabel("pi / largest |pi|", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    heading_text = f"most negative and most positive groups of {code}"
    axes.set_title(heading_text, loc="left", fontsize=9, fontfamily=style._families(heading_text))
    handles, labels = axes.get_legend_handles_labels()
    first = labels.index(code)  # the bars come first
    order = [first, *(place for place in range(len(labels)) if place != first)]
    legend = axes.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        loc="upper left",
        fontsize=8,
        frameon=False,
        ncols=len(labels),
    )
    for text in legend.get_texts():
        text.set_fontfamily(style._families(text.get_text()))
