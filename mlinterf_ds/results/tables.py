"""The paper's tables 1 to 7 from a study's records, with the paper's numbers beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from mlinterf_ds.results import paper
from mlinterf_ds.results.findings import difference, mean_effect
from mlinterf_ds.results.forms import Cell, Rows, Table
from mlinterf_ds.results.records import Records, TaskScore
from mlinterf_ds.tasks import TASKS

NAMES = {
    "mono": "Mono", "joint": "JointPair", "xlm": "XLM", "unseen": "never saw it", "majority": "majority", "lexical": "lexical",
    "meta_adpt-direct": "meta adpt, direct term only", "adpt-compute": "adpt, compute-matched",
    "adpt-batch": "adpt, as many rows a step", "adpt-rows": "adpt, the same rows a step", "meta_adpt-held_out": "meta adpt, validation rows of a split",
    "mono-text": "Mono, half the steps", "mono-vocabulary": "Mono, own vocabulary",
}  # fmt: skip
PAPERS_TASKS = ("ner", "pos", "qa", "nli")
SIGNIFICANT = 0.05
SYNTHETIC = "syn"  # the names of synthetic languages start so
VOCABULARY = "one vocabulary for the study (the paper learns one for each model), so that perplexities compare"
DEPARTURES = [
    "adapters with GELU, unless a recipe says otherwise; routed ffn and attn share their norms",
    VOCABULARY,
    "paper's numbers in brackets: its models, data and sizes are not ours; its average is over the languages shown, of which "
    "it must have every one, but beside synthetic languages over its own",
]


def all_tables(records: Records) -> list[Table]:
    """Tables 1 to 7, and one for each task that the paper does not have; those for which a study has nothing are left out."""
    tables = [
        corpora(records),
        main_table(records, 2, "NER and POS", [("ner", "f1"), ("pos", "f1")]),
        main_table(records, 3, "QA (F1)", [("qa", "f1")]),
        triples(records),
        sizes(records),
        main_table(records, 6, "NLI, zero-shot (accuracy)", [("nli", "accuracy")], [paper.ZERO_SHOT]),
        main_table(records, 7, "QA in full (F1 and EM)", [("qa", "f1"), ("qa", "em")]),
    ]
    metrics = {score.task: score.metric for score in records.scores}
    others = {task: title for task, title in titles(records).items() if task not in PAPERS_TASKS}
    for number, (task, title) in enumerate(others.items(), len(tables) + 1):
        tables.append(main_table(records, number, title, [(task, metrics[task])]))
    tables.append(null_controls(records, len(tables) + 1))
    for table in tables:
        table.notes += records.departures
    return [table for table in tables if not table.empty]


def titles(records: Records) -> dict[str, str]:
    """Task -> its title, such as "NER (F1)", of every task that was scored: the paper's first, in its order."""
    metrics = {score.task: score.metric for score in records.scores}
    order = sorted(metrics, key=lambda task: (list(TASKS).index(task) if task in TASKS else len(TASKS), task))
    return {task: f"{task.upper()} ({metrics[task].replace('f1', 'F1')})" for task in order}


# --- cells -------------------------------------------------------------------------------------------------------------
def significance(left: Sequence[Sequence[TaskScore]], right: Sequence[Sequence[TaskScore]]) -> str:
    """† where two rows differ; '' also where two common seeds or the counts of each example are missing."""
    parts = [difference(ours, theirs, ("ours", "theirs")) for ours, theirs in zip(left, right, strict=True)]
    if not parts or not all(len(part.per_seed) > 1 for part in parts):
        return ""
    effect, unsampled = mean_effect(parts, 1 - SIGNIFICANT)
    told = not unsampled and len(effect.values) > 1 and effect.p(abs(effect.mean)) < SIGNIFICANT
    return "†" if told else ""


