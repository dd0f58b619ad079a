"""The paper's tables 1 to 7 from a study's records, with the paper's numbers beside ours; `forms` writes them as text."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from mlinterf_ds.results import paper
from mlinterf_ds.results.records import Records, TaskScore, read_counts
from mlinterf_ds.results.statistics import bootstrap_p

NAMES = {
    "mono": "Mono", "joint": "JointPair", "xlm": "XLM", "unseen": "never saw it", "majority": "majority",
    "meta_adpt-direct": "meta adpt, direct term only", "adpt-compute": "adpt, compute-matched",
}  # fmt: skip
TITLES = {"ner": "NER (F1)", "pos": "POS (F1)", "qa": "QA (F1)", "nli": "NLI (accuracy)"}
SIGNIFICANT = 0.05
SYNTHETIC = "syn"  # the names of synthetic languages start so
VOCABULARY = "one vocabulary for the study (the paper learns one for each model), so that perplexities compare"
DEPARTURES = [
    "pre-norm Transformer (XLM is post-norm); adapters with GELU before the residual sum; routed ffn and attn share their norms",
    VOCABULARY,
    "paper's numbers in brackets: its models, data and sizes are not ours; its average is over the languages shown, of which "
    "it must have every one, but beside synthetic languages over its own",
]


@dataclass(frozen=True)
class Cell:
    """A number of ours over seeds, and the paper's."""

    values: tuple[float, ...] = ()
    paper: float | None = None
    best: bool = False
    mark: str = ""  # † where it differs significantly
    text: str = ""  # shown instead of numbers

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def ours(self) -> str:
        """For example `86.1 ± 0.4†`."""
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        return self.text or ("" if self.mean is None else f"{self.mean:.1f}{spread}{self.mark}")

    def shown(self, bold: Callable[[str], str], escaped: Callable[[str], str] = str) -> str:
        """For example `86.1 ± 0.4† [88.9]`, ours in bold if it is the best."""
        ours = escaped(self.ours)
        ours = bold(ours) if self.best and ours else ours
        return f"{ours} [{self.paper:.1f}]".strip() if self.paper is not None else ours


Rows = list[tuple[str, list[Cell]]]


