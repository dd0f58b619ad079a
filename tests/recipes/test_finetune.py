"""The fine-tuning command from end to end: what it writes, how it selects, resumes, nests and refuses."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from deepspeed.accelerator import get_accelerator

from mlinterf_ds import predict
from mlinterf_ds.config import describe, load_config
from mlinterf_ds.errors import UserError
from mlinterf_ds.finetune.config import FinetuneConfig
from mlinterf_ds.finetune.main import serving
from mlinterf_ds.finetune.report import _transfer
from mlinterf_ds.finetune.search import Search
from mlinterf_ds.pretrained import Point, Pretrained, opened
from mlinterf_ds.tasks import TASKS
from tests.commands import ROOT, arguments, call, flags
from tests.mlflow_server import empty_store
from tests.parity import finetune_bodies as bodies
from tests.ranks import pool

RECIPES = sorted((ROOT / "launch" / "recipes").glob("finetune*.toml"))


def command(ground: Path, task: str, out: Path, *more: str) -> list[str]:
    """The arguments of a fine-tuning on "te" that is tested on both languages."""
    settings = [f"checkpoint={ground}/model", f"task={task}", f"output={out}", *bodies.FINETUNE]
    te, other = (f"{language}={ground}/data/{task}-{language}" for language in bodies.LANGUAGES)
    return [*arguments(*settings), "--train", te, "--dev", "te=split", "--test", te, "--test", other, *more]


def run(words: list[str], ranks: int = 1) -> str:
    """Fine-tunes on ranks of the pool; returns the message with which the first refuses, or ''."""
    return pool(ranks).run(call, "finetune.main", "/", words)[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(recipe: Path) -> None:
    config = load_config(FinetuneConfig, [recipe], ["checkpoint=x"])
    assert recipe.stem.endswith(("tiny", "synthetic", config.task))


def test_the_appendix_grids() -> None:
    found = {task: load_config(FinetuneConfig, [f"finetune_{task}"], ["checkpoint=x"]).finetune for task in TASKS}
    assert {task: settings.epochs for task, settings in found.items()} == {"ner": 10, "pos": 10, "qa": 2, "nli": 200}
    for task in ("ner", "pos", "qa"):
        assert (found[task].batch, found[task].lr, found[task].head_lr) == ([16, 32], [2e-5, 3e-5, 5e-5], None)
    assert (found["nli"].batch, found["nli"].lr) == ([4, 8], [1e-6, 5e-6, 2e-5])
    assert found["nli"].head_lr == [5e-6, 2e-5, 5e-5]


@pytest.mark.parametrize("task", TASKS)
def test_from_a_checkpoint_to_a_table(task: str, ground: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    word = {"pos": "mean"}.get(task, "first")  # what tags a word: its first piece, or all of them
    assert not run(command(ground, task, out, *flags("finetune.seeds=0,1", f"finetune.word={word}")))
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["task"], summary["metric"], summary["seeds"]) == (task, TASKS[task].metric, [0, 1])
    assert set(summary["scores"]) == set(summary["baseline"]) == {"te", "as"}
    assert summary["setting"] == {"te": "within", "as": "zero-shot"}
    for language, score in summary["scores"].items():
        values = summary["per_seed"][language]
        assert score["mean"] == pytest.approx(sum(values) / 2) and score["std"] == pytest.approx(
            abs(values[0] - values[1]) / 2**0.5
        )
        # the prediction files score what the summary says
        examples = TASKS[task].read(ground / "data" / f"{task}-{language}", language)
        (file,) = (out / "predictions" / "seed1").glob(f"{language}.*")
        if task == "qa":
            answers = json.loads(file.read_text())
            predictions = [answers[q.id] for q in examples]
        else:
            written = TASKS[task].read(file, language)
            predictions = [e.label if task == "nli" else list(e.tags) for e in written]
        assert TASKS[task].score(examples, predictions)[summary["metric"]] == pytest.approx(values[1])
        # and so do the counts of right, predicted and gold
        right, predicted, gold = np.loadtxt(
            out / "counts" / "seed1" / f"{language}.csv", delimiter=",", skiprows=1
        ).sum(0)
        assert 200 * right / (predicted + gold) == pytest.approx(values[1])
        names = {"majority"} if task == "qa" else {"majority", "lexical"}
        assert summary["baselines"][language].keys() == names
        predicts_the_same(task, ground / "data" / f"{task}-{language}", language, out, tmp_path)
    if task == "nli":
        low, high = summary["interval"]["te"]
        assert low < summary["scores"]["te"]["mean"] < high
    text = (out / "table.md").read_text()
    assert "| te | within | 22 |" in text and "| as | zero-shot |" in text
    assert (out / "report.md").read_text().startswith("# Errors of seed0")
    card_tells(summary, export_card(out, tmp_path / "exported"))


def export_card(out: Path, folder: Path) -> str:
    """The model card of the exported fine-tuning."""
    pytest.importorskip("transformers")
    from mlinterf_ds.export.hf import export

    export(str(out), folder)
    return (folder / "README.md").read_text()


def card_tells(summary: dict[str, Any], card: str) -> None:
    """The card has the languages, the first seed's scores beside the floors, and how the model was trained."""
    metric = summary["metric"]
    for language, values in summary["per_seed"].items():
        cells = [language, summary["setting"][language], str(summary["examples"]["test"][language]), f"{values[0]:.1f}"]
        floors = sorted(summary["baselines"][language].items(), reverse=True)
        cells += [f"{scores[metric]:.1f}" for _, scores in floors]
        assert f"| {' | '.join(cells)} |" in card and f'- "{language}"' in card
    assert f"{summary['examples']['train']['te']} examples of te: epoch {summary['best_epoch']['0']} of 3" in card
    assert "Pretrained for 0 steps of 4 rows" in card and "seed 0" in card


