"""The main job through the real launcher, as a user starts it."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.commands import arguments, call, launch
from tests.mlflow_server import empty_store
from tests.ranks import pool

SHORT = ["train.steps=6", "train.epoch_steps=3", "data.eval_rows=8", "data.synthetic_sentences=600", "train.batch=8"]
SHORT += ["model.width=32", "model.ffn=64", "train.warmup=2"]


def run(folder: Path, *settings: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return launch(folder, "pretrain", *SHORT, *settings, ranks=ranks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One working folder: the synthetic corpus is prepared once."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "mlflow.db").write_bytes(empty_store())
    return folder


@pytest.fixture(scope="module")
def default(folder: Path) -> subprocess.CompletedProcess[str]:
    return run(folder, "output=runs/default", ranks=2)


def test_the_default_run_ends_with_a_table_and_a_record(folder: Path, default) -> None:
    assert default.returncode == 0, default.stderr[-3000:]
    summary = json.loads((folder / "runs/default/summary.json").read_text())
    assert summary["variant"] == "meta_adpt" and summary["steps"] == 6 and summary["skipped"] == 0
    for key in ("valid_perplexity", "valid_bits_per_character", "unigram_perplexity"):
        assert summary[key].keys() == set(summary["languages"]) and all(value > 0 for value in summary[key].values())
    assert summary["tokens_per_second"] > 0 and 0 < summary["mfu"] < 1.5
    assert (
        "valid perplexity" in default.stdout and "mlflow ui --backend-store-uri sqlite:///mlflow.db" in default.stdout
    )
    assert (folder / "runs/default/perplexity.png").stat().st_size > 1000


def test_mlflow_has_one_finished_run_with_curves(folder: Path, default) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mlinterf_ds")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["train.steps"] == "6" and found.data.params["variant"] == "meta_adpt"
    assert found.data.tags["variant"] == "meta_adpt"
    language = json.loads((folder / "runs/default/summary.json").read_text())["languages"][0]
    points = client.get_metric_history(found.info.run_id, f"eval/perplexity/{language}")
    assert sorted({point.step for point in points}) == [0, 3, 6]
    assert {
        "train/loss",
        "train/lr",
        f"eval/unigram_perplexity/{language}",
        "system/tokens_per_second",
    } <= found.data.metrics.keys()
    sections = {name.rpartition("/")[0] for name in found.data.metrics}
    assert min(sections) == "eval" and "eval/mean_perplexity" in found.data.metrics, "MLflow's charts begin with it"
    assert "unigram" in found.data.tags["mlflow.note.content"], "a description"
    assert [one.tags[0].value for one in found.inputs.dataset_inputs] == ["training"]
    names = {artifact.path for artifact in client.list_artifacts(found.info.run_id)}
    assert {"config.json", "perplexity.png", "tokenizer.model", "summary.json"} <= names


def terminated(folder: str, words: list[str], printed: str) -> str:
    """`call`ed on a rank of the pool, which gets SIGTERM during its first evaluation; what rank 0 prints is in this file."""
    from mlinterf_ds.engine.engine import Engine

    evaluate, asked = Engine.evaluate, list[int]()

    def evaluated(self: Engine, *arguments: Any) -> float:
        if not asked:
            asked.append(self.step)
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *arguments)

    with open(printed, "a") as file, contextlib.redirect_stdout(file), mock.patch.object(Engine, "evaluate", evaluated):
        return call("pretrain.main", folder, words)


def test_a_run_stopped_by_the_scheduler_resumes_to_the_same_end(folder: Path, default) -> None:
    """SIGTERM saves and ends; the resumed run's validation perplexities equal the uninterrupted run's, digit for digit."""
    settings = ["output=runs/stopped", "train.steps=6", "tracking.enabled=false"]
    words = arguments(*SHORT, *settings, ds="zero2")
    assert pool(2).run(terminated, str(folder), words, str(folder / "printed")) == ["", ""]
    seen = (folder / "printed").read_text()
    assert "stopped by SIGTERM; go on with --set output=runs/stopped --set resume=auto" in seen, seen[-3000:]
    assert json.loads((folder / "runs/stopped/summary.json").read_text())["finished"] is False
    assert pool(2).run(call, "pretrain.main", str(folder), [*words, "--set", "resume=auto"]) == ["", ""]
    ended, whole = (json.loads((folder / f"runs/{name}/summary.json").read_text()) for name in ("stopped", "default"))
    assert ended["valid_perplexity"] == whole["valid_perplexity"]
    ended, whole = ((folder / f"runs/{name}/train.csv").read_text() for name in ("stopped", "default"))
    assert ended == whole and whole.count("\n") == 7, "every step's loss once"


def scripted(folder: str, output: str, settings: list[str], losses: dict[int, float]) -> dict[int, dict]:
    """Pretrains on a rank of the pool with these validation losses by step; returns each checkpoint's run.json by step."""
    from mlinterf_ds.engine.engine import Engine

    settings = [*SHORT, "tracking.enabled=false", "train.keep=9", f"output={output}", *settings]
    with mock.patch.object(Engine, "evaluate", lambda self, _: losses[self.step]):
        assert not call("pretrain.main", folder, arguments(*settings))
    saved = Path(folder, output, "checkpoints").glob("step-*")
    return {int(path.name[5:]): json.loads((path / "run.json").read_text()) for path in saved}


