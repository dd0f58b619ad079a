"""The paper's tables 1 to 7 from a study's records, with the paper's numbers beside ours; Markdown, CSV and LaTeX."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlinterf_ds.results import paper
from mlinterf_ds.results.records import Records, Score, read_counts
from mlinterf_ds.results.statistics import bootstrap_p

NAMES = {
    "mono": "Mono", "joint": "JointPair", "xlm": "XLM", "unseen": "never saw it", "majority": "majority",
    "meta_adpt-direct": "meta adpt, direct term only", "adpt-compute": "adpt, compute-matched",
}  # fmt: skip
TITLES = {"ner": "NER (F1)", "pos": "POS (F1)", "qa": "QA (F1)", "nli": "NLI (accuracy)"}
SIGNIFICANT = 0.05
SYNTHETIC = "syn"  # how the names of synthetic languages start
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
    mark: str = ""  # of significance
    text: str = ""  # in place of numbers

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def ours(self) -> str:
        """`86.1 ± 0.4†`"""
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        return self.text or ("" if self.mean is None else f"{self.mean:.1f}{spread}{self.mark}")

    def shown(self, bold: Callable[[str], str], escaped: Callable[[str], str] = str) -> str:
        """`86.1 ± 0.4† [88.9]`, ours in bold if it is the best."""
        ours = escaped(self.ours)
        ours = bold(ours) if self.best and ours else ours
        return f"{ours} [{self.paper:.1f}]".strip() if self.paper is not None else ours


@dataclass
class Table:
    """Blocks of rows under one head."""

    number: int
    title: str
    head: list[str]
    blocks: list[tuple[str, list[tuple[str, list[Cell]]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"table{self.number}"

    @property
    def empty(self) -> bool:
        return not any(cell.values or cell.text for _, rows in self.blocks for _, cells in rows for cell in cells)


def all_tables(records: Records) -> list[Table]:
    """Tables 1 to 7; those for which a study has nothing are left out."""
    found = [
        corpora(records),
        main_table(records, 2, "NER and POS", [("ner", "f1"), ("pos", "f1")]),
        main_table(records, 3, "QA (F1)", [("qa", "f1")]),
        triples(records),
        sizes(records),
        main_table(records, 6, "NLI, zero-shot (accuracy)", [("nli", "accuracy")], within=False),
        main_table(records, 7, "QA in full (F1 and EM)", [("qa", "f1"), ("qa", "em")]),
    ]
    for table in found:
        table.notes += records.departures
    return [table for table in found if not table.empty]


# --- table 1 -----------------------------------------------------------------------------------------------------------
def corpora(records: Records) -> Table:
    """Training text, and which tasks have test data."""
    tasks = sorted({score.task for score in records.scores}, key=list(TITLES).index)
    table = Table(
        1, "Training text and tasks", ["sentences", "tokens", "paper, M sentences", *(t.upper() for t in tasks)]
    )
    rows = []
    for language, facts in records.sizes.items():
        cells = [Cell(text=f"{facts[name]:,}") for name in ("sentences", "tokens")]
        known = paper.SENTENCES.get(language.partition("@")[0])
        cells.append(Cell(text="" if known is None else f"{known:g}"))
        cells += [Cell(text="✓" if _tested(records, task, language) else "") for task in tasks]
        rows.append((language, cells))
    table.blocks = [("", rows)]
    table.notes = [VOCABULARY]
    return table


def _tested(records: Records, task: str, language: str) -> bool:
    return any(score.task == task and score.language == language.partition("@")[0] for score in records.scores)


# --- tables 2, 3, 6, 7 -------------------------------------------------------------------------------------------------
def targets(records: Records) -> dict[str, str]:
    """The second language of each pair set, and the set's name: the columns of the tables."""
    pairs = {(s.set, s.languages[1]) for s in records.scores if s.kind == "pair"}
    pairs |= {(m.set, m.languages[1]) for m in records.models if m.kind == "pair"}
    order = {name: index for index, name in enumerate(dict.fromkeys(m.set for m in records.models))}
    return {language: name for name, language in sorted(pairs, key=lambda pair: (order.get(pair[0], 0), pair))}


def chosen(records: Records, **wanted: Any) -> list[Score]:
    """The scores with these attributes, one a seed, in the order of the seeds."""
    found = [s for s in records.scores if all(getattr(s, name) == value for name, value in wanted.items())]
    return sorted({s.seed: s for s in found}.values(), key=lambda s: s.seed)


def pick(records: Records, row: str, setting: str, task: str, language: str, group: str) -> list[Score]:
    """The scores of a row of the tables on one language, one a seed."""
    train = language if setting == paper.WITHIN else records.source
    where = {"task": task, "language": language, "train": train}
    if row in ("mono", "unseen"):
        return chosen(records, variant="mono", set=language if row == "mono" else records.source, **where)
    if row == "xlm":
        return chosen(records, kind="many", variant="joint", **where)
    variant, _, control = row.partition("-")
    return chosen(records, kind="pair", set=group, variant=variant, control=control, **where)