def _cell(scores: Sequence[TaskScore], of_paper: float | None, rival: Sequence[TaskScore] | None = None) -> Cell:
    """One language's scores, marked where they differ from the rival's."""
    mark = "" if rival is None else significance([scores], [rival])
    return Cell(tuple(score.score for score in scores), of_paper, mark=mark)


def marked(other: str) -> str:
    """The note on what bold type and † mean. other: what rows are compared with; '' where nothing is."""
    differs = f"† differs from {other} (paired, over two or more seeds and the test examples, p < {SIGNIFICANT:g}); "
    return (
        f"{differs * bool(other)}↓ below the lexical baseline, which looks up each word's commonest label; bold: best"
    )


def _floors(scores: Sequence[Sequence[TaskScore]]) -> Rows:
    """The rows of guessing and of looking words up, a column for each of these scores."""
    floors = {name: [getattr(of[0], name) if of else None for of in scores] for name in ("majority", "lexical")}
    return [(name, [Cell(() if value is None else (value,)) for value in values]) for name, values in floors.items()]


def _with_best(rows: Rows) -> Rows:
    """Marks the best of each column, and what is below the lexical baseline.

    Floors don't compete, and where all are equal none is best.
    """
    lexical = next((cells for name, cells in rows if name == "lexical"), [])
    rivals = [cells for name, cells in rows if name not in ("majority", "lexical", NAMES["unseen"])]
    for column in range(len(rows[0][1]) if rows else 0):
        floor = lexical[column].mean if lexical else None
        for cells in rivals:
            mean = cells[column].mean
            if floor is not None and mean is not None and mean < floor:
                cells[column] = replace(cells[column], mark=cells[column].mark + "↓")
        means = [cells[column].mean for cells in rivals]
        known = [mean for mean in means if mean is not None]
        for cells, mean in zip(rivals, means, strict=True):
            if len(set(known)) > 1 and mean == max(known):
                cells[column] = replace(cells[column], best=True)
    return rows


# --- table 1 -----------------------------------------------------------------------------------------------------------
def corpora(records: Records) -> Table:
    """The training text of each language, and the tasks that have test data in it."""
    tasks = list(titles(records))
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


# --- tables 2, 3, 6, 7 -------------------------------------------------------------------------------------------------
def main_table(
    records: Records, number: int, title: str, measures: Sequence[tuple[str, str]],
    settings: Sequence[str] = (paper.WITHIN, paper.ZERO_SHOT),
) -> Table:  # fmt: skip
    """Rows are models, columns the target languages and their average for each (task, metric)."""
    tested = {(score.task, score.language) for score in records.scores}
    head: list[str] = []
    # task, metric, a language or "avg", the languages that are averaged
    columns: list[tuple[str, str, str, list[str]]] = []
    for task, metric in measures:
        if languages := [code for code in records.targets if (task, code) in tested]:
            label = f"{task.upper()} {metric.upper()} " if len(measures) > 1 else ""
            head += [f"{label}{code}" for code in [*languages, "avg"]]
            columns += [(task, metric, code, [code]) for code in languages]
            columns.append((task, metric, "avg", languages))
    table = Table(number, title, head, notes=[*DEPARTURES])
    for setting in settings:
        rows = []
        for row in rows_of(records, setting):
            cells = [_average(records, row, setting, *column) for column in columns]
            if any(cell.values for cell in cells):
                rows.append((NAMES.get(row, f"+ {row.replace('_', ' ')}"), cells))
        table.blocks.append((f"{setting}{' language' if setting == paper.WITHIN else ''}", _with_best(rows)))
    no_mark = "; EM has no mark: counts of each example are of the F1" if ("qa", "em") in measures else ""
    has_joint = any(score.kind == "pair" and score.variant == "joint" for score in records.scores)
    table.notes.append(marked(NAMES["joint"] if has_joint else "") + no_mark)
    shown = {column[:3] for column in columns}
    table.notes += [
        f"{'/'.join(key[2:])}: {why}" for key, why in paper.MISPRINTS.items() if (*key[:2], key[4]) in shown
    ]
    if any(score.kind == "many" for score in records.scores):
        table.notes.append("XLM: ours is joint training over all languages of the study, at the larger size")
    return table


