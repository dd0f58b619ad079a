"""The report page in a real browser: no request, no error on its console, tables that sort; and what it says without one."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mlinterf_ds.config import load_config
from mlinterf_ds.plots.curves import perplexity_curves
from mlinterf_ds.results.claims import all_findings
from mlinterf_ds.results.forms import Cell
from mlinterf_ds.results.tables import all_tables
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.study.page import figures, render, sortable
from mlinterf_ds.study.report import convergence
from tests.browser import CHROMIUM, browser
from tests.study_records import planted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SORTED = """(() => {
    const heads = [...document.querySelectorAll("table.scores")].map((t) => t.querySelectorAll("thead th")[1]);
    const head = heads.find((h) => h.closest("table").tBodies.length > 1);
    head.querySelector("button").click();
    const rows = [...head.closest("table").tBodies[0].rows].filter((r) => !r.classList.contains("block"));
    return rows.map((r) => Number(r.cells[1].dataset.value || -1));
})()"""
ADDRESSES = {"src", "href", "action", "data", "poster", "srcset"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    perplexity_curves({"हिन्दी": [(0, 90.0), (10, 20.0)]}, folder / "figure.png", title="a figure")
    records = planted(seeds=3)
    records.analyses[0] = replace(records.analyses[0], figures=[str(folder / "figure.png"), str(folder / "gone.png")])
    states = [
        ("pretrain.a", "finished", ""),
        ("pretrain.b", "failed", "UserError: /home/me/data/en.txt: <b>bad & sad</b>"),
        ("finetune.b", "blocked", "needs"),
    ]
    records.status = [
        {"job": job, "kind": "pretrain", "state": state, "reason": reason, "seconds": 1.0, "folder": "f"}
        for job, state, reason in states
    ]
    config = load_config(StudyConfig, ["study_cpu"])
    html = render(config, records, all_tables(records), all_findings(records), {"git_commit": "abc", "torch": "2"})
    (folder / "report.html").write_text(html, encoding="utf-8")
    return folder / "report.html"


def test_captions_say_whose_figure_it_is(tmp_path: Path) -> None:
    """A model's analysis names it; one of the whole study is not of a seed."""
    records = planted(seeds=1)
    perplexity_curves({"syn": [(0, 9.0), (1, 8.0)]}, tmp_path / "bars-ner-f1.png", title="a figure")
    drawn = [str(tmp_path / "bars-ner-f1.png")]
    whole = {"set": "all", "variant": "all", "analysis": "interference"}
    records.analyses = [
        replace(records.analyses[0], figures=drawn),
        replace(records.analyses[0], **whole, figures=drawn),
    ]
    null = {"set": "b", "variant": "all", "languages": ["syn", "syn-b"], "analysis": "interference-null"}
    records.analyses.append(replace(records.analyses[0], **null))
    captions = {heading: [caption for caption, _ in shown] for heading, shown in figures(records)}
    assert captions == {
        "Interference": ["Scores of monolingual, joint and larger models, ner f1"],
        "Gradient conflict": ["Scores of monolingual, joint and larger models, ner f1: joint on syn, syn-far, seed 0"],
        "Null control: two halves of one language": [
            "Scores of monolingual, joint and larger models, ner f1: syn, syn-b"
        ],
    }


