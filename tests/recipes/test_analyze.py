"""The analysis command from end to end, and conflict measured during pretraining, through interruption and resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mlinterf_ds.analysis.config import AnalyzeConfig
from mlinterf_ds.analysis.main import check_vocabulary
from mlinterf_ds.config import load_config
from mlinterf_ds.data.corpus import SYNTHETIC_LANGUAGES, synthetic_folder
from mlinterf_ds.data.prepare.synthetic import prepare_synthetic
from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrained import Pretrained
from tests.commands import arguments, call, launch, table
from tests.mlflow_server import empty_store
from tests.parity.bodies import weights
from tests.ranks import pool

SHORT = ["train.steps=6", "train.epoch_steps=3", "data.eval_rows=8", "data.synthetic_sentences=600", "train.batch=8"]
SHORT += ["model.width=32", "model.ffn=64", "train.warmup=2", "train.precision=fp32", "model.dropout=0.1"]
PAIRS = {("syn", "syn"), ("syn-mid", "syn-mid"), ("syn", "syn-mid")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: plain, measured, and measured but interrupted after step 3."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "mlflow.db").write_bytes(empty_store())
    corpus = folder / synthetic_folder(SYNTHETIC_LANGUAGES, 600)
    prepare_synthetic(SYNTHETIC_LANGUAGES, 600, folder=corpus)  # ranks of a pool may not fork
    measured = ["conflict.every=2", "conflict.sequences=4", "conflict.micro_batch=3"]
    runs = {
        "plain": [[]],
        "measured": [measured],
        "resumed": [[*measured, "train.steps=3"], [*measured, "resume=auto"]],
    }
    for name, starts in runs.items():
        for more in starts:
            own = [f"output=runs/{name}", f"tracking.enabled={str(name == 'measured').lower()}"]
            assert pool(1).run(call, "pretrain.main", str(folder), arguments(*SHORT, *own, *more)) == [""]
    return folder


def analyse(folder: Path, *settings: str, ranks: int = 1) -> str:
    """The message with which the analysis refuses these settings on ranks of the pool; '' if it runs."""
    (message,) = set(pool(ranks).run(call, "analysis.main", str(folder), arguments(*settings)))
    return message


def test_pretraining_is_not_changed_by_measuring(folder: Path) -> None:
    summaries = [json.loads((folder / f"runs/{name}/summary.json").read_text()) for name in ("plain", "measured")]
    assert summaries[0]["valid_perplexity"] == summaries[1]["valid_perplexity"]
    ends = [weights(folder / f"runs/{name}/checkpoints/step-00000006") for name in ("plain", "measured", "resumed")]
    for other in ends[1:]:
        assert all(torch.equal(value, other[name]) for name, value in ends[0].items())


def test_figure_3s_table_is_whole_also_after_a_resume(folder: Path) -> None:
    rows = table(folder / "runs/measured/conflict.csv")
    assert {int(row["step"]) for row in rows} == {0, 2, 4, 6}
    assert {row["scope"] for row in rows} == {"model", "attention", "ffn", "embedding", "other"}
    assert len(rows) == 4 * 5 * 3 and {(row["left"], row["right"]) for row in rows} == PAIRS
    assert table(folder / "runs/resumed/conflict.csv") == rows, "to the last digit"
    assert (folder / "runs/measured/conflict.png").stat().st_size > 1000


def test_measurements_are_metrics_of_the_run(folder: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (found,) = client.search_runs(["1"])
    wanted = {row["step"]: float(row["cosine"]) for row in table(folder / "runs/measured/conflict.csv")
              if row["scope"] == "model" and (row["left"], row["right"]) == ("syn", "syn-mid")}  # fmt: skip
    points = client.get_metric_history(found.info.run_id, "train/conflict/syn-syn-mid")
    assert {str(point.step): point.value for point in points} == pytest.approx(wanted)
    assert {
        f"train/conflict/{name}" for name in ("within", "between", "seconds_gradients")
    } <= found.data.metrics.keys()
    assert "conflict.csv" in {artifact.path for artifact in client.list_artifacts(found.info.run_id)}


def test_the_command_on_two_ranks(folder: Path) -> None:
    """As a user starts it; nested under the pretraining run in MLflow; then a refusal."""
    from mlflow.tracking import MlflowClient

    settings = ["checkpoint=runs/measured", "output=runs/conflict", "conflict.sequences=8", "train.precision=fp32"]
    done = launch(folder, "analyze", *settings, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    out = folder / "runs/conflict"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["sequences"] == 8 and summary["step"] == 6 and summary["languages"] == ["syn", "syn-mid"]
    matrix = np.array(summary["matrix"])
    assert matrix.shape == (2, 2) and np.array_equal(matrix, matrix.T) and (np.abs(matrix) <= 1).all()
    assert summary["within"] == pytest.approx(np.diagonal(matrix).mean()) and summary["between"] == matrix[0, 1]
    rows = {
        (r["layer"], r["component"], r["left"], r["right"]): float(r["cosine"]) for r in table(out / "similarity.csv")
    }
    assert rows["all", "all", "syn", "syn-mid"] == matrix[0, 1]
    assert {("0", "attention"), ("1", "ffn"), ("all", "embedding"), ("1", "all")} <= {key[:2] for key in rows}
    shown = {(r["panel"], r["row"], r["column"]): float(r["value"]) for r in table(out / "matrix.csv")}
    assert shown["whole model", "syn", "syn-mid"] == matrix[0, 1]
    for name in ("matrix", "components"):
        assert all((out / f"{name}.{kind}").stat().st_size > 1000 for kind in ("png", "svg"))
    assert "whole model" in done.stdout and "s for the gradients" in done.stdout
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    by_name = {run.info.run_name: run for run in client.search_runs(["1", "2"])}
    assert by_name["conflict"].data.tags["mlflow.parentRunId"] == by_name["measured"].info.run_id
    assert by_name["conflict"].data.metrics["conflict/between"] == pytest.approx(matrix[0, 1])
    names = {artifact.path for artifact in client.list_artifacts(by_name["conflict"].info.run_id)}
    assert {"summary.json", "matrix.png", "similarity.csv"} <= names
    assert "holds an analysis" in analyse(folder, *settings)


def test_the_projection_at_the_command(folder: Path) -> None:
    settings = ["checkpoint=runs/plain", "train.precision=fp32", "conflict.sequences=8", "tracking.enabled=false"]
    for name, more in {"exact": [], "sketch": ["conflict.sketch=8192"], "alone": ["languages=syn"]}.items():
        assert analyse(folder, *settings, f"output=runs/{name}", *more) == ""
    found = {n: json.loads((folder / f"runs/{n}/summary.json").read_text()) for n in ("exact", "sketch", "alone")}
    assert found["sketch"]["costs"]["sketch"] == 8192 and found["exact"]["costs"]["sketch"] == "exact"
    difference = np.abs(np.array(found["sketch"]["matrix"]) - np.array(found["exact"]["matrix"]))
    assert 0 < difference.max() < 4 / 8192**0.5
    assert "between" not in found["alone"]
    assert found["alone"]["within"] == pytest.approx(found["exact"]["matrix"][0][0]), "of no other language"


def test_the_probe_on_one_rank_and_on_two(folder: Path) -> None:
    """Frozen states of an untrained model: every measure with its floors, the same at any layout; real files beside."""
    settings = ["checkpoint=runs/plain", "analysis=probe", "train.precision=fp32", "tracking.enabled=false"]
    settings += ["probe.examples=100", "probe.sentences=40"]
    assert analyse(folder, *settings, "output=runs/probe") == ""
    assert analyse(folder, *settings, "output=runs/probe-2", ranks=2) == ""
    assert analyse(folder, *settings, "output=runs/probe-tp", "parallel.tensor=2", ranks=2) == ""
    summaries = [json.loads((folder / f"runs/{n}/summary.json").read_text()) for n in ("probe", "probe-2", "probe-tp")]
    scores = summaries[0]["scores"]
    assert scores == summaries[1]["scores"], "each sentence is encoded by one rank, as it is on one alone"
    assert list(scores) == ["pos accuracy", "ner f1", "retrieval", "alignment f1"]
    columns = ["floor", "lexical", "embeddings", "layer 1", "layer 2"]
    assert list(scores["pos accuracy"]) == ["syn", "syn-mid"] and list(scores["ner f1"]["syn"]) == columns
    assert list(scores["retrieval"]) == list(scores["alignment f1"]) == ["syn-mid"]
    assert scores["retrieval"]["syn-mid"]["floor"] == pytest.approx(100 / 40)
    within = scores["pos accuracy"]["syn"]
    assert within["layer 2"] > within["floor"] + 20, "the embeddings of words tell much of their part of speech"
    rows = {(r["panel"], r["row"], r["column"]): r["value"] for r in table(folder / "runs/probe/probe.csv")}
    assert (
        float(rows["pos accuracy", "syn", "layer 2"]) == within["layer 2"] and rows["retrieval", "syn", "floor"] == ""
    )
    assert all((folder / f"runs/probe/probe.{kind}").stat().st_size > 100 for kind in ("png", "svg", "md"))
    (folder / "a.txt").write_text("".join(f"w{number} x\n" for number in range(30)))
    (folder / "b.txt").write_text("".join(f"y v{number}\n" for number in range(30)))
    files = ["probe.parallel.syn=a.txt", "probe.parallel.syn-mid=b.txt"]
    assert analyse(folder, *settings, *files, "output=runs/probe-files") == ""
    scores = json.loads((folder / "runs/probe-files/summary.json").read_text())["scores"]
    assert "alignment f1" not in scores and scores["retrieval"]["syn-mid"]["floor"] == pytest.approx(100 / 30)


def test_figure_3_of_several_runs(folder: Path) -> None:
    settings = ["conflict.runs=runs/measured, runs/resumed", "output=runs/figure", "tracking.enabled=false"]
    assert analyse(folder, *settings) == ""
    rows = table(folder / "runs/figure/training.csv")
    assert {row["run"] for row in rows} == {"measured", "resumed"} and len(rows) == 2 * 3 * 4
    assert (folder / "runs/figure/training.png").stat().st_size > 1000
    shutil.copytree(folder / "runs/measured", folder / "runs/again/measured")
    settings = ["conflict.runs=runs/measured, runs/again/measured", "output=runs/figure-2", "tracking.enabled=false"]
    assert analyse(folder, *settings) == ""
    names = {row["run"] for row in table(folder / "runs/figure-2/training.csv")}
    assert names == {"runs/measured", "runs/again/measured"}


@pytest.mark.parametrize(
    "settings, words",
    [
        (["checkpoint=nowhere"], ["nowhere", "no checkpoint"]),
        (["checkpoint=runs/plain", "languages=syn,klingon"], ["klingon", "syn, syn-mid"]),
        (["checkpoint=runs/plain", "corpus=nowhere"], ["nowhere", "prepare_corpus.py"]),
        (["checkpoint=runs/plain", "conflict.sequences=5000"], ["conflict.sequences=5000", "at most"]),
        (["checkpoint=runs/plain", "parallel.tensor=2"], ["parallel.tensor=2", "1 ranks"]),
        (["conflict.runs=runs/plain"], ["runs/plain/conflict.csv", "conflict.every"]),
    ],
)
def test_a_users_mistake_is_one_clear_sentence(folder: Path, settings: list[str], words: list[str]) -> None:
    message = analyse(folder, *settings, "output=runs/refused", "tracking.enabled=false")
    assert message and all(word in message for word in words), message


def test_a_corpus_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    for name, content in {"corpus": b"ours", "checkpoint": b"theirs"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(content)
    pretrained = Pretrained(tmp_path / "checkpoint", {})
    check_vocabulary(tmp_path / "checkpoint", pretrained)
    with pytest.raises(UserError, match="corpus: its vocabulary is not that of .*checkpoint"):
        check_vocabulary(tmp_path / "corpus", pretrained)


@pytest.mark.parametrize(
    "settings, words",
    [
        ([], "checkpoint is not set: analysis=conflict"),
        (["analysis=prune"], "checkpoint is not set: analysis=prune"),
        (["analysis=probe"], "checkpoint is not set: analysis=probe"),
        (["checkpoint=x", "languages=en,en"], "name each once"),
        (["checkpoint=x", "conflict.sketch=4"], "conflict.sketch"),
        (["checkpoint=x", "conflict.every=4"], "unknown key"),
        (["checkpoint=x", "analysis=other"], "analysis='other'"),
    ],
)
def test_impossible_configurations(settings: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(AnalyzeConfig, [], settings)
    assert load_config(AnalyzeConfig, [], ["analysis=interference"]).checkpoint == ""
