"""Figures of how alike languages are: gradients by layer and component, masks by layer (the paper's figure 4a), and groups of
extreme pi (its 4b)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mlinterf_ds.files import write_csv
from mlinterf_ds.plots import style
from mlinterf_ds.plots.curves import BETWEEN, MOST_LINES, WITHIN, band_note, draw_pair, pair_lines
from mlinterf_ds.plots.style import DARK_GREY, DASHED, OKABE_ITO, Points

MOST_PANELS = 4  # languages of figure 4b


def by_component(
    table: Mapping[str, Mapping[str, tuple[float, float]]], path: Path, *, title: str, caption: str = ""
) -> None:
    """Draws mean similarity by layer, a panel a component. Saves PNG and SVG.

    table: component -> layer -> (within a language, between two); a component outside the layers has the one layer ''.
    """
    panels = [(part, list(by_layer), list(by_layer.values())) for part, by_layer in table.items() if "" not in by_layer]
    flat = {part: by_layer[""] for part, by_layer in table.items() if "" in by_layer}
    widths = [max(1.6, 0.32 * max([len(names) for _, names, _ in panels], default=1))] * len(panels)
    if flat:
        panels.append(("", [part.replace(" ", "\n") for part in flat], list(flat.values())))
        widths.append(max(1.2, 0.7 * len(flat)))
    figure = style.new_figure(sum(widths) + 1.6, 3.9)
    grid = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, (part, names, values) in zip(grid, panels, strict=True):
        positions, (within, between) = np.arange(len(names)), np.array(values, dtype=float).T
        line: dict[str, Any] = {"linewidth": 1.5, "markersize": 5}
        dashed, solid = (DASHED, "-") if part else ("none", "none")
        axes.plot(positions, within, color=OKABE_ITO[0], marker="s", label=WITHIN, linestyle=dashed, **line)
        if np.isfinite(between).any():
            axes.plot(positions, between, color=OKABE_ITO[1], marker="o", label=BETWEEN, linestyle=solid, **line)
        axes.axhline(0, color=DARK_GREY, linewidth=0.8)
        style.tidy(axes, "y")
        every = max(1, len(names) // 12)
        axes.set_xticks(positions[::every], names[::every], fontsize=8)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_title(part, fontsize=9)
        axes.set_xlabel("layer" if part else "")
    grid[0].set_ylabel("cosine of the gradients")
    style.legend_beside(figure, grid[0], "upper right", ncols=2)
    style.finish(figure, path, title, caption)


def layers_figure(
    matrices: Mapping[str, Mapping[int, np.ndarray]], languages: Sequence[str], path: Path, *, title: str, caption: str
) -> None:
    """Draws figure 4a: cosine of pi against the layer, a panel a component; within a language dashed, between two solid.

    matrices: component -> layer -> (L, L), within a language on the diagonal, NaN where not measured. Saves PNG, SVG and CSV.
    """
    lines = {}
    for part, by_layer in matrices.items():
        curves: dict[tuple[str, str], Points] = {}
        for a, b in itertools.combinations_with_replacement(range(len(languages)), 2):
            points = [(layer, float(matrix[a, b])) for layer, matrix in by_layer.items()]
            curves[languages[a], languages[b]] = points
        lines[part] = pair_lines(curves)
    rows = [
        [part, name, *row] for part, of_part in lines.items() for name, line in of_part.items() for row in line.rows
    ]
    write_csv(path.with_suffix(".csv"), ["component", "line", "layer", "mean", "p10", "p90"], rows)
    count = max(len(by_layer) for by_layer in matrices.values())
    # a line has the same look in all panels
    order = list(dict.fromkeys(name for of_part in lines.values() for name in of_part))
    figure = style.new_figure(1.2 + len(lines) * max(2.6, 0.3 * count), 3.9)
    grid = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    for axes, (part, of_part) in zip(grid, lines.items(), strict=True):
        for name, line in of_part.items():
            draw_pair(axes, line, style.look(order.index(name), DASHED if line.within else "-"), name)
        if not of_part:
            axes.text(0.5, 0.5, "one language, one seed", transform=axes.transAxes, ha="center", color=style.GREY)
        axes.axhline(0, color=DARK_GREY, linewidth=0.8)
        style.tidy(axes, "y")
        axes.set_ylim(top=1.04)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set_xlim(min(matrices[part]) - 0.4, max(matrices[part]) + 0.4)
        axes.set_xlabel("layer")
        axes.set_title(part, fontsize=9)
    grid[0].set_ylabel("cosine of pi")
    style.legend_beside(figure, grid[0], "right upper", handlelength=3.2)
    style.finish(figure, path, title, caption + band_note(lines[max(lines, key=lambda part: len(lines[part]))]))


def extremes_figure(
    chosen: Mapping[str, Sequence[tuple[str, np.ndarray]]],
    languages: Sequence[str],
    path: Path,
    *,
    title: str,
    caption: str,
) -> None:
    """Draws figure 4b: a panel a language, bars at its most negative and most positive groups, markers for other languages.

    chosen: language -> (group, normalised values (L,)), ascending. At most four panels are drawn. Saves PNG and SVG.
    """
    shown = list(chosen)[:MOST_PANELS]
    bars = max(len(chosen[code]) for code in shown)
    figure = style.new_figure(max(5.5, 0.32 * bars + 1.4), 0.7 + 2.9 * len(shown))
    grid = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, code in zip(grid, shown, strict=True):
        _extremes_panel(axes, code, chosen[code], languages)
    style.finish(figure, path, title, style.shortened(caption, len(chosen), MOST_PANELS))


def _extremes_panel(axes: Axes, code: str, groups: Sequence[tuple[str, np.ndarray]], languages: Sequence[str]) -> None:
    positions, own = np.arange(len(groups), dtype=float), list(languages).index(code)
    positions[len(groups) // 2 :] += 0.8  # a gap between the two ends
    values = np.stack([value for _, value in groups])  # (groups, L)
    axes.bar(positions, values[:, own], width=0.62, color="#B8B8B8", edgecolor=DARK_GREY, linewidth=0.6, label=code)
    others = [index for index in range(len(languages)) if index != own]
    if len(others) <= MOST_LINES:
        for index in others:  # a language looks alike in all panels
            axes.plot(positions, values[:, index], **style.look(index, "none"), markersize=5, label=languages[index])
    else:
        low, median, high = np.percentile(values[:, others], [10, 50, 90], axis=1)
        axes.errorbar(
            positions, median, [median - low, high - median], fmt="o", color=style.OKABE_ITO[0], markersize=4,
            linewidth=1, label=f"median and 80% of {len(others)} others",
        )  # fmt: skip
    axes.axhline(0, color=DARK_GREY, linewidth=0.8)
    style.tidy(axes, None)
    axes.set_xticks(positions, [name for name, _ in groups], rotation=90, fontsize=7)
    axes.set_ylim(-1.08, 1.08)
    axes.set_ylabel("pi / largest |pi|", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    title = f"most negative and most positive groups of {code}"
    axes.set_title(title, loc="left", fontsize=9, fontfamily=style.families(title))
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [code, *(name for name in handles if name != code)]  # the bars come first
    look = {"size": 8, "family": style.families("".join(names))}
    axes.legend([handles[name] for name in names], names, loc="upper left", prop=look, frameon=False, ncols=len(names))
