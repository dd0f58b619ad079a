"""`analysis=prune` from end to end: its files agree with each other, its mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlinterf_ds.analysis.config import AnalyzeConfig
from mlinterf_ds.config import load_config
from mlinterf_ds.data.corpus import SYNTHETIC_LANGUAGES as LANGUAGES
from mlinterf_ds.data.prepare.synthetic import prepare_synthetic
from mlinterf_ds.pretrain.config import load_run
from tests.commands import arguments, call, table
from tests.parity.bodies import REPOSITORY
from tests.ranks import laid_out, pool

SHORT = ["tracking.enabled=false", "analysis=prune", "prune.steps=3", "prune.rows=4", "prune.sequences=4"]
SHAPE = ["variant=attn", "model.layers=2", "model.heads=2", "model.width=16", "model.ffn=32", "data.sequence_length=16"]


def checkpoint(folder: str) -> None:
    """An untrained model of the synthetic corpus in <folder>/corpus; its attention is language-specific."""
    from mlinterf_ds.data.corpus import Corpus
    from mlinterf_ds.engine import checkpoint
    from mlinterf_ds.engine.engine import Engine
    from mlinterf_ds.engine.precision import read_deepspeed_json
    from mlinterf_ds.model.encoder import Encoder

    layout, corpus = laid_out(1), Corpus.open(f"{folder}/corpus")
    config = load_run([], [*SHAPE, f"corpus={folder}/corpus"])
    model = Encoder(
        config.model, variant="attn", languages=LANGUAGES, vocabulary=corpus.vocabulary_size, positions=16, seed=0
    )
    engine = Engine(model, config.train, read_deepspeed_json(REPOSITORY / "ds_configs/zero0.json"), "fp32", layout)
    state = {"config": config.model_dump(), "languages": LANGUAGES, "vocabulary": corpus.vocabulary_size}
    files = {"tokenizer.model": corpus.folder / "tokenizer.model"}
    checkpoint.save(Path(folder) / "run", engine, {**state, "run_id": None}, files, 1)


def analyse(ranks: int, folder: Path, *settings: str) -> list[str]:
    """The messages with which the ranks refuse an analysis of the model in `folder`; '' where it runs."""
    words = arguments(*SHORT, "checkpoint=run", *settings)
    return pool(ranks).run(call, "analysis.main", str(folder), words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    prepare_synthetic(LANGUAGES, 600, folder=folder / "corpus")  # ranks of a pool may not fork
    pool(1).run(checkpoint, str(folder))
    return folder


def test_tables_summary_and_figures(folder: Path) -> None:
    assert analyse(1, folder, "output=found", "prune.groups=heads,neurons,rows") == [""]
    found = folder / "found"
    masks, codes = table(found / "masks.csv"), LANGUAGES
    assert {row["component"] for row in masks} == {"ffn"}  # attention belongs to one language each
    assert len(masks) == 2 * (32 + 32 + 16)  # of each layer: neurons, rows of fc1, rows of fc2
    assert [row["group"] for row in masks[:2]] == ["L0 neuron 0", "L0 neuron 1"]
    assert {row["parameters"] for row in masks if "neuron" in row["group"]} == {"33"}  # 16 in, bias, 16 out
    pi = {
        code: np.array([[float(row[f"{code}/{seed}"]) for row in masks if row["layer"] == "1"] for seed in (0, 1)])
        for code in codes
    }
    units = {code: value / np.linalg.norm(value, axis=1, keepdims=True) for code, value in pi.items()}
    similar = {(row["layer"], row["left"], row["right"]): row for row in table(found / "similarity.csv")}
    left, right = codes
    between = (units[left] @ units[right].T).mean()
    assert float(similar["1", left, right]["cosine"]) == pytest.approx(between, abs=1e-4)
    assert float(similar["1", left, left]["cosine"]) == pytest.approx(units[left][0] @ units[left][1], abs=1e-4)
    centred = [np.corrcoef(a, b)[0, 1] for a in pi[left] for b in pi[right]]
    assert float(similar["1", left, right]["correlation"]) == pytest.approx(np.mean(centred), abs=1e-4)
    assert len(table(found / "pruned.csv")) == 4
    summary = json.loads((found / "summary.json").read_text())
    assert summary["groups"] == {"neurons": 64, "rows": 96} and summary["seeds"] == [0, 1]
    assert summary["cosine"]["between"] == pytest.approx(float(similar["all", left, right]["cosine"]))
    whole = summary["pruned"][left]
    assert whole["full"] > 500 and 0 < whole["kept"] <= 1, "an untrained model of 2000 tokens"
    for name in ("layers", "extremes", "matrix"):
        for suffix in (".png", ".svg", ".csv"):
            assert (found / f"{name}{suffix}").stat().st_size > 100
    mean = {code: np.array([[float(r[f"{code}/{s}"]) for r in masks] for s in (0, 1)]).mean(axis=0) for code in codes}
    normal = {code: value / np.abs(value).max() for code, value in mean.items()}
    names = [row["group"] for row in masks]
    shown = [row for row in table(found / "extremes.csv") if row["chosen_by"] == left]
    assert len(shown) == 20 and shown[0]["group"] == names[int(np.argmin(normal[left]))]
    for row in shown:  # figure 4b: a language's groups with their values in the other
        for code in codes:
            assert float(row[code]) == pytest.approx(normal[code][names.index(row["group"])], abs=1e-4)


def test_one_language_and_one_seed_have_nothing_to_compare(folder: Path) -> None:
    assert analyse(1, folder, "output=alone", f"languages={LANGUAGES[1]}", "prune.seeds=7") == [""]
    summary = json.loads((folder / "alone/summary.json").read_text())
    assert summary["cosine"] == {"within": None} and list(summary["pruned"]) == [LANGUAGES[1]]


@pytest.mark.parametrize(
    "settings, words",
    [
        (["prune.groups=heads"], ["prune.groups=heads", "'attn'"]),
        (["prune.groups=layers"], ["prune.groups", "layers", "heads"]),
        (["prune.groups=heads,heads"], ["prune.groups=heads,heads", "twice"]),
        (["prune.seeds=1,1"], ["prune.seeds=1,1", "twice"]),
        (["prune.penalty=-1"], ["prune.penalty"]),
        (["languages=xx"], ["no xx", ", ".join(LANGUAGES)]),
    ],
)
def test_mistakes_are_named(folder: Path, settings: list[str], words: list[str]) -> None:
    (message,) = analyse(1, folder, f"output=bad-{len(settings[0])}", *settings)
    for word in words:
        assert word in message, message


def test_rows_that_ranks_cannot_share(folder: Path) -> None:
    for message in analyse(2, folder, "output=uneven", "prune.rows=3"):
        assert "prune.rows=3" in message and "2 data-parallel ranks" in message


def test_defaults_are_the_papers_groups() -> None:
    config = load_config(AnalyzeConfig, [], ["checkpoint=x", "analysis=prune"])
    assert config.prune.groups == ["heads", "neurons"] and len(config.prune.seeds) == 2
