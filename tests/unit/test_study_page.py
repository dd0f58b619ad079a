"""The report page in a real browser: no request, no error on its console, tables that sort; and what it says without one."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mlinterf_ds.config import load_config
from mlinterf_ds.report.figures import perplexity_curves
from mlinterf_ds.study.claims import all_findings
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.study.page import render
from mlinterf_ds.study.tables import all_tables
from tests.study_records import planted

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--no-first-run", "--disable-sync", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000"]
ADDRESSES = {"src", "href", "action", "data", "poster", "srcset"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    perplexity_curves({"हिन्दी": [(0, 90.0), (10, 20.0)]}, folder / "figure.png", title="a figure")
    records = planted(seeds=3)
    records.analyses[0] = replace(records.analyses[0], figures=[str(folder / "figure.png"), str(folder / "gone.png")])
    states = [
        ("pretrain.a", "finished", ""),
        ("pretrain.b", "failed", "UserError: <b>bad & sad</b>"),
        ("finetune.b", "blocked", "needs"),
    ]
    records.status = [
        {"job": job, "kind": "pretrain", "state": state, "reason": reason, "seconds": 1.0, "folder": "f"}
        for job, state, reason in states
    ]
    config = load_config(["study_cpu"], [], StudyConfig)
    html = render(config, records, all_tables(records), all_findings(records), {"git_commit": "abc"})
    (folder / "report.html").write_text(html, encoding="utf-8")
    return folder / "report.html"


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
    assert "&lt;b&gt;bad &amp; sad&lt;/b&gt;" in text and "<b>bad" not in text
    assert text.count("<figure>") == 1 and "1/3" in text
    assert "syn-far" in text and text.count('<details class="card">') == 4  # three languages and the jobs


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    """Clicking a head sorts its column; nothing is logged as an error and no request is blocked."""
    probe = """<script>
    const head = [...document.querySelectorAll("table.scores")].map((t) => t.querySelectorAll("thead th")[1]).find((h) => h.closest("table").tBodies.length > 1);
    head.querySelector("button").click();
    const rows = [...head.closest("table").tBodies[0].rows].filter((r) => !r.classList.contains("block"));
    document.body.dataset.sorted = JSON.stringify(rows.map((r) => r.cells[1].dataset.value));
    document.body.dataset.wide = document.documentElement.scrollWidth;
    console.log("the probe ran");
    </script></body>"""
    copy = tmp_path / "probe.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    words = [
        str(CHROMIUM),
        *FLAGS,
        "--window-size=500,900",
        f"--user-data-dir={tmp_path}/profile",
        "--dump-dom",
        f"file://{copy}",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(said) == 1 and "the probe ran" in said[0], said
    found = re.search(r'data-sorted="([^"]*)"', done.stdout)
    assert found
    values = [float(v) if v else -1.0 for v in re.findall(r"&quot;([\\d.]*)&quot;".replace("\\\\", "\\"), found[1])]
    assert len(values) > 5 and values == sorted(values, reverse=True)
    wide = re.search(r'data-wide="(\d+)"', done.stdout)
    assert wide and int(wide[1]) <= 500  # tables scroll inside their frames, the page does not