def test_figures_of_the_first_seed_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds need not come in order; a figure that is too large is named, not dropped."""
    records = planted(seeds=2)
    file = tmp_path / "bars.png"
    file.write_bytes(b"png")
    records.analyses = [replace(records.analyses[0], seed=seed, figures=[str(file)]) for seed in (3, 1)]
    ((_, shown),) = figures(records)
    words = "Scores of monolingual, joint and larger models"
    assert [caption for caption, image in shown if image] == [f"{words}: joint on syn, syn-far, seed 3"]
    monkeypatch.setattr("mlinterf_ds.study.page.LARGEST", 2)
    ((_, shown),) = figures(records)
    ((caption, image),) = shown
    assert not image and caption.endswith("seed 3 (bars.png has 0 kB, too much for this page)"), "no local path"


def test_cells_of_text_are_sorted_too() -> None:
    assert [sortable(cell) for cell in (Cell(text="12,345"), Cell((2.0,)), Cell())] == ["12345", "2.000000", ""]


def test_convergence_is_drawn_over_the_seeds_of_both(tmp_path: Path) -> None:
    records = planted(seeds=3)
    records.models = [m for m in records.models if (m.variant, m.set, m.seed) != ("adpt", "far", 0)]
    (drawn,) = convergence(records, tmp_path)
    assert [Path(path).name for path in drawn.figures] == ["convergence-close.png", "convergence-far.png"]
    assert all(Path(path).stat().st_size > 5000 for path in drawn.figures)
    records.analyses = [drawn]
    ((heading, shown),) = figures(records)
    assert "Convergence" in heading and [caption.split(", ")[-1] for caption, _ in shown] == ["close", "far"]
    records.models = [m for m in records.models if m.variant != "meta_adpt"]
    assert convergence(records, tmp_path) == []


def test_convergence_leaves_out_the_untrained_model_and_what_is_not_finite(tmp_path: Path, drawn: list[Figure]) -> None:
    records = planted(seeds=1)
    history = [(0, 9.0), (5, 4.0), (10, math.inf), (15, 2.0)]
    records.models = [replace(model, history=dict.fromkeys(model.languages, history)) for model in records.models]
    convergence(records, tmp_path)
    lines = (tmp_path / "convergence-far.csv").read_text().splitlines()
    assert lines[1:3] == ['syn,"adpt, 1 seed",0,5,4.0', 'syn,"adpt, 1 seed",0,15,2.0'] and len(lines) == 9


class Addresses(HTMLParser):
    """Everything that a browser might fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attributes if name in ADDRESSES]


def test_nothing_is_fetched(page: Path) -> None:
    text, parser = page.read_text(encoding="utf-8"), Addresses()
    parser.feed(text)
    assert parser.found and all(address.startswith(("#", "data:")) for address in parser.found)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text


def test_it_says_what_was_found_and_what_was_lost(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count('class="claim"') == len(all_findings(planted(seeds=3)))
    assert "…/en.txt: &lt;b&gt;bad &amp; sad&lt;/b&gt;" in text and "/home/me" not in text and "<b>bad" not in text
    assert text.count("<figure>") == 1 and "1/3" in text
    missing = sum(finding.verdict == "not measured" for finding in all_findings(planted(seeds=3)))
    assert (
        text.count('class="verdict not-measured"') == missing > 5 and f'<b class="not-measured">{missing}</b>' in text
    )
    order = re.findall(r'<span class="verdict ([a-z-]+)">', text[: text.index('id="tables"')])
    assert order == sorted(order, key=["holds", "fails", "undecided", "not-measured"].index)
    assert text.index(f"{missing} claims are not measured") < text.index('class="verdict not-measured"')
    claims = text[text.index('id="findings"') : text.index('id="tables"')]
    assert (
        claims.count("majority 10.0, lexical 55.0") > 15 and "below the lexical baseline: ffn, never saw it" in claims
    )
    assert text.index("torch") > text.index('id="software"') > text.index('id="jobs"'), "versions stand at the end"
    assert str(page.parent) not in text
    assert "syn-far" in text and text.count('<details class="card">') == 4  # three languages and the jobs


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    """Nothing is asked for but the page, nothing goes wrong, a head's click sorts its column, light differs from dark."""
    with browser(tmp_path / "profile") as found:
        found.window(400, 900)
        found.open(f"file://{page}")
        values = found.run(SORTED)
        assert len(values) > 5 and values == sorted(values, reverse=True)
        assert found.run("document.documentElement.scrollWidth") <= 400  # tables scroll in their frames, not the page
        assert found.run("[...document.querySelectorAll('figure img')].every((i) => i.naturalWidth > 0)")
        small = found.run("document.querySelector('figure img').clientWidth")
        found.run("document.querySelector('figure button').click()")
        assert found.run("document.querySelector('dialog img').clientWidth") > 1.5 * small, "it enlarges"
        found.run("document.querySelector('dialog').click()")
        assert not found.run("document.querySelector('dialog').open")
        grounds, figures_of = [], []
        for dark in (False, True):
            found.window(1200, 900, dark)
            found.picture(tmp_path / f"{'dark' if dark else 'light'}.png", whole=True)
            grounds.append(found.run("getComputedStyle(document.body).backgroundColor"))
            figures_of.append(found.run("getComputedStyle(document.querySelector('figure img')).filter"))
        assert grounds[0] != grounds[1] and figures_of[0] == "none" != figures_of[1]
        assert not found.errors
        assert {place for place in found.requests if not place.startswith("data:")} == {f"file://{page}"}
