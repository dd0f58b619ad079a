"""Our runs in MLflow's own browser: a real server, a real Chromium, and names as the recipes give them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlinterf_ds.plots.curves import perplexity_curves
from mlinterf_ds.tracking import Tracker
from tests.browser import CHROMIUM, Browser, browser
from tests.mlflow_server import free_port, mlflow_server

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium"), pytest.mark.timeout(500)]
STUDY, JOINT, ADPT, TASK = "study_x", "joint.close.seed0", "adpt.close.seed0", "pos-syn.joint.close.seed0"
Addresses = dict[str, str]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    """The address of each run, as the tracker prints it: a study, two models nested in it, a fine-tuning."""
    folder, patch, before = tmp_path_factory.mktemp("browser"), pytest.MonkeyPatch(), Path.cwd()
    os.chdir(folder)  # the server's database, artifacts and log
    try:
        with mlflow_server(port := free_port()):
            patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            study, at_study = run(STUDY, {"study": STUDY, "kind": "study"}, None)
            joint, at_joint = run(JOINT, tags("joint"), study, {"train.lr": 0.001}, scale=1.0)
            _, at_adpt = run(ADPT, tags("adpt"), study, {"train.lr": 0.002}, scale=1.5)
            _, at_task = run(TASK, tags("joint") | {"task": "pos"}, joint)
            yield {STUDY: at_study, JOINT: at_joint, ADPT: at_adpt, TASK: at_task}
    finally:
        os.chdir(before)
        patch.undo()


def tags(variant: str) -> dict[str, str]:
    return {"study": STUDY, "variant": variant, "pair": "syn-syn-close", "seed": "0"}


def run(
    name: str, labels: dict[str, str], parent: str | None, parameters: dict[str, float] | None = None, scale: float = 0
) -> tuple[str, str]:
    """Writes a run as the recipes do, with curves and a figure if `scale` is not 0; returns its id and its address."""
    folder = Path(name).absolute()
    tracker = Tracker.start(
        enabled=True, experiment="mlinterf_ds", name=name, folder=folder, parameters=parameters or {}, tags=labels,
        parent_id=parent,
    )  # fmt: skip
    points = [(step, scale * (100.0 - step)) for step in range(0, 50, 10)] if scale else []
    for step, value in points:
        values = {"eval/perplexity/syn": value, "eval/perplexity/syn-close": value + 5, "train/loss": value / 20}
        tracker.log(values, step)
    if scale:
        perplexity_curves({"syn": points}, folder / "perplexity.png", title=name)
        tracker.artifact(folder / "perplexity.png")
        tracker.describe(f"| model | steps |\n|---|---|\n| {name} | described |")
    tracker.close(timeout=120)
    run_id = tracker.run_id
    assert run_id and not run_id.startswith("pending"), "the server got nothing"
    return run_id, tracker.browse()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Browser]:
    """A fresh browser: MLflow's page remembers which runs were unfolded."""
    with browser(tmp_path / "profile") as opened:
        opened.window(1600, 1600)  # MLflow draws charts only in the visible part
        yield opened


def says(*words: str) -> str:
    return " && ".join(f"document.body.innerText.includes({word!r})" for word in words)


def unfold(name: str) -> str:
    """Click the plus of a run in the table of runs."""
    row = f"[...document.querySelectorAll('.ag-row')].find((r) => [...r.querySelectorAll('a')].some((a) => a.innerText === {name!r}))"
    return f"(() => {{ const b = {row}?.querySelector('button'); if (b) b.click(); return Boolean(b); }})()"


def curves(of: int) -> str:
    """Counts the charts with at least `of` drawn lines of different colours."""
    lines = "[...chart.querySelectorAll('.scatterlayer path.js-line')].filter((p) => p.getTotalLength() > 20)"
    colours = f"new Set({lines}.map((p) => getComputedStyle(p).stroke)).size"
    return f"[...document.querySelectorAll('.js-plotly-plot')].filter((chart) => {colours} >= {of}).length"


def test_the_experiment_lists_its_runs(addresses: Addresses, page: Browser, tmp_path: Path) -> None:
    """As a tree: the study, its models, their fine-tunings."""
    page.open(addresses[STUDY].replace("/runs/", "/runs?").replace("?workflowType", "&workflowType"))
    page.wait(unfold(STUDY))
    page.wait(says(JOINT, ADPT))
    page.wait(unfold(JOINT))
    page.wait(says(STUDY, JOINT, ADPT, TASK))
    page.picture(tmp_path / "experiment.png")


def test_a_run_shows_curves_and_figure(addresses: Addresses, page: Browser, tmp_path: Path) -> None:
    page.open(addresses[JOINT])
    page.wait(says(JOINT, "described"))
    page.wait(f"[...document.links].some((a) => a.innerText === {STUDY!r})")  # the run it is nested in
    page.picture(tmp_path / "run.png")
    page.open(addresses[JOINT].replace("?", "/model-metrics?"))
    page.wait(says("eval/perplexity", "(2)", "syn-close"))  # names group by language
    page.wait(f"{curves(1)} >= 3")
    page.picture(tmp_path / "curves.png")
    page.open(addresses[JOINT].replace("?", "/artifacts?"))
    page.click("perplexity.png")
    page.wait("[...document.images].some((i) => i.naturalWidth > 500 && i.checkVisibility())")
    page.picture(tmp_path / "figure.png")


def test_two_runs_compare(addresses: Addresses, page: Browser, tmp_path: Path) -> None:
    """Side by side in a table, and as two lines in each chart."""
    server, _, place = addresses[JOINT].partition("/#/experiments/")
    experiment = place.partition("/")[0]
    ids = ["%22" + addresses[name].rpartition("/")[2].partition("?")[0] + "%22" for name in (JOINT, ADPT)]
    page.open(f"{server}/#/compare-runs?runs=[{','.join(ids)}]&experiments=[%22{experiment}%22]")
    page.wait(says("Comparing 2 Runs", JOINT, ADPT, "train.lr", "0.001", "0.002"))
    page.wait("document.querySelectorAll('.parcoords .y-axis').length >= 2")  # parallel coordinates
    page.picture(tmp_path / "compare.png")
    page.open(f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART")
    page.wait(unfold(STUDY))
    page.wait(f"{curves(2)} >= 3")
    page.picture(tmp_path / "charts.png")
