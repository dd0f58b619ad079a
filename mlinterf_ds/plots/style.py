"""The style of all figures: colours, markers, fonts, frames, headings, and how a figure is saved.

Figures are drawn without pyplot, so that they need no display and share no state; each is saved as a PNG to look at and an SVG
to print. The colours are Okabe and Ito's palette for the colour-blind without its yellow, which is too pale for lines. Line
styles and markers tell lines apart in grey print as well. Dashes always mean a baseline.
"""

from __future__ import annotations

import functools
import itertools
import re
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mlinterf_ds.files import replacing

OKABE_ITO = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"]
STYLES: list[Any] = ["-", (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2))]
DASHED: Any = (0, (5, 3))
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h"]
MODELS = ["mono", "joint", "adpt", "ffn", "meta_adpt", "attn", "larger", "share_adpt", "meta_ffn", "meta_attn"]
GREY, DARK_GREY = "#9A9A9A", "#606060"
WIDE = 10.0  # ratio of largest to smallest value from which an axis is logarithmic

Points = list[tuple[int, float]]  # (step, value)
Look = dict[str, Any]  # how a line is drawn: color, linestyle, marker


def new_figure(width: float, height: float, dpi: int = 160) -> Figure:
    """An empty figure of this size in inches."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: Figure, path: Path, title: str, caption: str = "") -> None:
    """Adds a title above the panels and below them, in small print, what the figure was made from; saves the figure."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontfamily=families(title))
    if caption:
        width = int(figure.get_figwidth() * 18)  # characters of 7 points
        caption = "\n".join(textwrap.fill(line, width) for line in caption.split("\n"))
        figure.supxlabel(caption, x=0.01, ha="left", fontsize=7, color="#505050", fontfamily=families(caption))
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG to `path` and an SVG beside it; a failure leaves an earlier file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        with replacing(path.with_suffix(f".{kind}")) as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # no installed font has it
            figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)


def shortened(caption: str, count: int, most: int) -> str:
    """The caption; where only `most` of `count` categories are drawn, it says so."""
    return f"{caption}; the first {most} of {count} are drawn, the CSV has all" if count > most else caption


def panels(figure: Figure, count: int, across: int, sharex: bool = False) -> list[Axes]:
    """`count` panels, `across` in a row; what is left of the last row stays empty."""
    grid = figure.subplots(-(-count // across), across, squeeze=False, sharex=sharex)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return list(grid.flat[:count])


def legend_beside(figure: Figure, axes: Axes, where: str, **form: Any) -> None:
    """A legend outside of the panels, of what is drawn in one of them."""
    handles, names = axes.get_legend_handles_labels()
    font = {"size": 8, "family": families("".join(names))}
    figure.legend(handles, names, loc=f"outside {where}", prop=font, frameon=False, **form)


# --- lines and axes ----------------------------------------------------------------------------------------------------
def look(index: int, linestyle: Any = None) -> Look:
    """The look of the line with this number: all differ up to 20; `linestyle` replaces the line's own."""
    own = STYLES[index // len(OKABE_ITO) % len(STYLES)]
    return {
        "color": OKABE_ITO[index % len(OKABE_ITO)],
        "linestyle": own if linestyle is None else linestyle,
        "marker": MARKERS[index % len(MARKERS)],
    }


def model_looks(names: Iterable[str]) -> dict[str, Look]:
    """Name of a model -> its look: a variant, with which the name begins, looks alike in every figure and panel.

    Where two names begin with one variant, the first in order has its look.
    """
    looks: dict[str, Look] = {}
    taken: set[int] = set()
    waiting = []
    for name in sorted(set(names)):
        variant = re.split(r"[ ,(]", name)[0]
        index = MODELS.index(variant) if variant in MODELS else -1
        if index < 0 or index in taken:
            waiting.append(name)
        else:
            looks[name] = look(index)
            taken.add(index)
    free = (index for index in itertools.count() if index not in taken)
    return looks | {name: look(index) for name, index in zip(waiting, free, strict=False)}


def scale(axes: Axes, values: Sequence[float]) -> None:
    """Makes the y axis logarithmic for positive values that lie far apart, with plain numbers on it."""
    if values and max(values) >= WIDE * min(values):
        axes.set_yscale("log")
        narrow = max(values) < 300 * min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))


def step_ticks(axes: Axes, count: int = 7) -> None:
    """Whole steps at the ticks of the x axis."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=count, integer=True, steps=[1, 2, 2.5, 5, 10]))


def tidy(axes: Axes, grid: Literal["x", "y", "both"] | None) -> None:
    """Pale grid lines behind the data, and no spines at the top and right."""
    if grid:
        axes.grid(True, axis=grid, color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_ends(
    figure: Figure, axes: Axes, ends: dict[str, tuple[int, float]], looks: dict[str, Look], form: str = ",.1f"
) -> None:
    """Writes each line's name and last value to the right of its end, moved apart where the texts would touch.

    ends: name of a line -> its last (step, value); looks: name -> look, drawn as a short sample beside the text.
    """
    if not ends:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # the labels must not change the scale that their positions are computed from
    to_axes = axes.transData + axes.transAxes.inverted()
    names = sorted(ends, key=lambda name: ends[name][1])
    heights = [float(to_axes.transform((0, ends[name][1]))[1]) for name in names]  # in fractions of the axes
    spread = _apart(heights, gap=min(11 / (figure.get_figheight() * 72 * 0.8), 1 / len(names)))
    fixed: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False, "scalex": False, "scaley": False}
    for name, end, shown in zip(names, heights, spread, strict=True):
        text = f"{name}  {ends[name][1]:{form}}"
        axes.plot([1.0, 1.025], [end, shown], color=GREY, linewidth=0.5, **fixed)
        axes.plot([1.03, 1.05, 1.07], [shown] * 3, **looks[name], markevery=[1], markersize=4, linewidth=1.5, **fixed)
        axes.text(1.08, shown, text, transform=axes.transAxes, va="center", fontsize=8, fontfamily=families(text))


def _apart(wanted: Iterable[float], gap: float) -> list[float]:
    """Positions in [0, 1] near the ascending `wanted`, at least `gap` apart. Touching ones form blocks around their mean."""
    blocks: list[tuple[float, int]] = []  # (mean of the wanted positions, their number)

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


def families(text: str) -> list[str]:
    """Font families for `text`: matplotlib's default and, if that lacks characters, installed ones that have them."""
    names = ["DejaVu Sans"]
    missing = {ord(c) for c in text if not c.isspace()} - _characters(font_manager.findfont("DejaVu Sans"))
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: ("Sans" not in font.name, font.name)):
        if not missing:
            break
        if "Last Resort" in font.name:  # it draws every character as a box
            continue
        try:  # a list, because a bare name is read as a fontconfig pattern
            face = font_manager.findfont(font_manager.FontProperties(family=[font.name]))
            has = missing & _characters(face)
        except (OSError, RuntimeError):  # a broken font file
            continue
        if has:
            names.append(font.name)
            missing -= has
    return names