def test_the_best_checkpoint_is_the_one_whose_own_evaluation_was_best(folder: Path, default) -> None:
    settings = ["train.epoch_steps=2", "train.save_steps=1"]
    losses = {0: 6.0, 2: 5.0, 4: 3.0, 6: 4.0}
    place = folder / "runs/best/checkpoints"
    (saved,) = pool(1).run(scripted, str(folder), "runs/best", settings, losses)
    known = {1: math.inf, 2: 5.0, 3: 5.0, 4: 3.0, 5: 3.0, 6: 3.0}
    assert {step: state["best"] for step, state in saved.items()} == pytest.approx(known), (
        "a checkpoint knows of itself"
    )
    assert (place / "best").read_text() == "step-00000004"
    # as if killed between the best checkpoint and its mark: the resumed run marks it, and no worse one after it
    for step in (5, 6):
        shutil.rmtree(place / f"step-{step:08d}")
    (place / "best").write_text("step-00000002")
    (saved,) = pool(1).run(scripted, str(folder), "runs/best", [*settings, "resume=auto"], losses)
    assert saved[6]["best"] == pytest.approx(3) and (place / "best").read_text() == "step-00000004"


def test_max_hours_are_those_of_a_start(folder: Path, default) -> None:
    """A run that they stopped, or that has run for longer before, goes on for as long again."""
    losses = {step: 5.0 - step / 10 for step in range(7)}
    (saved,) = pool(1).run(scripted, str(folder), "runs/hours", ["train.max_hours=1e-9"], losses)
    assert max(saved) == 1, "not one second: it ends with its first step"
    state = folder / "runs/hours/checkpoints/step-00000001/run.json"
    altered(state, saved[1] | {"seconds": 2 * 3600.0})
    (saved,) = pool(1).run(scripted, str(folder), "runs/hours", ["train.max_hours=1", "resume=auto"], losses)
    assert max(saved) == 6 and saved[6]["seconds"] > 7200


def altered(state: Path, told: dict) -> None:
    """Write another run.json, with its digest."""
    from mlinterf_ds.files import flushed_facts

    state.write_text(json.dumps(told))
    complete = state.with_name("complete.json")
    listed = json.loads(complete.read_text())
    listed["files"] |= flushed_facts([state])
    complete.write_text(json.dumps(listed))


@pytest.mark.parametrize(
    "settings, ranks, words",
    [
        (["output=runs/default"], 1, ["runs/default holds checkpoints", "resume=auto"]),
        (["output=runs/default", "resume=auto", "model.width=64"], 1, ["model.width is 64, was 32", "init="]),
        (["resume=auto"], 1, ["resume=auto", "output=FOLDER"]),
        (["output=mlflow.db"], 2, ["output=mlflow.db: cannot write there (Not a directory)"]),
        (["output=mlflow.db/below"], 1, ["output=mlflow.db/below: cannot write there"]),
        (["corpus=nowhere"], 1, ["nowhere", "prepare_corpus.py"]),
        (["languages=syn,klingon"], 1, ["klingon"]),
        (["parallel.tensor=2"], 1, ["parallel.tensor=2", "1 ranks"]),
        (["train.batch=7"], 2, ["train.batch=7", "2 data-parallel"]),
        (["meta.batch=1"], 1, ["meta.batch = 1", "2 languages"]),
        (["languages=syn"], 1, ["meta_adpt", "mono"]),
    ],
)
def test_a_users_mistake_is_one_clear_sentence(
    folder: Path, default, settings: list[str], ranks: int, words: list[str]
) -> None:
    for message in pool(ranks).run(call, "pretrain.main", str(folder), arguments(*SHORT, *settings)):
        assert all(word in message for word in words), message


def test_a_mistake_ends_the_job_with_its_reason_and_no_traceback(folder: Path) -> None:
    done = run(folder, "train.speed=9")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "error: train.speed='9'" in done.stderr and "unknown key" in done.stderr


def test_a_truncated_checkpoint_is_refused_by_name_and_the_one_before_is_offered(folder: Path, default) -> None:
    from mlinterf_ds.engine import checkpoint
    from mlinterf_ds.errors import UserError

    newest = checkpoint.find(folder / "runs/default")
    shard = newest / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    try:
        with pytest.raises(UserError, match=r"shard-00001.*truncated.*step-00000003.*\(mv .*\.damaged\)"):
            checkpoint.verify(newest)
        shard.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(UserError, match=r"shard-00001.*altered"):
            checkpoint.verify(newest)
    finally:
        shard.write_bytes(whole)
    assert checkpoint.verify(newest)["updates"] == 6
