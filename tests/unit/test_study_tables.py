"""The paper's tables from planted records, and the paper's own numbers."""

from __future__ import annotations

import csv
import io
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from mlinterf_ds.errors import UserError
from mlinterf_ds.results import forms, paper
from mlinterf_ds.results.forms import Cell, Table
from mlinterf_ds.results.records import AnalysisSummary, Records
from mlinterf_ds.results.runs import read_counts
from mlinterf_ds.results.tables import all_tables, null_controls
from tests.study_records import LEXICAL, MAJORITY, planted


def rows(table: Table) -> dict[tuple[str, str, str], dict[str, str]]:
    """(block, row, column) -> the CSV's line."""
    return {(r["block"], r["row"], r["column"]): r for r in csv.DictReader(io.StringIO(forms.comma_separated(table)))}


# --- the paper's numbers -----------------------------------------------------------------------------------------------
def test_the_papers_averages_are_the_means_of_its_rows() -> None:
    """A slip in copying a number would show."""
    checked = 0
    for (task, metric, setting, row, language), value in paper.SCORES.items():
        if language == "avg":
            cells = [
                v for key, v in paper.SCORES.items() if key[:4] == (task, metric, setting, row) and key[4] != "avg"
            ]
            whole = len(cells) == {"ner": 6, "pos": 5, "qa": 4, "nli": 5}[task]
            if whole:
                assert statistics.fmean(cells) == pytest.approx(value, abs=0.06), (task, metric, setting, row)
                checked += 1
    assert checked == 15 + 15 + (30 - 3) + 7  # all but the rows with a misprint


@pytest.mark.parametrize(
    "key, value",
    [
        (("ner", "f1", "within", "mono", "ar"), 89.2),
        (("ner", "f1", "zero-shot", "ffn", "ru"), 5.8),
        (("pos", "f1", "zero-shot", "xlm", "te"), 76.9),
        (("pos", "f1", "within", "meta_adpt", "avg"), 90.3),
        (("qa", "em", "within", "xlm", "sw"), 40.4),
        (("qa", "f1", "zero-shot", "meta_adpt", "te"), 23.1),
        (("nli", "accuracy", "zero-shot", "share_adpt", "ru"), 70.0),
    ],
)
def test_the_papers_numbers_at_their_places(key: tuple[str, ...], value: float) -> None:
    assert paper.SCORES[key] == value  # type: ignore[index]


def test_misprints_are_not_shown() -> None:
    assert not paper.MISPRINTS.keys() & paper.SCORES.keys()


# --- ours --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def records() -> Records:
    found = planted(seeds=3)
    found.sizes = {"syn": {"sentences": 1000, "tokens": 9000}, "syn-far@400": {"sentences": 400, "tokens": 3600}}
    return found


@pytest.fixture(scope="module")
def tables(records: Records) -> dict[int, Table]:
    return {table.number: table for table in all_tables(records)}


def test_only_tables_with_numbers_are_made(tables: dict[int, Table]) -> None:
    assert list(tables) == [1, 2, 4, 5]  # POS alone was planted: no QA, no NLI
    assert all_tables(Records(source="en")) == []


def test_means_deviations_and_the_papers_average(records: Records, tables: dict[int, Table]) -> None:
    found = rows(tables[2])
    values = [
        s.score
        for s in records.scores
        if (s.variant, s.set, s.train, s.language, s.control) == ("ffn", "far", "syn", "syn-far", "")
    ]
    line = found["zero-shot", "+ ffn", "POS F1 syn-far"]
    assert len(values) == 3 == int(line["seeds"])
    assert float(line["mean"]) == pytest.approx(statistics.fmean(values), abs=1e-4)
    assert float(line["std"]) == pytest.approx(statistics.stdev(values), abs=1e-4)
    average = found["within language", "Mono", "POS F1 avg"]
    assert float(average["paper"]) == 91.4 and float(average["mean"]) == pytest.approx(83, abs=0.3)
    assert ("within language", "never saw it", "POS F1 avg") not in found


