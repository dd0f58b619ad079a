"""Figures of a plan: memory and time against the number of GPUs, and against the number of languages."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from mlinterf_ds.plots.style import GREY, MARKERS, OKABE_ITO, STYLES, _save

Row = dict[str, Any]


def _frame(axes: Axes, along: Sequence[int], values: Sequence[float], label: str, title: str, unit: str) -> None:
    axes.set_xscale("log", base=2)
    if max(values) >= 5 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_ylim(0, 1.15 * max(values))
    axes.xaxis.set_major_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(list(along), [f"{value:,}" for value in along])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, which="major", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(label)
    axes.set_ylabel(unit)
    axes.set_title(title, loc="left", fontsize=10)


def scaling(rows: list[Row], along: str, label: str, path: Path, *, title: str, limit: float) -> None:
    """Memory of a rank and days of the run against `along` ('gpus' or 'languages'), a line for each ZeRO stage.

    rows: {"stage", along, "gib", "days"}; limit: GiB of a GPU that a run may use (dashed). PNG at `path`, SVG and CSV beside.
    """
    figure = Figure(figsize=(9.4, 4.1), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    places = sorted({row[along] for row in rows})
    for axes, kind, name, unit in (
        (left, "gib", "memory of a rank", "GiB"),
        (right, "days", "the whole run", "days"),
    ):
        values = [row[kind] for row in rows] + ([limit] if kind == "gib" else [])
        _frame(axes, places, values, label, name, unit)
        for index, stage in enumerate(sorted({row["stage"] for row in rows})):
            points = sorted((row[along], row[kind]) for row in rows if row["stage"] == stage)
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
    left.text(places[0], limit * 1.04, f"usable of a GPU: {limit:.0f} GiB", fontsize=8, color="#606060", va="bottom")
    left.set_ylim(top=max(left.get_ylim()[1], limit * 1.5))
    right.legend(fontsize=8, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _save(figure, path)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [along, "stage", "gib", "days"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row[along], row["stage"])))
