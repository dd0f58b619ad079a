"""Figures of language-specific parameters: similarity of masks by layer (the paper's 4a), groups of extreme pi (its 4b)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mlinterf_ds.files import write_csv
from mlinterf_ds.plots import style
from mlinterf_ds.plots.style import DARK_GREY, DASHED

MOST_LINES = 8  # lines drawn one by one; of more, the mean and the 10th to 90th percentile
MOST_PANELS = 4  # languages of figure 4b


def layers_figure(
    matrices: Mapping[str, Mapping[int, np.ndarray]],
    languages: Sequence[str],
    path: Path,
    *,
    title: str,
    caption: str = "",
) -> None:
    """Draws figure 4a: cosine of pi against the layer, a panel a component; within a language dashed, between two solid.

    matrices: component -> layer -> (L, L), within a language on the diagonal, NaN where not measured. Saves PNG, SVG and CSV.
    """
    parts = list(matrices)
    lines = {part: _lines(matrices[part], languages) for part in parts}
    _write_lines(path.with_suffix(".csv"), lines)
    if any(len(values) > 1 for of_part in lines.values() for _, values in of_part.values()):
        caption += "; bands: 10th to 90th percentile"
    layers = max(len(by_layer) for by_layer in matrices.values())
    figure = style.new_figure(1.2 + len(parts) * max(2.6, 0.3 * layers), 3.9)
    grid = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axes, part in zip(grid, parts, strict=True):
        _layers_panel(axes, lines[part], sorted(matrices[part]))
        axes.set_title(part, fontsize=9)
    grid[0].set_ylabel("cosine of pi")
    handles, labels = grid[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False, handlelength=3.2)
    for text in legend.get_texts():
        text.set_fontfamily(style.families("".join(labels)))
    style.finish(figure, path, title, caption)


Lines = dict[str, tuple[bool, np.ndarray]]  # name -> (within a language, (members, layers))


def _lines(matrices: Mapping[int, np.ndarray], languages: Sequence[str]) -> Lines:
    stacked = np.stack([matrices[layer] for layer in sorted(matrices)])  # (layers, L, L)
    count = len(languages)
    within = {f"{code}–{code}": stacked[:, index, index] for index, code in enumerate(languages)}
    within = {name: values for name, values in within.items() if np.isfinite(values).any()}
    pairs = itertools.combinations(range(count), 2)
    between = {f"{languages[a]}–{languages[b]}": stacked[:, a, b] for a, b in pairs}
    if len(within) + len(between) <= MOST_LINES:
        lines = {name: (True, values[None]) for name, values in within.items()}
        return lines | {name: (False, values[None]) for name, values in between.items()}
    lines = {"within a language": (True, np.stack(list(within.values())))} if within else {}
    return lines | {"between two": (False, np.stack(list(between.values())))}


def _layers_panel(axes: Axes, lines: Lines, layers: Sequence[int]) -> None:
    for index, (name, (dashed, values)) in enumerate(lines.items()):
        look = style.look(index, DASHED if dashed else "-")
        if len(values) > 1:
            low, high = np.nanpercentile(values, [10, 90], axis=0)
            axes.fill_between(layers, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.plot(layers, np.nanmean(values, axis=0), **look, linewidth=1.5, markersize=5, label=name)
    if not lines:
        axes.text(0.5, 0.5, "one language, one seed", transform=axes.transAxes, ha="center", color=style.GREY)
    axes.axhline(0, color=DARK_GREY, linewidth=0.8)
    style.tidy(axes, "y")
    axes.set_ylim(top=1.04)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlim(min(layers) - 0.4, max(layers) + 0.4)
    axes.set_xlabel("layer")


def _write_lines(path: Path, lines: Mapping[str, Lines]) -> None:
    rows = [
        [part, name, layer, np.nanmean(values[:, layer]), *np.nanpercentile(values[:, layer], [10, 90])]
        for part, of_part in lines.items()
        for name, (_, values) in of_part.items()
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
    """Draws figure 4b: a panel a language, bars at its most negative and most positive groups, markers for other languages.

    chosen: language -> (group, normalised values (L,)), ascending. At most four panels are drawn. Saves PNG and SVG.
    """
    shown = list(chosen)[:MOST_PANELS]
    bars = max(len(chosen[code]) for code in shown)
    figure = style.new_figure(max(5.5, 0.32 * bars + 1.4), 0.7 + 2.9 * len(shown))
    grid = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, code in zip(grid, shown, strict=True):
        _extremes_panel(axes, code, chosen[code], languages)
    note = (
        f"\nthe first {MOST_PANELS} of {len(chosen)} languages; all are in the CSV" if len(chosen) > len(shown) else ""
    )
    style.finish(figure, path, title, caption + note)


def _extremes_panel(axes: Axes, code: str, groups: Sequence[tuple[str, np.ndarray]], languages: Sequence[str]) -> None:
    positions, own = np.arange(len(groups), dtype=float), list(languages).index(code)
    positions[len(groups) // 2 :] += 0.8  # a gap between the two ends
    values = np.stack([value for _, value in groups])  # (groups, L)
    axes.bar(positions, values[:, own], width=0.62, color="#B8B8B8", edgecolor=DARK_GREY, linewidth=0.6, label=code)
    others = [index for index in range(len(languages)) if index != own]
    if len(others) <= MOST_LINES:
        for number, index in enumerate(others):
            axes.plot(positions, values[:, index], **style.look(number, "none"), markersize=5, label=languages[index])
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
    legend = axes.legend(
        [handles[name] for name in names], names, loc="upper left", fontsize=8, frameon=False, ncols=len(names)
    )
    for text in legend.get_texts():
        text.set_fontfamily(style.families(text.get_text()))
