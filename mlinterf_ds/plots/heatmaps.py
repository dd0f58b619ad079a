"""Matrices as heat maps: a panel for each, one colour scale, and the numbers in the cells where they can be read.

The colours are matplotlib's PuOr: the colour-blind can tell its ends apart, and in grey print it shows the distance from the
middle, while the numbers in the cells show the side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize

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
    middle: float = 0.0,
    row_label: str = "",
    column_label: str = "",
) -> None:
    """Draws each (rows, columns) matrix as a panel under its name. Saves PNG, SVG and CSV.

    NaN is grey. `label` names the colour scale, whose middle is `middle`; `form` formats the numbers in the cells.
    """
    names = list(matrices)
    values = np.stack([np.asarray(matrices[name], dtype=float) for name in names])  # (panels, rows, columns)
    assert values.shape[1:] == (len(rows), len(columns)), (values.shape, len(rows), len(columns))
    cells = [[names[p], rows[r], columns[c], float(value)] for (p, r, c), value in np.ndenumerate(values)]
    write_csv(path.with_suffix(".csv"), ["panel", "row", "column", "value"], cells)
    reach = float(np.nanmax(np.abs(values - middle))) if np.isfinite(values).any() else 1.0
    scale = Normalize(middle - (reach or 1.0), middle + (reach or 1.0))
    most = max(len(rows), len(columns))
    cell = (0.52 if most <= 8 else 0.38) if most <= READABLE else min(0.24, 9 / most)
    across = min(len(names), 3)
    down = -(-len(names) // across)
    width = max(1.9, cell * len(columns) + 0.9)
    height = max(1.6, cell * len(rows) + 0.9)
    figure = style.new_figure(across * width + 1.3, down * height + 1.0)
    grid = figure.subplots(down, across, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(names):
            axes.set_visible(False)
            continue
        _panel(axes, values[index], rows, columns, scale, form)
        axes.set_title(names[index], fontsize=9, fontfamily=style.families(names[index]))
        axes.set_xlabel(column_label, fontsize=8)
        axes.set_ylabel(row_label if index % across == 0 else "", fontsize=8)
    bar = figure.colorbar(ScalarMappable(scale, _colours()), ax=list(grid.flat), shrink=0.8, aspect=30)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    style.finish(figure, path, title, caption)


def _colours() -> Colormap:
    return colormaps["PuOr"].with_extremes(bad="#D0D0D0")


def _panel(
    axes: Axes, matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str], scale: Normalize, form: str
) -> None:
    axes.imshow(np.ma.masked_invalid(matrix), cmap=_colours(), norm=scale, aspect="equal")
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
            strong = abs(scale(value) - 0.5) > 0.33  # the ends of the scale are dark
            colour = "white" if strong else "black"
            axes.text(column, row, format(value, form), ha="center", va="center", fontsize=7, color=colour)