def value(score: Score, metric: str) -> float:
    return score.score if metric == score.metric else score.others[metric]


def rows_of(records: Records, setting: str) -> list[str]:
    """Names of the rows there are scores for: the paper's, then controls, then floors."""
    found = dict.fromkeys(
        s.variant + (f"-{s.control}" if s.control else "") for s in records.scores if s.kind == "pair"
    )
    known = [row for row in paper.ROWS if row in found or row in ("mono", "xlm")]
    known = [row for row in known if row != "mono" or setting == paper.WITHIN]
    others = [row for row in found if row not in known and not row.endswith("freeze")]
    return known + others + (["unseen"] if setting == paper.ZERO_SHOT else []) + ["majority"]


def main_table(
    records: Records, number: int, title: str, columns: Sequence[tuple[str, str]], *, within: bool = True
) -> Table:
    """Rows are models, columns the target languages and their average, for each (task, metric)."""
    pairs = targets(records)
    several = len(columns) > 1
    head, at = [], []
    for task, metric in columns:
        here = [code for code in pairs if any(s.task == task and s.language == code for s in records.scores)]
        if not here:
            continue
        label = f"{task.upper()} {metric.upper()} " if several else ""
        head += [f"{label}{code}" for code in [*here, "avg"]]
        at += [(task, metric, code) for code in [*here, "avg"]]
    table = Table(number, title, head, notes=[*DEPARTURES])
    for setting in [paper.WITHIN] * within + [paper.ZERO_SHOT]:
        rows = []
        for row in rows_of(records, setting):
            cells = [_cell(records, row, setting, task, metric, code, pairs) for task, metric, code in at]
            if any(cell.values for cell in cells):
                rows.append((NAMES.get(row, f"+ {row.replace('_', ' ')}"), cells))
        table.blocks.append((f"{setting}{' language' if setting == paper.WITHIN else ''}", _best(rows)))
    no_mark = "; EM has no mark: counts of each example are of the F1" if ("qa", "em") in columns else ""
    table.notes.append(marked(NAMES["joint"]) + no_mark)
    table.notes += [f"{'/'.join(key[2:])}: {why}" for key, why in paper.MISPRINTS.items() if (*key[:2], key[4]) in at]
    if any(s.kind == "many" for s in records.scores):
        table.notes.append("XLM: ours is joint training over all languages of the study, at the larger size")
    return table


def _known(task: str, metric: str, setting: str, row: str, here: Sequence[str]) -> float | None:
    """The paper's average over these languages, None if it lacks one; over its own beside synthetic ones."""
    if all(code.startswith(SYNTHETIC) for code in here):
        return paper.SCORES.get((task, metric, setting, row, "avg"))
    cells = [paper.SCORES.get((task, metric, setting, row, code)) for code in here]
    known = [cell for cell in cells if cell is not None]
    return statistics.fmean(known) if len(known) == len(cells) else None


def _cell(records: Records, row: str, setting: str, task: str, metric: str, code: str, pairs: dict[str, str]) -> Cell:
    if code == "avg":
        here = [c for c in pairs if any(s.task == task and s.language == c for s in records.scores)]
        known = _known(task, metric, setting, row, here)
    else:
        here, known = [code], paper.SCORES.get((task, metric, setting, row, code))
    found = [_scores(records, row, setting, task, language, pairs[language]) for language in here]
    if not found or not all(found):
        return Cell(paper=known)
    seeds = set.intersection(*({s.seed for s in scores} for scores in found))
    if row == "majority":
        return Cell((statistics.fmean(scores[0].majority for scores in found),) if metric == found[0][0].metric else ())
    table = [[value(s, metric) for s in scores if s.seed in seeds] for scores in found]
    means = tuple(statistics.fmean(column) for column in zip(*table, strict=True))
    mark = ""
    if row != "joint" and metric == found[0][0].metric:
        others = [_scores(records, "joint", setting, task, language, pairs[language]) for language in here]
        mark = significance(found, others)
    return Cell(means, known, mark=mark)


def _scores(records: Records, row: str, setting: str, task: str, language: str, group: str) -> list[Score]:
    return pick(records, "joint" if row == "majority" else row, setting, task, language, group)


def significance(ours: Sequence[Sequence[Score]], theirs: Sequence[Sequence[Score]]) -> str:
    """† where two rows differ; '' also where the counts per example or common seeds are missing."""
    left, right = [], []
    for a, b in zip(ours, theirs, strict=True):
        seeds = {s.seed for s in a} & {s.seed for s in b}
        tables = [read_counts([s for s in side if s.seed in seeds]) for side in (a, b)]
        if tables[0] is None or tables[1] is None or tables[0].shape != tables[1].shape:
            return ""
        left.append(tables[0])
        right.append(tables[1])
    return "†" if left and bootstrap_p(left, right) < SIGNIFICANT else ""