def predicts_the_same(task: str, text: Path, language: str, out: Path, folder: Path) -> None:
    """`launch/predict.py` writes the bytes of the first seed's test, and probabilities whose likeliest label it writes."""
    words = ["--checkpoint", str(out), "--text", f"{language}={text}", "--out", f"{folder}/predicted"]
    assert not pool(1).run(call, "predict", "/", [*words, "--probabilities", f"{folder}/chances"])[0]
    (file,) = (out / "predictions" / "seed0").glob(f"{language}.*")
    assert (folder / "predicted").read_bytes() == file.read_bytes()
    for line in (folder / "chances").read_text().splitlines():
        facts = json.loads(line)
        if task == "qa":
            assert 0 < facts["probability"] <= 1
            continue
        likeliest = [max(chances, key=chances.__getitem__) for chances in facts["probabilities"]]
        assert likeliest == (facts["prediction"] if isinstance(facts["prediction"], list) else [facts["prediction"]])
        assert all(sum(chances.values()) == pytest.approx(1, abs=1e-3) for chances in facts["probabilities"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--text", "te=f"], "a checkpoint of a pretraining, which has no classifier"),
        (["--text", "te=f", "--text", "as=f"], "one language at a time"),
        (["--text", "te=f", "--out", "/nowhere/x"], "--out /nowhere/x: there is no folder /nowhere"),
        ([], "--text LANG=FILE is missing"),
    ],
)
def test_predicting_refuses(ground: Path, arguments: list[str], words: str) -> None:
    assert words in pool(1).run(call, "predict", "/", ["--checkpoint", f"{ground}/model", *arguments])[0]


def test_results_of_another_command_are_not_overwritten(ground: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (ground / "model").iterdir())
    for more in ([], flags("resume=auto")):
        words = command(ground, "pos", ground / "model", *more)
        assert "model holds the results of another command: choose another output" in run(words)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (ground / "model").iterdir()) == before