@pytest.mark.parametrize(
    "names, wanted",
    [({"syn-close": "hi", "syn-far": "te"}, (97.0 + 94.5) / 2), ({"syn-close": "hi", "syn-far": "sw"}, None)],
)
def test_the_papers_average_is_over_the_languages_shown(names: dict[str, str], wanted: float | None) -> None:
    """Of POS it has hi and te, but not sw."""
    text = json.dumps(asdict(planted(seeds=1)))
    for ours, real in names.items():
        text = text.replace(f'"{ours}"', f'"{real}"')
    records = TypeAdapter(Records).validate_json(text)
    (table,) = [table for table in all_tables(records) if table.number == 2]
    found = rows(table)["within language", "Mono", "POS F1 avg"]["paper"]
    assert (float(found) if found else None) == wanted


def test_where_all_are_equal_none_is_bold() -> None:
    records = planted(seeds=1)
    records.scores = [replace(s, score=0.0) for s in records.scores]
    (table,) = [t for t in all_tables(records) if t.number == 2]
    assert not [line for line in rows(table).values() if line["best"] == "1"]


def test_the_best_is_bold_and_floors_are_not(tables: dict[int, Table]) -> None:
    best = {key for key, line in rows(tables[2]).items() if line["best"] == "1"}
    assert ("zero-shot", "+ meta adpt", "POS F1 syn-close") in best and (
        "within language",
        "XLM",
        "POS F1 syn-far",
    ) in best
    assert len([key for key in best if key[::2] == ("zero-shot", "POS F1 syn-close")]) == 1
    text = forms.markdown(tables[2])
    assert "**76." in text and "| majority | 10.0 | 10.0 | 10.0 |" in text
    assert "| lexical | 55.0 | 55.0 | 55.0 |" in text
    below = {key[1] for key, line in rows(tables[2]).items() if line["mark"] == "↓" and key[0] == "zero-shot"}
    assert below == {"+ ffn", "+ attn"}, "a model that looks nothing up is worse than a dictionary"
    for number in (4, 5):
        assert {"majority", "lexical"} <= {row for _, row, _ in rows(tables[number])}


def test_a_task_that_the_paper_does_not_have_gets_a_table(records: Records) -> None:
    topics = [replace(s, task="topic", metric="accuracy") for s in records.scores]
    made = {table.number: table for table in all_tables(replace(records, scores=[*records.scores, *topics]))}
    assert (
        list(made) == [1, 2, 4, 5, 8] and made[8].title == "TOPIC (accuracy)" and made[1].head[-2:] == ["POS", "TOPIC"]
    )
    assert (
        rows(made[8])["zero-shot", "+ ffn", "avg"]["mean"] == rows(made[2])["zero-shot", "+ ffn", "POS F1 avg"]["mean"]
    )


def test_tables_4_and_5(tables: dict[int, Table]) -> None:
    third, size = rows(tables[4]), rows(tables[5])
    assert float(third["zero-shot", "JointTri", "POS syn-far"]["mean"]) == pytest.approx(75, abs=0.3)
    assert float(third["zero-shot", "JointPair", "POS syn-far"]["mean"]) == pytest.approx(70, abs=0.3)
    assert float(size["on the partner", "Mono", "POS syn-far (low)"]["mean"]) == pytest.approx(55, abs=0.3)
    assert float(size["on the partner", "JointPair", "POS syn-far (low)"]["mean"]) == pytest.approx(60, abs=0.3)
    assert float(size["on syn", "JointPair", "POS syn-far"]["mean"]) == pytest.approx(76, abs=0.3)


def test_significance_from_counts_of_examples(records: Records, tmp_path: Path) -> None:
    """500 examples, 70% right; +attn makes 60 of the wrong ones right, +ffn exchanges 10 for 10: only attn differs."""
    wrong = np.arange(0, 150)
    with_counts = []
    for s in records.scores:
        right = np.ones(500)
        right[wrong] = 0
        if s.variant == "attn":
            right[:60] = 1
        if s.variant == "ffn":
            right[:10], right[200:210] = 1, 0
        path = tmp_path / f"{s.variant}.csv"
        if not path.exists():
            counts = np.stack([right, np.ones(500), np.ones(500)], 1)
            np.savetxt(path, counts, delimiter=",", header="r,p,g", comments="", fmt="%g")
        with_counts.append(replace(s, counts=[str(path)], score=100 * float(right.mean())))
    tables = all_tables(replace(records, scores=with_counts))
    table, found = tables[1], {t.number: t for t in tables}
    third, size = rows(found[4]), rows(found[5])
    assert {line["mark"] for line in [*third.values(), *size.values()]} == {""}  # all joint: the same counts
    better = [
        replace(s, counts=[str(tmp_path / "attn.csv")], score=82.0) if s.kind in ("triple", "mono") else s
        for s in with_counts
    ]
    found = {t.number: t for t in all_tables(replace(records, scores=better))}
    third, size = rows(found[4]), rows(found[5])
    assert third["zero-shot", "JointTri", "POS syn-far"]["mark"] == "†"
    assert size["on the partner", "JointPair", "POS syn-far (low)"]["mark"] == "†"
    assert size["on the partner", "Mono", "POS syn-far (low)"]["best"] == "1"
    assert not size["on syn", "JointPair", "POS syn-far"]["mark"]
    marks = {key[1]: line["mark"] for key, line in rows(table).items() if key[::2] == ("zero-shot", "POS F1 avg")}
    assert (marks["+ attn"], marks["+ ffn"], marks["JointPair"]) == ("†", "", "")


