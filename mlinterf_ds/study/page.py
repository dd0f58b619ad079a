"""The report page: one HTML file that needs no network; its own content policy forbids requests."""

from __future__ import annotations

import base64
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mlinterf_ds.results import paper
from mlinterf_ds.results.findings import Finding, below_lexical, caution, interval, p_values, shown_beside
from mlinterf_ds.results.forms import Cell, Table
from mlinterf_ds.results.records import AnalysisSummary, Records, TaskScore, TrainedModel
from mlinterf_ds.results.statistics import VERDICTS
from mlinterf_ds.results.tables import NAMES, titles
from mlinterf_ds.study.config import StudyConfig

FIGURES = {
    "convergence": "Convergence of plain and meta adapters",
    "interference": "Interference",
    "interference-null": "Null control: two halves of one language",
    "conflict-training": "Gradient conflict during training",
    "conflict": "Gradient conflict",
    "prune": "Language-specific parameters",
    "probe": "Frozen states: probes, retrieval, alignment",
}
# What a figure shows, by how its file's name begins; the rest of the name says of what.
CAPTIONS = {
    "bars": "Scores of monolingual, joint and larger models", "differences": "Interference with its 95% intervals",
    "pairs": "Interference of each language with each partner", "distance": "Distance between the languages",
    "transfer": "Zero-shot transfer between languages", "validation": "Validation perplexity during pretraining",
    "training": "Curves during training", "matrix": "Similarity of each two languages",
    "components": "Similarity by layer and component", "layers": "Similarity of the masks by layer",
    "extremes": "Parameters that a language's masks value most and least", "convergence": "Validation perplexity, plain and meta adapters",
}  # fmt: skip
ABOUT = ("made", "git_commit", "git_dirty")  # the facts at the head of the page; the others, versions, stand at its end
LARGEST = 400_000  # bytes of a figure that the page still includes


def render(
    config: StudyConfig, records: Records, tables: Sequence[Table], findings: Sequence[Finding], facts: dict[str, str]
) -> str:
    """The page as HTML. facts: commit and date, for the head of the page, and versions of software, for its end."""
    environment = Environment(
        loader=PackageLoader("mlinterf_ds.study", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"sortable": sortable, "bar": bar, "interval": interval, "p_values": p_values}
    environment.filters["short_paths"] = lambda text: re.sub(r"(?<![\w.])/(?:[^\s/:;,]+/)+", "…/", text)
    environment.filters |= {
        "shown_beside": shown_beside,
        "below_lexical": below_lexical,
        "css": lambda verdict: verdict.replace(" ", "-"),
    }
    about = {
        "languages": ", ".join(config.languages),
        "variants": ", ".join([*(["mono"] if config.mono else []), *config.variants]),
        "seeds": ", ".join(map(str, config.seeds)),
        "tasks": ", ".join(task.task.upper() for task in config.tasks),
    }
    return environment.get_template("report.html.j2").render(
        config=config, about=about | {name: text for name, text in facts.items() if name in ABOUT},
        versions={name: text for name, text in facts.items() if name not in ABOUT}, records=records, tables=tables, findings=findings,
        counts=Counter(finding.verdict for finding in findings), states=Counter(row["state"] for row in records.status),
        verdicts=VERDICTS, caution=caution(findings, records.confidence), figures=figures(records), languages=languages(records),
    )  # fmt: skip


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
    ).format(finding.verdict.replace(" ", "-"), label, low, high, x(effect.mean))


def figures(records: Records) -> list[tuple[str, list[tuple[str, str]]]]:
    """[(heading, [(caption, data URI)])]: the figures of the first seed of each analysis of a model.

    Files that are gone are left out. A file that is too large has a caption that says where it is, and no image.
    """
    sections = []
    for analysis, heading in FIGURES.items():
        first_seed = {(a.set, a.variant): a for a in reversed(records.analyses) if a.analysis == analysis}
        shown = [
            _figure(path, _of_model(made))
            for made in reversed(first_seed.values())
            for path in map(Path, made.figures)
            if path.is_file()
        ]
        if shown:
            sections.append((heading, shown))
    return sections