def rows_of(records: Records, setting: str) -> list[str]:
    """Names of the rows that there are scores for: the paper's, then controls, then floors."""
    pairs = [score for score in records.scores if score.kind == "pair"]
    present = dict.fromkeys(score.variant + (f"-{score.control}" if score.control else "") for score in pairs)
    known = [row for row in paper.ROWS if row in present or row == "xlm" or (row == "mono" and setting == paper.WITHIN)]
    controls = {score.control for score in records.scores if score.kind == "mono"}
    if setting == paper.WITHIN and "mono" in known:
        after = known.index("mono") + 1
        known[after:after] = [f"mono-{control}" for control in ("text", "vocabulary") if control in controls]
    others = [row for row in present if row not in known and not row.endswith("freeze")]
    return known + others + (["unseen"] if setting == paper.ZERO_SHOT else []) + ["majority", "lexical"]


def _average(records: Records, row: str, setting: str, task: str, metric: str, name: str, languages: list[str]) -> Cell:
    """The mean over some languages at the seeds that all of them have."""
    targets = records.targets
    is_floor = row in ("majority", "lexical")  # these are of the test set, so that any row has them
    scores, joint = (
        [_first(records, rows, setting, task, code, targets[code]) for code in languages]
        for rows in (["joint", *rows_of(records, setting)[:-2]] if is_floor else [row], ["joint"])
    )
    of_paper = _of_paper((task, metric, setting, row), name, languages)
    if not all(scores):
        return Cell(paper=of_paper)
    main = metric == scores[0][0].metric
    if is_floor:
        floors = [getattr(of_language[0], row) for of_language in scores]
        return Cell((statistics.fmean(floors),) if main and None not in floors else ())
    seeds = set.intersection(*({score.seed for score in of_language} for of_language in scores))
    values = [
        [score.score if main else score.others[metric] for score in of_language if score.seed in seeds]
        for of_language in scores
    ]
    means = tuple(statistics.fmean(of_seed) for of_seed in zip(*values, strict=True))
    return Cell(means, of_paper, mark=significance(scores, joint) if row != "joint" and main else "")


def _first(records: Records, rows: Sequence[str], *cell: str) -> list[TaskScore]:
    """The scores of the first of these rows that has any."""
    return next(filter(None, (records.pick(row, *cell) for row in rows)), [])


def _of_paper(key: tuple[str, str, str, str], name: str, languages: Sequence[str]) -> float | None:
    """The paper's number. An average is over these languages, None if the paper lacks one; its own beside synthetic ones."""
    if name != "avg" or all(code.startswith(SYNTHETIC) for code in languages):
        return paper.SCORES.get((*key, name))
    numbers = [paper.SCORES.get((*key, code)) for code in languages]
    known = [number for number in numbers if number is not None]
    return statistics.fmean(known) if len(known) == len(numbers) else None


# --- tables 4 and 5 ----------------------------------------------------------------------------------------------------
def triples(records: Records) -> Table:
    """Pairs against the same pairs with a third language."""
    sets = {score.set: score.languages for score in records.scores if score.kind == "triple"}
    tested, targets = {task for task, _, _ in records.groups("triple")}, records.targets
    columns = [
        (task, codes[1], name)
        for task in ("ner", "pos")
        for name, codes in sets.items()
        if task in tested and codes[1] in targets
    ]
    table = Table(4, "A third, similar language", [f"{task.upper()} {code}" for task, code, _ in columns])
    for setting in (paper.WITHIN, paper.ZERO_SHOT):
        pairs, threes, scores = [], [], []
        for task, code, name in columns:
            pair = records.pick("joint", setting, task, code, targets[code])
            triple = records.pick("triple", setting, task, code, name)
            index = {"hi": 0, "te": 1}.get(code)
            known = paper.TRILINGUAL[task, setting]
            of_pair, of_triple = (None if index is None else known[kind][index] for kind in ("pair", "triple"))
            scores.append(pair or triple)
            pairs.append(_cell(pair, of_pair))
            threes.append(_cell(triple, of_triple, pair))
        table.blocks.append((setting, _with_best([("JointPair", pairs), ("JointTri", threes), *_floors(scores)])))
    table.notes = [*DEPARTURES, marked("JointPair"), *(f"{name}: {', '.join(codes)}" for name, codes in sets.items())]
    return table


