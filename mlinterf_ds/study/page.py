"""The report page: one HTML file that needs no network; its own content policy forbids requests."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mlinterf_ds.results import paper
from mlinterf_ds.results.convergence import CONVERGENCE
from mlinterf_ds.results.findings import Finding, caution, interval
from mlinterf_ds.results.records import Records
from mlinterf_ds.results.tables import NAMES, TITLES, Cell, Table
from mlinterf_ds.study.config import StudyConfig

FIGURES = {
    CONVERGENCE: "Convergence of plain and meta adapters",
    "interference": "Interference",
    "conflict-training": "Gradient conflict during training",
    "conflict": "Gradient conflict",
    "prune": "Language-specific parameters",
}
LARGEST = 400_000  # bytes of a figure that the page still includes


def render(
    config: StudyConfig, records: Records, tables: Sequence[Table], findings: Sequence[Finding], facts: dict[str, str]
) -> str:
    """The page as HTML. facts: commit, versions and date, for the head of the page."""
    environment = Environment(
        loader=PackageLoader("mlinterf_ds.study", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"sortable": sortable, "bar": bar, "interval": interval}
    counts = {name: sum(finding.verdict == name for finding in findings) for name in ("holds", "fails", "undecided")}
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
    """The value by which a cell is sorted: its mean, else its text, in which a number loses its commas."""
    return cell.text.replace(",", "") if cell.mean is None else f"{cell.mean:.6f}"


def bar(finding: Finding) -> Markup:
    """A drawing of the effect and its interval around 0, each on its own scale; without an interval the effect alone."""
    effect = finding.effect
    if not effect.values:
        return Markup("")
    largest = max([abs(value) for value in (effect.mean, effect.low, effect.high) if math.isfinite(value)]) or 1.0

    def x(value: float) -> float:
        return 60 + 55 * value / largest

    low, high = (x(value if math.isfinite(value) else effect.mean) for value in (effect.low, effect.high))
    label = f"effect {interval(finding)[0]}, interval {interval(finding)[1] or 'unknown'}"
    return Markup(
        '<svg class="bar {}" viewBox="0 0 120 16" role="img" aria-label="{}"><line class="zero" x1="60" x2="60" y1="1" y2="15"/>'
        '<line class="range" x1="{:.1f}" x2="{:.1f}" y1="8" y2="8"/><circle cx="{:.1f}" cy="8" r="3.5"/></svg>'
    ).format(finding.verdict, label, low, high, x(effect.mean))


def figures(records: Records) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(heading, [(caption, data URI)])]: the figures of the first seed of each analysis of a model.

    Files that are gone are left out. A file that is too large has a caption that says where it is, and no image.
    """
    sections = []
    for analysis, heading in FIGURES.items():
        first_seed = {(a.set, a.variant): a for a in reversed(records.analyses) if a.analysis == analysis}
        shown = [
            _figure(path, "" if made.set == "all" else f": {made.set}, {made.variant}, seed {made.seed}")
            for made in reversed(first_seed.values())
            for path in map(Path, made.figures)
            if path.is_file()
        ]
        if shown:
            sections.append((heading, shown))
    return sections


def _figure(path: Path, model: str) -> tuple[str, str]:
    """The caption and the data URI of a figure of a model."""
    caption, size = f"{path.stem.replace('-', ' ')}{model}", path.stat().st_size
    if size > LARGEST:
        return f"{caption} ({size / 1000:.0f} kB, too large for this page: {path})", ""
    return caption, f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


# --- languages ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Row:
    """A row of a language's table: a model's results, as shown (`cells`) and to sort by (`values`)."""

    model: str
    cells: list[str]
    values: list[str]


@dataclass(frozen=True)
class LanguageView:
    """All results of the study on one language."""

    name: str
    size: dict[str, int]
    perplexity: list[Row]
    tasks: list[tuple[str, list[Row]]]


def languages(records: Records) -> list[LanguageView]:
    """The results on each language: perplexities of the models that know it, and scores of every task on it."""
    trained = [code for model in records.models for code in model.languages]
    names = list(dict.fromkeys(trained + [score.language for score in records.scores]))
    return [
        LanguageView(
            name,
            records.sizes.get(name, {}),
            _perplexity(records, name),
            [(TITLES[task], rows) for task in TITLES if (rows := _scores(records, name, task))],
        )
        for name in names
    ]


def _perplexity(records: Records, language: str) -> list[Row]:
    groups: dict[str, list[tuple[float, float]]] = {}
    for model in records.models:
        if language in model.perplexity:
            numbers = model.perplexity[language], model.bits_per_character[language]
            groups.setdefault(_label(model.variant, model.control, model.set), []).append(numbers)
    return [_row(name, [*zip(*pairs, strict=True)], (2, 3)) for name, pairs in groups.items()]


def _scores(records: Records, language: str, task: str) -> list[Row]:
    groups: dict[str, list[tuple[float, float]]] = {}
    for score in records.scores:
        if (score.language, score.task) == (language, task):
            setting = paper.WITHIN if score.within else f"from {score.train}"
            unseen = ", never saw it" if score.variant == "mono" and not score.within else ""
            name = f"{_label(score.variant, score.control, score.set)}{unseen} · {setting}"
            groups.setdefault(name, []).append((score.score, score.majority))
    return [_row(name, [*zip(*pairs, strict=True)], (1, 1)) for name, pairs in groups.items()]


def _label(variant: str, control: str, group: str) -> str:
    shown = NAMES.get(variant, variant) if variant == "mono" else variant
    return f"{shown}{' ' + control if control else ''} ({group})"


def _row(name: str, columns: Sequence[Sequence[float]], digits: Sequence[int]) -> Row:
    """A row of means over the seeds, each with its standard deviation. columns: the seeds' values; digits: decimals."""
    cells, values = [], []
    for column, decimals in zip(columns, digits, strict=True):
        spread = f" ± {statistics.stdev(column):.{decimals}f}" if len(column) > 1 and len(set(column)) > 1 else ""
        cells.append(f"{statistics.fmean(column):.{decimals}f}{spread}")
        values.append(f"{statistics.fmean(column):.6f}")
    return Row(name, cells, values)


def summary_of(config: StudyConfig) -> dict[str, str]:
    """The head of the page: languages, variants, seeds and tasks."""
    return {
        "languages": ", ".join(config.languages),
        "variants": ", ".join([*(["mono"] if config.mono else []), *config.variants]),
        "seeds": ", ".join(map(str, config.seeds)),
        "tasks": ", ".join(task.task.upper() for task in config.tasks),
    }