def test_latex_is_balanced_and_escaped(tables: dict[int, Table]) -> None:
    text = forms.latex(tables[2])
    assert text.count("{") == text.count("}") and "±" not in text and "†" not in text
    widths = {line.count("&") for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line}
    assert widths == {len(tables[2].head)}
    assert r"\textbf{76." in text


def test_latex_escapes_every_special_character() -> None:
    text = forms.latex(Table(9, r"a<b>c{d}$^~\%&#_", ["x"], [("", [("±†✓", [Cell((1.0,), best=True, mark="†")])])]))
    assert r"a$<$b$>$c\{d\}\$\textasciicircum{}\textasciitilde{}\textbackslash{}\%\&\#\_" in text
    assert r"$\pm$$^\dagger$$\checkmark$ & \textbf{1.0$^\dagger$}" in text


def test_departures_stand_under_every_table(records: Records) -> None:
    said = all_tables(replace(records, departures=["text is small"]))
    assert [table.number for table in said if "text is small" in table.notes] == [1, 2, 4, 5]
    assert all(any("one vocabulary" in note for note in table.notes) for table in said)


def test_damaged_counts_are_named(records: Records, tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    for text in ("r,p,g\n1,x,1\n", "r,p\n1,1\n"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"counts\.csv: damaged"):
            read_counts([path])
    assert read_counts([tmp_path / "gone"]) is None


def test_records_survive_the_disk(records: Records, tmp_path: Path) -> None:
    records.save(tmp_path / "records.json")
    again = Records.load(tmp_path / "records.json")
    assert again.scores == records.scores and forms.markdown(all_tables(again)[1]) == forms.markdown(
        all_tables(records)[1]
    )
    (tmp_path / "records.json").write_text('{"scores": [{}]}')
    with pytest.raises(UserError, match="not a study's records"):
        Records.load(tmp_path / "records.json")


def test_a_study_without_joint_models_has_its_floors_and_promises_no_mark() -> None:
    records = planted()
    records.scores = [s for s in records.scores if s.variant in ("adpt", "meta_adpt")]
    table = next(table for table in all_tables(records) if table.number == 2)
    rows = {name: cells for _, block in table.blocks for name, cells in block}
    assert rows["lexical"][0].mean == LEXICAL and rows["majority"][0].mean == MAJORITY
    assert not any("†" in note for note in table.notes) and any("↓ below" in note for note in table.notes)


def test_null_controls_are_counted() -> None:
    """A row for each half of each language; the note counts the intervals that include 0."""
    records = planted()
    row = {"metric": "bits per character", "mono": 2.0, "joint": 2.01, "seeds": [0, 1, 2]}
    intervals = {"syn": [-0.01, 0.03], "syn-b": [0.004, 0.016], "syn-mid": [None, None]}
    facts = {
        "comparisons": [row | {"language": code, "interference": 0.01, "interval": i} for code, i in intervals.items()]
    }
    assert null_controls(records, 8).empty
    records.analyses.append(
        AnalysisSummary("first", ["syn", "syn-b"], "all", 0, analysis="interference-null", facts=facts, figures=[])
    )
    table = null_controls(records, 8)
    assert "1 of 2 intervals include 0" in table.notes[0]
    shown = {name: [cell.ours for cell in cells] for name, cells in table.blocks[0][1]}
    assert shown["syn-b in first"] == ["bits per character", "2.000", "2.010", "0.010", "[0.004, 0.016]", "3"]
    assert shown["syn-mid in first"][4] == "unknown"