def sizes(records: Records) -> Table:
    """Full and subsampled partners: on the partner itself, and on the source."""
    sets = {score.set: score.languages for score in records.scores if score.kind == "low"}
    tested, targets = {task for task, _, _ in records.groups("low")}, records.targets
    columns = [
        (task, codes[1], name, low)
        for task in titles(records)
        for name, codes in sets.items()
        if task in tested and codes[1] in targets
        for low in (False, True)
    ]
    table = Table(5, "Corpus size", [f"{task.upper()} {code}{' (low)' * low}" for task, code, _, low in columns])
    mono, joint, source = [], [], []
    on_partner: list[Sequence[TaskScore]] = []
    on_the_source: list[Sequence[TaskScore]] = []
    for task, code, name, low in columns:
        index = {"fr": 0, "ru": 2}.get(code)
        known = {} if index is None else paper.CORPUS_SIZE.get((task, "f1"), {})
        of_paper = {row: numbers[index + low] for row, numbers in known.items() if index is not None}
        row, group = ("low", name) if low else ("joint", targets[code])
        alone = records.pick("mono-low" if low else "mono", paper.WITHIN, task, code)
        mono.append(_cell(alone, of_paper.get("mono")))
        together = records.pick(row, paper.WITHIN, task, code, group)
        joint.append(_cell(together, of_paper.get("joint"), alone))
        on_partner.append(alone or together)
        on_the_source.append(records.pick(row, paper.WITHIN, task, records.source, group))
        source.append(_cell(on_the_source[-1], of_paper.get("source")))
    partner: Rows = [(NAMES["mono"], mono), (NAMES["joint"], joint), *_floors(on_partner)]
    table.blocks = [
        ("on the partner", _with_best(partner)),
        (f"on {records.source}", _with_best([(NAMES["joint"], source), *_floors(on_the_source)])),
    ]
    table.notes = [*DEPARTURES, marked(NAMES["mono"])]
    table.notes += [
        f"low: {records.low_resource.get(codes[1], name).replace('@', ' with ')} training sentences, with {codes[0]}"
        for name, codes in sets.items()
    ]
    return table


# --- beyond the paper --------------------------------------------------------------------------------------------------
def null_controls(records: Records, number: int) -> Table:
    """Interference between the halves of each null control's language: there is none, so chance alone sets intervals off 0."""
    rows: Rows = []
    with_zero: list[bool] = []  # of each known interval
    for analysis in (a for a in records.analyses if a.analysis == "interference-null"):
        for row in analysis.facts["comparisons"]:
            low, high = row["interval"]
            is_known = low is not None and high is not None
            with_zero += [low <= 0 <= high] if is_known else []
            numbers = [f"{row[name]:.3f}" for name in ("mono", "joint", "interference")]
            interval = f"[{low:.3f}, {high:.3f}]" if is_known else "unknown"
            cells = [Cell(text=text) for text in (row["metric"], *numbers, interval, str(len(row["seeds"])))]
            rows.append((f"{row['language']} in {analysis.set}", cells))
    head = ["metric", "mono", "joint", "interference", "95% interval", "seeds"]
    note = f"{sum(with_zero)} of {len(with_zero)} intervals include 0, as 95% should: two halves of one language cannot interfere"
    return Table(number, "Null controls: one language split in two", head, [("", rows)] if rows else [], [note])
