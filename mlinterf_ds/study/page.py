"""The report page: one HTML file that asks nothing of the network (its own policy forbids it)."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mlinterf_ds.plots.convergence import CONVERGENCE
from mlinterf_ds.results import paper
from mlinterf_ds.results.findings import Finding, caution, interval
from mlinterf_ds.results.records import Records, Score
from mlinterf_ds.results.tables import NAMES, TITLES, Cell, Table
from mlinterf_ds.study.config import StudyConfig

FIGURES = {
    CONVERGENCE: "Convergence of plain and meta adapters",
    "interference": "Interference",
    "conflict-training": "Gradient conflict during training",
    "conflict": "Gradient conflict",
    "prune": "Language-specific parameters",
}
LARGEST = 400_000  # bytes of a figure


def render(
    config: StudyConfig, records: Records, tables: Sequence[Table], findings: Sequence[Finding], facts: dict[str, str]
) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("mlinterf_ds.study", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"sortable": sortable, "bar": bar, "interval": interval}
    counts = {name: sum(f.verdict == name for f in findings) for name in ("holds", "fails", "undecided")}
    states = {
        name: sum(row["state"] == name for row in records.status)
        for name in ("finished", "failed", "blocked", "waiting")
    }
    return environment.get_template("report.html.j2").render(
        config=config,
        about=summary_of(config),
        records=records,
        tables=tables,
        findings=findings,
        counts=counts,
        caution=caution(len(findings), records.confidence),
        states=states,
        facts=facts,
        figures=figures(records),
        languages=languages(records),
    )


def sortable(cell: Cell) -> str:
    """What a cell is sorted by: its mean, else its text, a number there without commas."""
    return cell.text.replace(",", "") if cell.mean is None else f"{cell.mean:.6f}"


def bar(claim: Finding) -> Markup:
    """The effect and its interval beside 0, on a scale of its own; the effect alone where there is no interval."""
    e = claim.effect
    if not e.values:
        return Markup("")
    most = max([abs(v) for v in (e.mean, e.low, e.high) if math.isfinite(v)]) or 1.0

    def x(value: float) -> float:
        return 60 + 55 * value / most

    low, high = (x(v) if math.isfinite(v) else x(e.mean) for v in (e.low, e.high))
    label = f"effect {interval(claim)[0]}, interval {interval(claim)[1] or 'unknown'}"
    return Markup(
        '<svg class="bar {}" viewBox="0 0 120 16" role="img" aria-label="{}"><line class="zero" x1="60" x2="60" y1="1" y2="15"/>'
        '<line class="range" x1="{:.1f}" x2="{:.1f}" y1="8" y2="8"/><circle cx="{:.1f}" cy="8" r="3.5"/></svg>'
    ).format(claim.verdict, label, low, high, x(e.mean))


def figures(records: Records) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, [(caption, data URI)]) of the first seed of each analysis of a model; files that are gone are left out, of
    too large ones the caption alone is shown, with where the figure is."""
    found = []
    for analysis, heading in FIGURES.items():
        shown = []
        mine = {(a.set, a.variant): a for a in reversed(records.analyses) if a.analysis == analysis}
        for each in reversed(mine.values()):
            for path in (path for path in map(Path, each.figures) if path.is_file()):
                of = "" if each.set == "all" else f": {each.set}, {each.variant}, seed {each.seed}"
                caption, image = f"{path.stem.replace('-', ' ')}{of}", ""
                if path.stat().st_size <= LARGEST:
                    image = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
                else:
                    caption += f" ({path.stat().st_size / 1000:.0f} kB, too large for this page: {path})"
                shown.append((caption, image))
        if shown:
            found.append((heading, shown))
    return found


# --- a language's own pages --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Line:
    """A model's figures on a language."""

    model: str
    cells: list[str]
    values: list[str]


@dataclass(frozen=True)
class LanguageView:
    """All that the study says of one language."""

    name: str
    size: dict[str, int]
    perplexity: list[Line]
    tasks: list[tuple[str, list[Line]]]


def languages(records: Records) -> list[LanguageView]:
    """By language: perplexity of every model that knows it, and every task's scores on it."""
    names = list(
        dict.fromkeys([code for m in records.models for code in m.languages] + [s.language for s in records.scores])
    )
    return [
        LanguageView(
            name,
            records.sizes.get(name, {}),
            _perplexity(records, name),
            [(TITLES[task], lines) for task in TITLES if (lines := _lines(records, name, task))],
        )
        for name in names
    ]


def _perplexity(records: Records, language: str) -> list[Line]:
    groups: dict[str, list[tuple[float, float]]] = {}
    for model in records.models:
        if language in model.perplexity:
            numbers = model.perplexity[language], model.bits_per_character[language]
            groups.setdefault(_label(model.variant, model.control, model.set), []).append(numbers)
    return [_line(name, [[v for v, _ in values], [b for _, b in values]], (2, 3)) for name, values in groups.items()]


def _lines(records: Records, language: str, task: str) -> list[Line]:
    groups: dict[str, list[Score]] = {}
    for score in records.scores:
        if (score.language, score.task) == (language, task):
            setting = paper.WITHIN if score.within else f"from {score.train}"
            never = score.variant == "mono" and not score.within
            name = f"{_label(score.variant, score.control, score.set)}{', never saw it' if never else ''} · {setting}"
            groups.setdefault(name, []).append(score)
    return [
        _line(name, [[s.score for s in found], [s.majority for s in found]], (1, 1)) for name, found in groups.items()
    ]


def _label(variant: str, control: str, group: str) -> str:
    row = NAMES.get(variant, variant) if variant == "mono" else variant
    return f"{row}{' ' + control if control else ''} ({group})"


def _line(name: str, columns: Sequence[Sequence[float]], digits: Sequence[int]) -> Line:
    cells, values = [], []
    for column, places in zip(columns, digits, strict=True):
        spread = f" ± {statistics.stdev(column):.{places}f}" if len(column) > 1 and len(set(column)) > 1 else ""
        cells.append(f"{statistics.fmean(column):.{places}f}{spread}")
        values.append(f"{statistics.fmean(column):.6f}")
    return Line(name, cells, values)


def summary_of(config: StudyConfig) -> dict[str, str]:
    """The head of the page: what was compared."""
    return {
        "languages": ", ".join(config.languages),
        "variants": ", ".join([*(["mono"] if config.mono else []), *config.variants]),
        "seeds": ", ".join(map(str, config.seeds)),
        "tasks": ", ".join(task.task.upper() for task in config.tasks),
    }
