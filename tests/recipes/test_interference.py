"""Mono against joint runs through the real recipes: the numbers against the runs' own, the files, a user's mistakes."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlinterf_ds.data.prepare.synthetic import prepare_synthetic
from mlinterf_ds.pretrain.config import load_run
from tests.commands import arguments, call, table
from tests.ranks import pool

CORPUS = "corpora/synthetic-800-syn+syn-far-syn-far=150"
SHORT = ["train.steps=6", "train.epoch_steps=6", "data.eval_rows=8", "data.synthetic_sentences=800", "train.batch=8"]
SHORT += ["model.layers=1", "model.width=32", "model.ffn=64", "train.warmup=2", "train.precision=fp32"]
SHORT += ["tracking.enabled=false", "data.sequence_length=32"]
BOTH = ["variant=joint", "languages=syn,syn-far", "data.synthetic_limit=syn-far=150"]
MONO = ["variant=mono", f"corpus={CORPUS}"]
RUNS = {
    "joint-0": BOTH,
    "joint-1": [*BOTH, "train.seed=1"],
    "syn-0": [*MONO, "languages=syn"],
    "syn-1": [*MONO, "languages=syn", "train.seed=1"],
    "far-0": [*MONO, "languages=syn-far"],
    "short": [*MONO, "languages=syn", "data.sequence_length=16"],
    "sparse": [*MONO, "languages=syn", "data.mask=0.15"],
    "other": ["variant=mono", "languages=syn"],
}
ANALYSIS = ["analysis=interference", "tracking.enabled=false", "train.precision=fp32"]
PAIR = [
    "interference.mono=syn=runs/syn-0,runs/syn-1,syn-far=runs/far-0",
    "interference.joint=runs/joint-0,runs/joint-1",
]


def analyse(ranks: int, folder: Path, *settings: str) -> list[str]:
    """The messages with which the ranks refuse these settings; '' where the analysis runs."""
    return pool(ranks).run(call, "analysis.main", str(folder), arguments(*ANALYSIS, *settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    working = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(working):  # here, not on a rank: preparing starts processes
        for settings in (RUNS["joint-0"], RUNS["other"]):
            config = load_run([], [*SHORT, *settings])
            data = config.data
            prepare_synthetic(config.languages or [], data.synthetic_sentences, data.synthetic_limit)
    for name, settings in RUNS.items():
        words = arguments(*SHORT, *settings, f"output=runs/{name}")
        assert pool(1).run(call, "pretrain.main", str(working), words) == [""]
    return working


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict[str, Any]:
    out = ["output=found", "interference.split=valid", "interference.rows=8", "interference.larger=runs/joint-1"]
    assert analyse(1, folder, *PAIR, *out) == [""]
    return json.loads((folder / "found/summary.json").read_text())


def own(folder: Path, run: str, language: str) -> float:
    """The run's own bits per character of the same rows, by the engine."""
    saved = json.loads((folder / "runs" / run / "summary.json").read_text())
    return saved["valid_bits_per_character"][language]


def tokens(folder: Path, language: str) -> int:
    """Of the language's training text."""
    saved = json.loads((folder / CORPUS / "manifest.json").read_text())
    return saved["languages"][language]["splits"]["train"]["tokens"]


def test_bits_per_character_are_those_of_the_runs(folder: Path, summary: dict[str, Any]) -> None:
    by = {row["language"]: row for row in summary["comparisons"]}
    assert set(by) == {"syn", "syn-far"} and by["syn"]["seeds"] == [0, 1] and by["syn-far"]["seeds"] == [0]
    for code, mono, joint in (
        ("syn", ("syn-0", "syn-1"), ("joint-0", "joint-1")),
        ("syn-far", ("far-0",), ("joint-0",)),
    ):
        alone = np.mean([own(folder, name, code) for name in mono])
        together = np.mean([own(folder, name, code) for name in joint])
        assert by[code]["mono"] == pytest.approx(alone, rel=1e-5)
        assert by[code]["joint"] == pytest.approx(together, rel=1e-5)
        assert by[code]["interference"] == pytest.approx(together - alone, abs=1e-5)
        low, high = by[code]["interval"]
        seen = by[code]["epochs"]
        assert seen[0] == pytest.approx(6 * 8 * 31 / tokens(folder, code)) and 0 < seen[1] < seen[0]
        assert low <= by[code]["interference"] <= high and by[code]["rows"] == 8
    assert by["syn"]["distance"]["planted"] == pytest.approx(0.95) and 0 < by["syn"]["distance"]["vocabulary"] < 1
    assert [note for note in summary["notes"] if "seeds 1 have no partner" in note and "syn-far" in note]