def marked(other: str) -> str:
    """The note on what bold type and † mean."""
    return f"† differs from {other} (paired bootstrap over examples and seeds, p < {SIGNIFICANT:g}); bold: best"


def _best(rows: list[tuple[str, list[Cell]]]) -> list[tuple[str, list[Cell]]]:
    """Mark the best of each column; floors don't compete, and where all are equal none is best."""
    floors = (NAMES["majority"], NAMES["unseen"])
    for column in range(len(rows[0][1]) if rows else 0):
        means = {name: cells[column].mean for name, cells in rows if name not in floors}
        known = [mean for mean in means.values() if mean is not None]
        for name, cells in rows:
            if len(set(known)) > 1 and means.get(name) == max(known):
                cells[column] = Cell(cells[column].values, cells[column].paper, True, cells[column].mark)
    return rows


# --- tables 4 and 5 ----------------------------------------------------------------------------------------------------
def triples(records: Records) -> Table:
    """Pairs against the same pairs with a third language."""
    sets = {s.set: s.languages for s in records.scores if s.kind == "triple"}
    pairs = targets(records)
    tasks = [task for task in ("ner", "pos") if any(s.kind == "triple" and s.task == task for s in records.scores)]
    columns = [(task, code, name) for task in tasks for name, codes in sets.items() if (code := codes[1]) in pairs]
    table = Table(4, "A third, similar language", [f"{task.upper()} {code}" for task, code, _ in columns])
    for setting in (paper.WITHIN, paper.ZERO_SHOT):
        rows = []
        for label, kind in (("JointPair", "pair"), ("JointTri", "triple")):
            cells = []
            for task, code, name in columns:
                pair = _joint(records, "pair", pairs[code], setting, task, code)
                found = pair if kind == "pair" else _joint(records, kind, name, setting, task, code)
                known = dict(zip(("hi", "te"), paper.TRILINGUAL[task, setting][kind], strict=True)).get(code)
                mark = "" if found is pair else significance([found], [pair])
                cells.append(Cell(tuple(s.score for s in found), known, mark=mark))
            rows.append((label, cells))
        table.blocks.append((setting, _best(rows)))
    table.notes = [*DEPARTURES, marked("JointPair"), *(f"{name}: {', '.join(codes)}" for name, codes in sets.items())]
    return table


def _joint(records: Records, kind: str, group: str, setting: str, task: str, code: str) -> list[Score]:
    train = code if setting == paper.WITHIN else records.source
    return chosen(records, kind=kind, set=group, variant="joint", control="", task=task, language=code, train=train)


def sizes(records: Records) -> Table:
    """Full and subsampled partners: on the partner itself, and on the source."""
    lows = {s.set: s for s in records.scores if s.kind == "low"}
    pairs = targets(records)
    tasks = [task for task in TITLES if any(s.kind == "low" and s.task == task for s in records.scores)]
    columns = [
        (task, group, lows[group].languages[1]) for task in tasks for group in lows if lows[group].languages[1] in pairs
    ]
    head = [f"{task.upper()} {code}{suffix}" for task, _, code in columns for suffix in ("", " (low)")]
    table = Table(5, "Corpus size", head)
    limited = {m.languages[0]: m.set for m in records.models if m.kind == "mono" and "@" in m.set}
    for on_source, row_names in ((False, ("mono", "joint")), (True, ("joint",))):
        rows: list[tuple[str, list[Cell]]] = []
        alone: dict[tuple[str, str, bool], list[Score]] = {}
        for row in row_names:
            cells = []
            for task, group, code in columns:
                on = records.source if on_source else code
                known = paper.CORPUS_SIZE.get((task, "f1"), {}).get("source" if on_source else row)
                first = {"fr": 0, "ru": 2}.get(code)
                for place, low in enumerate((False, True)):
                    if row == "mono":
                        where: dict[str, Any] = {"kind": "mono", "set": limited.get(code, "") if low else code}
                    else:
                        where = {"kind": "low" if low else "pair", "set": group if low else pairs[code]}
                    found = chosen(records, **where, variant=row, control="", task=task, language=on, train=on)
                    paper_value = None if known is None or first is None else known[first + place]
                    other = alone.setdefault((task, group, low), found)  # the monolingual model, which comes first
                    mark = significance([found], [other]) if other is not found else ""
                    cells.append(Cell(tuple(s.score for s in found), paper_value, mark=mark))
            rows.append((NAMES[row], cells))
        table.blocks.append((f"on {records.source}" if on_source else "on the partner", _best(rows)))
    table.notes = [*DEPARTURES, marked(NAMES["mono"])]
    table.notes += [
        f"low: {limited.get(score.languages[1], name).replace('@', ' with ')} training sentences, with {score.languages[0]}"
        for name, score in lows.items()
    ]
    return table