def _of_model(made: AnalysisSummary) -> str:
    """What a figure's caption says of its models; '' for a figure of all models of the study."""
    if made.set == "all":
        return ""
    languages = ", ".join(made.languages)
    return f": {languages}" if made.variant == "all" else f": {made.variant} on {languages}, seed {made.seed}"


def _figure(path: Path, model: str) -> tuple[str, str]:
    """The caption and the data URI of a figure of a model."""
    kind, _, of_what = path.stem.partition("-")
    words = CAPTIONS.get(kind, kind) + (f", {of_what.replace('-', ' ')}" if of_what else "")
    caption, size = words + model, path.stat().st_size
    if size > LARGEST:
        return f"{caption} ({path.name} has {size / 1000:.0f} kB, too much for this page)", ""
    return caption, f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


# --- languages ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LanguageView:
    """All results of the study on one language.

    tables: (title, head, rows); a row is a model's name and for each column the text that is shown and the value to sort by.
    """

    name: str
    size: dict[str, int]
    tables: list[tuple[str, list[str], list[tuple[str, list[tuple[str, str]]]]]]


def languages(records: Records) -> list[LanguageView]:
    """The results on each language: perplexities of the models that know it, and scores of every task on it."""
    trained = [code for model in records.models for code in model.languages]
    views = []
    for name in dict.fromkeys(trained + [score.language for score in records.scores]):
        tables = [("", ["perplexity", "bits per character"], _perplexity(records, name))]
        tables += [
            (title, ["score", "majority", "lexical"], _scores(records, name, task))
            for task, title in titles(records).items()
        ]
        shown = [
            (title, head, [(model, _means(rows, (1, 1, 1) if title else (2, 3))) for model, rows in groups.items()])
            for title, head, groups in tables
            if groups
        ]
        views.append(LanguageView(name, records.sizes.get(name, {}), shown))
    return views


Groups = dict[str, list[tuple[float | None, ...]]]  # a model -> the numbers of each seed


def _perplexity(records: Records, language: str) -> Groups:
    groups: Groups = {}
    for model in records.models:
        if language in model.perplexity:
            numbers = model.perplexity[language], model.bits_per_character[language]
            groups.setdefault(_label(model), []).append(numbers)
    return groups


def _scores(records: Records, language: str, task: str) -> Groups:
    groups: Groups = {}
    for score in records.scores:
        if (score.language, score.task) == (language, task):
            setting = paper.WITHIN if score.within else f"from {score.train}"
            unseen = ", never saw it" if score.variant == "mono" and not score.within else ""
            numbers = score.score, score.majority, score.lexical
            groups.setdefault(f"{_label(score)}{unseen} · {setting}", []).append(numbers)
    return groups


def _label(row: TrainedModel | TaskScore) -> str:
    shown = NAMES["mono"] if row.variant == "mono" else row.variant
    return f"{shown}{' ' + row.control if row.control else ''} ({row.set})"


def _means(rows: Sequence[tuple[float | None, ...]], digits: tuple[int, ...]) -> list[tuple[str, str]]:
    """Means over the seeds with their standard deviations, and to sort by, of each column. digits: decimals shown.

    A score below the lexical baseline, the third column of three, is marked.
    """
    columns, means = [], []
    for column, decimals in zip(zip(*rows, strict=True), digits, strict=True):
        values = [value for value in column if value is not None]
        means.append(statistics.fmean(values) if values else math.nan)
        spread = f" ± {statistics.stdev(values):.{decimals}f}" if len(set(values)) > 1 else ""
        columns.append((f"{means[-1]:.{decimals}f}{spread}" if values else "", f"{means[-1]:.6f}" if values else ""))
    if len(means) == 3 and means[0] < means[2]:
        columns[0] = f"{columns[0][0]}, below lexical", columns[0][1]
    return columns