def test_a_grid_holds_one_engine_at_a_time() -> None:
    class Engine:
        """What a point of the grid holds."""

    class Fake(Search):
        alive: ClassVar[list[weakref.ref]] = []

        def _train(self, point: Point, signals: Any) -> Any:
            gc.collect()
            assert not any(reference() for reference in self.alive), "the engine of the point before"
            engine = Engine()
            self.alive.append(weakref.ref(engine))
            return SimpleNamespace(engine=engine, progress=SimpleNamespace(best=point.lr), tracker=self.tracker)

    finetune = load_config(FinetuneConfig, [], ["checkpoint=x", "finetune.lr=0.1,0.3,0.2"]).finetune
    job = SimpleNamespace(first=False, config=SimpleNamespace(finetune=finetune))
    search = Fake(job, SimpleNamespace(output=Path(), log=None))  # type: ignore[arg-type]
    assert {point.lr for point in search._search(None)} == {0.3} and len(Fake.alive) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "asked, tuned, precision", [(None, "fp32", "fp32"), ("fp32", "bf16", "fp32"), (None, "bf16", "bf16")]
)
def test_the_precision_of_predictions_is_the_fine_tunings(asked: str | None, tuned: str, precision: str) -> None:
    assert predict._precision(asked, tuned) == precision
    if not get_accelerator().is_fp16_supported():
        assert predict._precision(None, "fp16") in ("bf16", "fp32")
        with pytest.raises(UserError, match="no fp16 arithmetic"):
            predict._precision("fp16", "fp32")


def test_a_language_without_modules_is_named_with_the_option_of_predictions(ground: Path) -> None:
    config = load_config(FinetuneConfig, [], ["checkpoint=x"])
    with pytest.raises(UserError, match=r"--text sw: .* knows te, as; choose one of them with --modules LANG"):
        predict.module_of(None, config, Pretrained.open(str(ground / "model")), ["te"], "sw")


def test_a_studys_job_is_no_fine_tuning(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"name": "j", "units": [{"name": "joint.seed0"}]}))
    with pytest.raises(UserError, match="a job of a study: name one of its folders, joint.seed0"):
        opened(str(tmp_path))


