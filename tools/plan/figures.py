"""Draws a plan: memory of a rank and days of the run against the number of GPUs or of languages."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from mlinterf_ds.plots.style import GREY, MARKERS, OKABE_ITO, STYLES, save

Row = dict[str, Any]


def _frame(axes: Axes, ticks: Sequence[int], values: Sequence[float], label: str, title: str, unit: str) -> None:
    """Sets up scales, grid and labels for `values` against the powers of two in `ticks`."""
    axes.set_xscale("log", base=2)
    if max(values) >= 5 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_ylim(0, 1.15 * max(values))
    axes.xaxis.set_major_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(list(ticks), [f"{value:,}" for value in ticks])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(label)
    axes.set_ylabel(unit)
    axes.set_title(title, loc="left", fontsize=10)


def scaling(rows: list[Row], axis: str, label: str, path: Path, *, title: str, limit: float) -> None:
    """Draws memory of a rank and days of the run against `axis` ("gpus" or "languages"), a line for each ZeRO stage.

    Each row has the keys "stage", `axis`, "gib" and "days". The dashed line is `limit`, the GiB of a GPU that a run may use.
    The PNG is written to `path`, the SVG and the CSV beside it.
    """
    figure = Figure(figsize=(9.4, 4.1), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    ticks = sorted({row[axis] for row in rows})
    for axes, kind, name, unit in (
        (left, "gib", "memory of a rank", "GiB"),
        (right, "days", "the whole run", "days"),
    ):
        values = [row[kind] for row in rows] + ([limit] if kind == "gib" else [])
        _frame(axes, ticks, values, label, name, unit)
        for index, stage in enumerate(sorted({row["stage"] for row in rows})):
            points = sorted((row[axis], row[kind]) for row in rows if row["stage"] == stage)
            axes.plot(
                *zip(*points, strict=True),
                color=OKABE_ITO[index],
                linestyle=STYLES[index % len(STYLES)],
                marker=MARKERS[index],
                markersize=5 - index * 0.4,
                linewidth=1.6,
                label=f"ZeRO {stage}",
            )
    left.axhline(limit, color=GREY, linestyle=(0, (5, 3)), linewidth=1)
    left.text(ticks[0], limit * 1.04, f"usable: {limit:.0f} GiB of a GPU", fontsize=8, color="#606060", va="bottom")
    left.set_ylim(top=max(left.get_ylim()[1], limit * 1.5))
    right.legend(fontsize=8, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    save(figure, path)
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [axis, "stage", "gib", "days"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row[axis], row["stage"])))