@dataclass
class Table:
    """Blocks of named rows under one head."""

    number: int
    title: str
    head: list[str]
    blocks: list[tuple[str, Rows]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"table{self.number}"

    @property
    def empty(self) -> bool:
        return not any(cell.values or cell.text for _, rows in self.blocks for _, cells in rows for cell in cells)


def all_tables(records: Records) -> list[Table]:
    """Tables 1 to 7; those for which a study has nothing are left out."""
    tables = [
        corpora(records),
        main_table(records, 2, "NER and POS", [("ner", "f1"), ("pos", "f1")]),
        main_table(records, 3, "QA (F1)", [("qa", "f1")]),
        triples(records),
        sizes(records),
        main_table(records, 6, "NLI, zero-shot (accuracy)", [("nli", "accuracy")], within=False),
        main_table(records, 7, "QA in full (F1 and EM)", [("qa", "f1"), ("qa", "em")]),
    ]
    for table in tables:
        table.notes += records.departures
    return [table for table in tables if not table.empty]


# --- table 1 -----------------------------------------------------------------------------------------------------------
def corpora(records: Records) -> Table:
    """The training text of each language, and the tasks that have test data in it."""
    tasks = sorted({score.task for score in records.scores}, key=list(TITLES).index)
    tested = {(score.task, score.language) for score in records.scores}
    rows = []
    for name, facts in records.sizes.items():
        language = name.partition("@")[0]
        known = paper.SENTENCES.get(language)
        texts = [f"{facts['sentences']:,}", f"{facts['tokens']:,}", "" if known is None else f"{known:g}"]
        texts += ["✓" if (task, language) in tested else "" for task in tasks]
        rows.append((name, [Cell(text=text) for text in texts]))
    head = ["sentences", "tokens", "paper, M sentences", *(task.upper() for task in tasks)]
    return Table(1, "Training text and tasks", head, [("", rows)], [VOCABULARY])


# --- choosing scores ---------------------------------------------------------------------------------------------------
def targets(records: Records) -> dict[str, str]:
    """The second language of each pair set -> the set's name: the columns of the tables."""
    pairs = {(row.set, row.languages[1]) for row in records.of_models if row.kind == "pair"}
    order = {name: index for index, name in enumerate(dict.fromkeys(model.set for model in records.models))}
    return {language: name for name, language in sorted(pairs, key=lambda pair: (order.get(pair[0], 0), pair))}


def chosen(records: Records, **wanted: Any) -> list[TaskScore]:
    """The scores with these attributes, one a seed, in the order of the seeds."""
    scores = [s for s in records.scores if all(getattr(s, name) == value for name, value in wanted.items())]
    return sorted({s.seed: s for s in scores}.values(), key=lambda s: s.seed)


def pick(records: Records, row: str, setting: str, task: str, language: str, group: str) -> list[TaskScore]:
    """The scores of a row of the tables on one language, one a seed."""
    train = language if setting == paper.WITHIN else records.source
    on = {"task": task, "language": language, "train": train}
    if row in ("mono", "unseen"):
        return chosen(records, variant="mono", set=language if row == "mono" else records.source, **on)
    if row == "xlm":
        return chosen(records, kind="many", variant="joint", **on)
    variant, _, control = row.partition("-")
    return chosen(records, kind="pair", set=group, variant=variant, control=control, **on)


def significance(left: Sequence[Sequence[TaskScore]], right: Sequence[Sequence[TaskScore]]) -> str:
    """† where two rows differ; '' also where common seeds or the counts of each example are missing."""
    counts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for pair in zip(left, right, strict=True):
        seeds = set.intersection(*({score.seed for score in side} for side in pair))
        tables = [read_counts([score for score in side if score.seed in seeds]) for side in pair]
        if tables[0] is None or tables[1] is None or tables[0].shape != tables[1].shape:
            return ""
        counts[0].append(tables[0])
        counts[1].append(tables[1])
    return "†" if left and bootstrap_p(*counts) < SIGNIFICANT else ""


def marked(other: str) -> str:
    """The note on what bold type and † mean."""
    return f"† differs from {other} (paired bootstrap over examples and seeds, p < {SIGNIFICANT:g}); bold: best"


def _with_best(rows: Rows) -> Rows:
    """Marks the best of each column. Floors don't compete, and where all are equal none is best."""
    rivals = [cells for name, cells in rows if name not in (NAMES["majority"], NAMES["unseen"])]
    for column in range(len(rows[0][1]) if rows else 0):
        means = [cells[column].mean for cells in rivals]
        known = [mean for mean in means if mean is not None]
        for cells, mean in zip(rivals, means, strict=True):
            if len(set(known)) > 1 and mean == max(known):
                cells[column] = replace(cells[column], best=True)
    return rows


# --- tables 2, 3, 6, 7 -------------------------------------------------------------------------------------------------
def main_table(
    records: Records, number: int, title: str, measures: Sequence[tuple[str, str]], *, within: bool = True
) -> Table:
    """Rows are models, columns the target languages and their average for each (task, metric)."""
    head: list[str] = []
    columns: list[_Column] = []
    for task, metric in measures:
        if languages := [code for code in targets(records) if _has_scores(records, task, code)]:
            label = f"{task.upper()} {metric.upper()} " if len(measures) > 1 else ""
            head += [f"{label}{code}" for code in [*languages, "avg"]]
            columns += [_Column(task, metric, code, [code]) for code in languages]
            columns.append(_Column(task, metric, "avg", languages))
    table = Table(number, title, head, notes=[*DEPARTURES])
    for setting in [paper.WITHIN] * within + [paper.ZERO_SHOT]:
        rows = []
        for row in rows_of(records, setting):
            cells = [_cell(records, row, setting, column) for column in columns]
            if any(cell.values for cell in cells):
                rows.append((NAMES.get(row, f"+ {row.replace('_', ' ')}"), cells))
        table.blocks.append((f"{setting}{' language' if setting == paper.WITHIN else ''}", _with_best(rows)))
    no_mark = "; EM has no mark: counts of each example are of the F1" if ("qa", "em") in measures else ""
    table.notes.append(marked(NAMES["joint"]) + no_mark)
    shown = {column[:3] for column in columns}
    table.notes += [
        f"{'/'.join(key[2:])}: {why}" for key, why in paper.MISPRINTS.items() if (*key[:2], key[4]) in shown
    ]
    if any(score.kind == "many" for score in records.scores):
        table.notes.append("XLM: ours is joint training over all languages of the study, at the larger size")
    return table


class _Column(NamedTuple):
    task: str
    metric: str
    name: str  # a language, or "avg"
    languages: list[str]  # that are averaged


def _has_scores(records: Records, task: str, language: str) -> bool:
    return any((score.task, score.language) == (task, language) for score in records.scores)


def rows_of(records: Records, setting: str) -> list[str]:
    """Names of the rows that there are scores for: the paper's, then controls, then floors."""
    pairs = [score for score in records.scores if score.kind == "pair"]
    present = dict.fromkeys(score.variant + (f"-{score.control}" if score.control else "") for score in pairs)
    known = [row for row in paper.ROWS if row in present or row in ("mono", "xlm")]
    known = [row for row in known if row != "mono" or setting == paper.WITHIN]
    others = [row for row in present if row not in known and not row.endswith("freeze")]
    return known + others + (["unseen"] if setting == paper.ZERO_SHOT else []) + ["majority"]


def _cell(records: Records, row: str, setting: str, column: _Column) -> Cell:
    task, metric, _, languages = column

    def scores_of(row: str) -> list[list[TaskScore]]:
        pairs = targets(records)
        return [pick(records, row, setting, task, language, pairs[language]) for language in languages]

    scores, known = scores_of("joint" if row == "majority" else row), _of_paper(row, setting, column)
    if not all(scores):
        return Cell(paper=known)
    main = metric == scores[0][0].metric
    if row == "majority":
        return Cell((statistics.fmean(of_language[0].majority for of_language in scores),) if main else ())
    seeds = set.intersection(*({score.seed for score in of_language} for of_language in scores))
    values = [
        [score.score if main else score.others[metric] for score in of_language if score.seed in seeds]
        for of_language in scores
    ]
    means = tuple(statistics.fmean(of_seed) for of_seed in zip(*values, strict=True))
    mark = significance(scores, scores_of("joint")) if row != "joint" and main else ""
    return Cell(means, known, mark=mark)


def _of_paper(row: str, setting: str, column: _Column) -> float | None:
    """The paper's number. An average is over these languages, None if the paper lacks one; its own beside synthetic ones."""
    key = (column.task, column.metric, setting, row)
    if column.name != "avg" or all(code.startswith(SYNTHETIC) for code in column.languages):
        return paper.SCORES.get((*key, column.name))
    numbers = [paper.SCORES.get((*key, code)) for code in column.languages]
    known = [number for number in numbers if number is not None]
    return statistics.fmean(known) if len(known) == len(numbers) else None


# --- tables 4 and 5 ----------------------------------------------------------------------------------------------------
def triples(records: Records) -> Table:
    """Pairs against the same pairs with a third language."""
    sets = {score.set: score.languages for score in records.scores if score.kind == "triple"}
    pairs = targets(records)
    tasks = [task for task in ("ner", "pos") if _has_kind(records, "triple", task)]
    columns = [(task, code, name) for task in tasks for name, codes in sets.items() if (code := codes[1]) in pairs]
    table = Table(4, "A third, similar language", [f"{task.upper()} {code}" for task, code, _ in columns])
    for setting in (paper.WITHIN, paper.ZERO_SHOT):
        rows: dict[str, list[Cell]] = {"JointPair": [], "JointTri": []}
        for task, code, name in columns:
            train = code if setting == paper.WITHIN else records.source
            on = {"variant": "joint", "control": "", "task": task, "language": code, "train": train}
            pair = chosen(records, kind="pair", set=pairs[code], **on)
            triple = chosen(records, kind="triple", set=name, **on)
            known = paper.TRILINGUAL[task, setting]
            column = {"hi": 0, "te": 1}.get(code)
            numbers = [None if column is None else known[kind][column] for kind in ("pair", "triple")]
            rows["JointPair"].append(Cell(_values(pair), numbers[0]))
            rows["JointTri"].append(Cell(_values(triple), numbers[1], mark=significance([triple], [pair])))
        table.blocks.append((setting, _with_best(list(rows.items()))))
    table.notes = [*DEPARTURES, marked("JointPair"), *(f"{name}: {', '.join(codes)}" for name, codes in sets.items())]
    return table


def _has_kind(records: Records, kind: str, task: str) -> bool:
    return any((score.kind, score.task) == (kind, task) for score in records.scores)


def _values(scores: Sequence[TaskScore]) -> tuple[float, ...]:
    return tuple(score.score for score in scores)


def sizes(records: Records) -> Table:
    """Full and subsampled partners: on the partner itself, and on the source."""
    lows = {score.set: score.languages for score in records.scores if score.kind == "low"}
    tasks = [task for task in TITLES if _has_kind(records, "low", task)]
    pairs = targets(records)
    columns = [
        (task, group, code, low)
        for task in tasks
        for group, (_, code, *_) in lows.items()
        if code in pairs
        for low in (False, True)
    ]
    table = Table(5, "Corpus size", [f"{task.upper()} {code}{' (low)' * low}" for task, _, code, low in columns])
    limited = {m.languages[0]: m.set for m in records.models if m.kind == "mono" and "@" in m.set}

    def scores_of(row: str, task: str, group: str, code: str, low: bool, on: str) -> list[TaskScore]:
        model = {"kind": "low" if low else "pair", "set": group if low else pairs[code]}
        if row == "mono":
            model = {"kind": "mono", "set": limited.get(code, "") if low else code}
        return chosen(records, **model, variant=row, control="", task=task, language=on, train=on)

    def cell(row: str, task: str, group: str, code: str, low: bool, on: str) -> Cell:
        scores = scores_of(row, task, group, code, low, on)
        of_paper = paper.CORPUS_SIZE.get((task, "f1"), {}).get("source" if on == records.source else row)
        column = {"fr": 0, "ru": 2}.get(code)
        known = None if of_paper is None or column is None else of_paper[column + low]
        compared = row == "joint" and on != records.source
        mark = significance([scores], [scores_of("mono", task, group, code, low, on)]) if compared else ""
        return Cell(_values(scores), known, mark=mark)

    partner = [(NAMES[row], [cell(row, *column, on=column[2]) for column in columns]) for row in ("mono", "joint")]
    source = [(NAMES["joint"], [cell("joint", *column, on=records.source) for column in columns])]
    table.blocks = [("on the partner", _with_best(partner)), (f"on {records.source}", _with_best(source))]
    table.notes = [*DEPARTURES, marked(NAMES["mono"])]
    table.notes += [
        f"low: {limited.get(codes[1], name).replace('@', ' with ')} training sentences, with {codes[0]}"
        for name, codes in lows.items()
    ]
    return table