def test_the_grid_is_searched_by_the_dev_set_and_resumed(ground: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    grid = flags("finetune.lr=1e-9,0.02", "finetune.head_lr=none", "finetune.seeds=3,4", "finetune.epochs=6")
    words = command(ground, "pos", out, *grid)
    words[words.index("te=split")] = f"te={ground}/data/pos-te"
    assert not run(words)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["chosen"]["lr"] == 0.02  # at 1e-9 nothing is learnt
    assert sorted(path.parent.name for path in out.glob("*/result.json")) == [
        "seed3-batch4-lr0.02",
        "seed3-batch4-lr1e-09",
        "seed4-batch4-lr0.02",
    ]
    dev = {path.parent.name: json.loads(path.read_text())["best"] for path in out.glob("*/result.json")}
    assert dev["seed3-batch4-lr0.02"] > dev["seed3-batch4-lr1e-09"]
    # done once more it trains nothing and reports the same
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/checkpoints/step-*/run.json")}
    words += flags("resume=auto")
    assert not run(words)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/checkpoints/step-*/run.json")} == stamps
    assert json.loads((out / "summary.json").read_text()) == summary
    assert "finetune.epochs is 4, was 6" in run([*words, *flags("finetune.epochs=4")])
    other = tmp_path / "other"  # of the same step
    shutil.copytree(ground / "model", other)
    rewrite(next(other.glob("checkpoints/step-*")), "another run")
    assert "pretrained weights is" in run([*words, *flags(f"checkpoint={other}")])


@pytest.mark.parametrize("task, tensor", [("ner", 1), ("qa", 2)])
def test_two_ranks_report_what_one_does(task: str, tensor: int, ground: Path, tmp_path: Path) -> None:
    exact = flags("finetune.dropout=0", "finetune.lr=0.01,0.02")
    one = command(ground, task, tmp_path / "one", *exact)
    two = command(ground, task, tmp_path / "two", *exact, *flags(f"parallel.tensor={tensor}"))
    assert not run(one) and not run(two, ranks=2)
    wanted, found = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert found == wanted
    for file in (tmp_path / "one" / "predictions" / "seed0").iterdir():
        assert (tmp_path / "two" / "predictions" / "seed0" / file.name).read_bytes() == file.read_bytes()


def test_transfer_is_correlated_with_closeness_on_synthetic_languages_only() -> None:
    targets = ["syn-close", "syn-mid", "syn-far"]
    options = {"train": {"syn": "synthetic"}, "test": dict.fromkeys(["syn", *targets], "synthetic")}
    scores = {"syn": [99.0, 98.0], "syn-close": [97.0, 96.0], "syn-mid": [81.0, 80.0], "syn-far": [60.0, 61.0]}
    found = _transfer(options, scores)
    assert found is not None and list(found["closeness"]) == targets
    assert found["rank_correlation"] == pytest.approx({"rho": 0.9561829, "low": 0.9561829, "high": 1.0}, abs=0.05)
    assert _transfer({"train": {"en": "file"}, "test": {"sw": "file"}}, {"sw": [1.0]}) is None
    assert _transfer(options, {"syn-close": [1.0], "syn-mid": [1.0]}) is None


def test_as_a_command_under_mlflow(ground: Path, tmp_path: Path) -> None:
    """A fresh process, its MLflow run nested under the pretraining run; then a refusal."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    client = MlflowClient(uri)
    parent = client.create_run(client.create_experiment("mlinterf_ds")).info.run_id
    model = tmp_path / "model"
    pool(1).run(bodies.pretrain, str(model))
    (checkpoint,) = model.glob("checkpoints/step-*")
    rewrite(checkpoint, parent)
    words = command(ground, "ner", tmp_path / "run", *flags(f"checkpoint={model}", "finetune.seeds=0,1"))
    words[words.index("tracking.enabled=false")] = "tracking.enabled=true"
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(ROOT / "launch" / "finetune.py")]
    done = subprocess.run([*script, *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "zero-shot" in done.stdout
    (job,) = client.search_runs(["1"], f"tags.mlflow.parentRunId = '{parent}'")
    assert {f"ner/{name}/f1/{code}" for name in ("test", "majority", "lexical") for code in bodies.LANGUAGES} <= set(
        job.data.metrics
    )
    seeds = client.search_runs(
        ["1"], f"tags.mlflow.parentRunId = '{job.info.run_id}'"
    )  # each has the names of a single one
    assert len(seeds) == 2 and {run.info.status for run in [job, *seeds]} == {"FINISHED"}
    for of_seed in seeds:
        assert {"ner/train/loss", "ner/dev/f1/te", "ner/test/f1/te", "ner/test/f1/as"} <= of_seed.data.metrics.keys()
        steps = [point.step for point in client.get_metric_history(of_seed.info.run_id, "ner/train/loss")]
        assert steps == list(range(1, 16)), "three epochs of five steps"
    assert job.data.metrics["ner/test/f1/te"] == pytest.approx(sum(r.data.metrics["ner/test/f1/te"] for r in seeds) / 2)
    assert "resume=auto" in run(words)
    # perplexity on any text is a run of its own there
    (tmp_path / "text").write_text("bak den\n" * 20)
    words = ["--checkpoint", str(model), "--text", "te=text", "--sentences", "2"]
    assert pool(1).run(call, "evaluate", str(tmp_path), words) == [""]
    (scored,) = client.search_runs(["1", "2"], "attributes.run_name = 'evaluate'")
    assert scored.data.tags["mlflow.parentRunId"] == parent and "evaluate/perplexity/te" in scored.data.metrics


def rewrite(checkpoint: Path, run_id: str) -> None:
    """Give a checkpoint a pretraining run in MLflow, that was tracked."""
    import hashlib

    saved = json.loads((checkpoint / "run.json").read_text()) | {"run_id": run_id}
    saved["config"]["tracking"]["enabled"] = True
    text = json.dumps(saved).encode()
    (checkpoint / "run.json").write_bytes(text)
    complete = json.loads((checkpoint / "complete.json").read_text())
    complete["files"]["run.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    (checkpoint / "complete.json").write_text(json.dumps(complete))


# --- which modules serve a language --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings, split, language, expected",
    [
        ([], "test", "as", 1),
        (["finetune.route=source"], "test", "as", 0),
        (["finetune.route=source"], "test", "sw", 0),
        (["finetune.route=source"], "dev", "as", 0),
        (["finetune.unseen=as"], "test", "sw", 1),
        (["finetune.unseen=as"], "train", "sw", 1),
        (["finetune.unseen=as"], "test", "te", 0),
        ([], "test", "sw", "no modules for 'sw'.*te, as.*finetune.unseen=LANG.*finetune.route=source"),
        ([], "train", "sw", "no modules for 'sw'"),
        (["finetune.unseen=xx"], "test", "te", "finetune.unseen=xx: .* no modules for it, it knows te, as"),
    ],
)
def test_routing(settings: list[str], split: str, language: str, expected: int | str, ground: Path) -> None:
    config = load_config(FinetuneConfig, [], ["checkpoint=x", *settings])
    options = {"train": {"te": "f"}, "dev": {"te": "f"}, "test": {"as": "f"}}
    pretrained = Pretrained.open(str(ground / "model"))
    if isinstance(expected, int):
        assert serving(config, pretrained, options, split, language) == expected
    else:
        with pytest.raises(UserError, match=expected):
            serving(config, pretrained, options, split, language)


def test_source_routing_needs_one_source(ground: Path) -> None:
    config = load_config(FinetuneConfig, [], ["checkpoint=x", "finetune.route=source"])
    options = {"train": {"te": "f", "as": "f"}, "dev": {"te": "f"}, "test": {"as": "f"}}
    with pytest.raises(UserError, match="one training language"):
        serving(config, Pretrained.open(str(ground / "model")), options, "test", "as")


# --- configuration ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings, words",
    [
        ([], "checkpoint is not set"),
        (["checkpoint=x", "finetune.lrr=1"], "did you mean finetune.lr"),
        (["checkpoint=x", "finetune.lr=0"], "greater than 0"),
        (["checkpoint=x", "finetune.seeds=1,1"], "named twice"),
        (["checkpoint=x", "resume=auto"], "output=FOLDER"),
        (["checkpoint=x", "finetune.batch="], "at least 1 item"),
        (["checkpoint=x", "finetune.labels=PERSON"], "finetune.labels=PERSON: expected OLD=NEW"),
        (["checkpoint=x", "finetune.freeze=all"], "'none', 'language' or 'shared'"),
    ],
)
def test_refused_settings(settings: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(FinetuneConfig, [], settings)


def test_lists_and_help(tmp_path: Path) -> None:
    config = load_config(
        FinetuneConfig, [], ["checkpoint=x", "finetune.batch=8,16", "finetune.lr=1e-3", "finetune.seeds=0,1,2"]
    )
    assert (config.finetune.batch, config.finetune.lr, config.finetune.seeds) == ([8, 16], [1e-3], [0, 1, 2])
    assert "finetune.route=target" in describe(FinetuneConfig)
    (tmp_path / "recipe.toml").write_text('checkpoint = "x"\n[finetune.labels]\nPERSON = "PER"\n')
    for recipes, settings in (([tmp_path / "recipe.toml"], []), ([], ["checkpoint=x", "finetune.labels=PERSON=PER"])):
        assert load_config(FinetuneConfig, recipes, settings).finetune.labels == {"PERSON": "PER"}
    assert Point(1, 8, 1e-3, 2e-3).name == "seed1-batch8-lr0.001-head0.002"


REAL = {
    "ner": ("ner/panx/sw/train.tsv", "ner/panx/te/dev.tsv"),
    "pos": ("pos/two_column/sw_masakhapos/train.txt", "pos/ud/te_mtg-ud-test.conllu"),
    "qa": ("qa/tydiqa_goldp/sw/train.json", "qa/tydiqa_goldp/te/dev.json"),
    "nli": ("nli/xnli/sw/test.tsv", "nli/xnli/hi/dev.tsv"),
}


@pytest.mark.parametrize("task", TASKS)
def test_real_files_run(task: str, ground: Path, shared_data: Path, tmp_path: Path) -> None:
    """A few real examples through everything; TyDiQA's withheld answers are predicted and not scored."""
    train, test = (shared_data / "tasks" / name for name in REAL[task])
    words = command(ground, task, tmp_path / "run")[:-8]
    words += flags("finetune.limit=12", "finetune.epochs=1", "finetune.unseen=te", "finetune.max_question=6")
    words += ["--train", f"sw={train}", "--dev", "sw=split", "--test", "sw=split", "--test", f"te={test}"]
    assert not run(words)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["examples"]["test"]["te"] == 12 and "sw" in summary["scores"]
    assert summary["unscored"] == (["te"] if task == "qa" else [])
    assert ("labels withheld" in (tmp_path / "run" / "table.md").read_text()) == (task == "qa")
    assert len(list((tmp_path / "run" / "predictions" / "seed0").iterdir())) == 2