def test_two_ranks_find_the_same(folder: Path, summary: dict[str, Any]) -> None:
    settings = ["output=two", "interference.split=valid", "interference.rows=7"]
    for ranks, out in ((1, "one"), (2, "two")):
        assert analyse(ranks, folder, *PAIR, *settings, f"output={out}") == [""] * ranks
    tables = [json.loads((folder / out / "summary.json").read_text())["comparisons"] for out in ("one", "two")]
    for one, two in zip(*tables, strict=True):
        assert one["rows"] == 7
        for key in ("mono", "joint", "interference", "interval"):
            assert one[key] == pytest.approx(two[key], abs=1e-5)


def test_every_figure_and_its_table(folder: Path, summary: dict[str, Any]) -> None:
    names = {path.name for path in (folder / "found").iterdir()}
    for stem in ("bars", "differences", "pairs"):
        assert {f"{stem}-bits-per-character.{kind}" for kind in ("png", "svg", "csv")} <= names
    for stem in ("distance", "validation", "training"):
        assert {f"{stem}.{kind}" for kind in ("png", "svg", "csv")} <= names
    rows = table(folder / "found/interference.csv")
    assert [float(row["interference"]) for row in rows] == [row["interference"] for row in summary["comparisons"]]
    bars = {
        (row["category"], row["series"]): float(row["value"])
        for row in table(folder / "found/bars-bits-per-character.csv")
    }
    assert bars["syn with syn-far", "larger"] == pytest.approx(own(folder, "joint-1", "syn"), rel=1e-5)
    validation = table(folder / "found/validation.csv")
    last = [row for row in validation if row["model"] == "mono" and row["language"] == "syn-far"][-1]
    saved = json.loads((folder / "runs/far-0/summary.json").read_text())
    assert (last["step"], float(last["value"])) == ("6", saved["valid_perplexity"]["syn-far"])


def test_train_csv_has_every_step_of_a_run(folder: Path) -> None:
    rows = table(folder / "runs/joint-0/train.csv")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {row["language"] for row in rows} <= {"syn", "syn-far"}
    assert [int(row["tokens"]) for row in rows] == [n * 8 * 31 for n in range(1, 7)]
    assert float(rows[0]["lr"]) < float(rows[1]["lr"]) and all(0 < float(row["loss"]) < 20 for row in rows)


def test_a_low_resource_version_keeps_what_is_held_out(folder: Path) -> None:
    limited, whole = (
        json.loads((folder / corpus / "manifest.json").read_text())
        for corpus in (CORPUS, "corpora/synthetic-800-syn+syn-far")
    )
    assert limited["vocabulary"]["sha256"] == whole["vocabulary"]["sha256"]
    low, full = (manifest["languages"]["syn-far"]["splits"] for manifest in (limited, whole))
    assert low["train"]["sentences"] == 150 < full["train"]["sentences"]
    assert low["valid"] == full["valid"]
    assert limited["languages"]["syn"]["splits"] == whole["languages"]["syn"]["splits"]


@pytest.mark.parametrize(
    "settings, words",
    [
        ([], ["nothing to compare", "interference.mono="]),
        (["interference.mono=runs/none", "interference.joint=runs/joint-0"], ["runs/none", "no such folder"]),
        (["interference.mono=runs", "interference.joint=runs/joint-0"], ["runs", "no checkpoint here"]),
        (["interference.mono=runs/joint-0", "interference.joint=runs/joint-0"], ["interference.mono", "one language"]),
        (["interference.mono=syn=runs/far-0", "interference.joint=runs/joint-0"], ["syn=runs/far-0", "syn-far"]),
        (["interference.mono=runs/syn-0,runs/syn-0", "interference.joint=runs/joint-0"], ["train.seed=0", "once"]),
        (
            ["interference.mono=runs/other", "interference.joint=runs/joint-0"],
            ["runs/joint-0", "vocabulary", "one corpus"],
        ),
        (["interference.mono=runs/short", "interference.joint=runs/joint-0"], ["data.sequence_length", "16", "32"]),
        (["interference.mono=runs/sparse", "interference.joint=runs/joint-0"], ["data.mask", "0.15", "0.3"]),
        ([*PAIR, "languages=syn,klingon"], ["no run knows klingon", "syn-far"]),
        ([*PAIR, "interference.typology=features.csv"], ["interference.typology", "no longer a key"]),
        (
            ["interference.mono=runs/syn-1", "interference.joint=runs/joint-0"],
            ["nothing to compare", "no mono run of syn"],
        ),
        (["interference.mono=runs/stopped", "interference.joint=runs/joint-0"], ["runs/stopped", "resume=auto"]),
    ],
)
def test_a_users_mistake(folder: Path, settings: list[str], words: list[str]) -> None:
    if not (folder / "runs/stopped").exists():
        shutil.copytree(folder / "runs/syn-0", folder / "runs/stopped")
        (folder / "runs/stopped/summary.json").unlink()
    (message,) = analyse(1, folder, *settings, "output=refused")
    assert all(word in message for word in words), message
