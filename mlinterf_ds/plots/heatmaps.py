"""Matrices as heat maps: a panel for each, one colour scale, and the numbers in the cells where they can be read.

Scores and distances are drawn from pale to dark (matplotlib's YlGnBu). What has a sign is drawn around zero (PuOr: the
colour-blind can tell its ends apart, and the numbers in the cells show the side), and what lies within the noise is in brackets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from mlinterf_ds.files import write_csv
from mlinterf_ds.plots import style

READABLE = 16  # rows or columns up to which cells show their numbers
MOST_NAMES = 60  # of more rows or columns, some are not named


def heatmaps(
    matrices: Mapping[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    path: Path,
    *,
    title: str,
    label: str,
    caption: str = "",
    form: str = ".2f",
    signed: bool = False,
    noise: Mapping[str, np.ndarray] | None = None,
    row_label: str = "",
    column_label: str = "",
) -> None:
    """Draws each (rows, columns) matrix as a panel under its name. Saves PNG, SVG and CSV.

    NaN is grey. `label` names the colour scale; `form` formats the numbers in the cells. signed: zero is the middle of the
    colours. noise: of each matrix, the differences from zero that are no more than noise; NaN where it is not known.
    """
    names = list(matrices)
    values = np.stack([np.asarray(matrices[name], dtype=float) for name in names])  # (panels, rows, columns)
    assert values.shape[1:] == (len(rows), len(columns)), (values.shape, len(rows), len(columns))
    cells = ((names[p], rows[r], columns[c], float(value)) for (p, r, c), value in np.ndenumerate(values))
    write_csv(path.with_suffix(".csv"), ["panel", "row", "column", "value"], cells)
    colours = _colours(values, signed)
    levels = np.stack([noise[name] for name in names]) if noise else np.full(values.shape, np.nan)
    across = min(len(names), 3)
    most, down = max(len(rows), len(columns)), -(-len(names) // across)
    cell = (0.52 if most <= 8 else 0.38) if most <= READABLE else min(0.24, 9 / most)
    width, height = max(1.9, cell * len(columns) + 0.9), max(1.6, cell * len(rows) + 0.9)
    figure = style.new_figure(across * width + 1.3, down * height + 1.0)
    grid = style.panels(figure, len(names), across)
    for index, axes in enumerate(grid):
        _panel(axes, values[index], levels[index], rows, columns, colours, form)
        axes.set_title(names[index], fontsize=9, fontfamily=style.families(names[index]))
        axes.set_xlabel(column_label, fontsize=8)
        axes.set_ylabel(row_label if index % across == 0 else "", fontsize=8)
    bar = figure.colorbar(colours, ax=figure.axes, shrink=0.8, aspect=30)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    caption = "; ".join(filter(None, [caption, _mark_noise(bar.ax, levels, form.lstrip("+"))]))
    style.finish(figure, path, title, caption)


def _mark_noise(scale: Axes, levels: np.ndarray, form: str) -> str:
    """Marks the median of the noise on the scale of colours, and says so for the caption; '' where the noise is not known."""
    if not np.isfinite(levels).any():
        return ""
    level = float(np.nanmedian(levels))
    for end in (-level, level):
        scale.axhline(end, color="black", linewidth=1.2)
    return f"in brackets: within the noise; lines on the scale: its median, {level:{form}}"


def _colours(values: np.ndarray, signed: bool) -> ScalarMappable:
    """The scale of colours for these values, which is symmetric around zero if they are signed."""
    finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.array([0.0, 1.0])
    low, high = (-float(np.abs(finite).max()), float(np.abs(finite).max())) if signed else (finite.min(), finite.max())
    palette = colormaps["PuOr" if signed else "YlGnBu"].with_extremes(bad="#D0D0D0")
    return ScalarMappable(Normalize(low, high if high > low else low + 1.0), palette)


def _panel(
    axes: Axes, matrix: np.ndarray, noise: np.ndarray, rows: Sequence[str], columns: Sequence[str], colours: ScalarMappable,
    form: str,
) -> None:  # fmt: skip
    low, high = colours.get_clim()
    axes.imshow(np.ma.masked_invalid(matrix), cmap=colours.cmap, vmin=low, vmax=high, aspect="equal")
    families = style.families("".join([*rows, *columns]))
    for axis, names, turn in ((axes.xaxis, columns, 90), (axes.yaxis, rows, 0)):
        every = -(-len(names) // MOST_NAMES)
        longest = max(len(name) for name in names)
        turned = turn if longest > 3 or len(names) > READABLE else 0
        axis.set_ticks(range(0, len(names), every), names[::every], fontfamily=families, rotation=turned)
    axes.tick_params(length=0, labelsize=8 if max(len(rows), len(columns)) <= READABLE else 6)
    axes.spines[:].set_visible(False)
    if max(len(rows), len(columns)) > READABLE:
        return
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            light = np.dot(colours.to_rgba(value)[:3], (0.299, 0.587, 0.114))  # the luma of ITU-R BT.601
            text = f"({value:{form}})" if abs(value) <= noise[row, column] else f"{value:{form}}"
            axes.text(
                column, row, text, ha="center", va="center", fontsize=7, color="black" if light > 0.5 else "white"
            )
