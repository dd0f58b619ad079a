"""Exported fine-tunings: stock pipelines, ours and MLflow's model predict what the fine-tuning's own test did, on whole files."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mlinterf_ds.data.foreign import vocabulary_file
from mlinterf_ds.data.prepare.main import vocabulary_of
from mlinterf_ds.export import card
from mlinterf_ds.export.hf import export
from mlinterf_ds.export.pyfunc import Model
from mlinterf_ds.pretrained import Finetuned, Point, opened
from mlinterf_ds.tasks import TASKS
from mlinterf_ds.tasks.ner import spans
from tests.mlflow_server import empty_store
from tests.parity import finetune_bodies as bodies
from tests.parity.bodies import REPOSITORY
from tests.parity.test_foreign_tokenizer import make as make_tokenizer
from tests.ranks import pool

transformers = pytest.importorskip("transformers")
import mlinterf_ds.export.modeling_mlinterf  # noqa: E402, F401  (registers its classes)

HEADS = {"ner": "Token", "pos": "Token", "qa": "QuestionAnswering", "nli": "Sequence"}
SETTINGS = {"qa": ["finetune.max_question=4", "finetune.stride=5"], "ner": [], "pos": [], "nli": []}
CASES = [(task, variant) for variant in ("joint", "adpt") for task in TASKS]
# A post-norm model with a vocabulary of RoBERTa's kind: byte-level, first words without a space, two </s> between texts.
FOREIGN = "foreign"
CASES += [("ner", FOREIGN), ("qa", FOREIGN), ("nli", FOREIGN)]
XMOD = "xmod"  # adapters in X-MOD's places, which transformers has as a class of its own
CASES += [("ner", XMOD), ("qa", XMOD), ("nli", XMOD)]
MEAN = "mean"  # words are tagged from all their pieces
VARIANTS = ["joint", "adpt", FOREIGN, XMOD]
PREFIXES = {"joint": "XLMRobertaXL", "adpt": "MLInterf", FOREIGN: "XLMRoberta", XMOD: "Xmod", MEAN: "MLInterf"}
POST = ["model.norm=post", "model.embedding_norm=true"]
SHAPES = {
    FOREIGN: ("joint", POST),
    MEAN: ("adpt", []),
    XMOD: ("adpt", [*POST, "model.adapter_after=ffn", "model.adapter_on=sum", "model.adapter_norm=layer", "model.adapter_skip=normed"]),
}  # fmt: skip


class Made(NamedTuple):
    """A fine-tuning: its exported folder, its task's test files, and what it predicted of them."""

    task: str
    variant: str
    run: Path
    folder: Path
    files: dict[str, Path]
    predictions: dict[str, list[Any]]

    def examples(self, language: str) -> list[Any]:
        return TASKS[self.task].read(self.files[language], language)

    def language(self, language: str) -> dict[str, str]:
        """The argument that a model with language-specific modules needs."""
        return {"language": language} if self.variant == "adpt" else {}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    folder = tmp_path_factory.mktemp("finetuned")
    bodies.write_data(folder / "data")

    @functools.cache
    def pretrained(variant: str) -> Path:
        out = folder / variant
        architecture, settings = SHAPES.get(variant, (variant, []))
        if variant == FOREIGN:
            out.mkdir()
            draw = random.Random(0)
            lines = (" ".join(draw.choice(bodies.WORDS) for _ in range(6)) for _ in range(300))
            make_tokenizer("bytes", folder / "roberta", lines, 500)
            (out / "tokenizer.model").write_bytes(vocabulary_file(folder / "roberta"))
        pool(1).run(bodies.pretrain, str(out), architecture, settings, "zero0", 1, 0.3)
        return out

    @functools.cache
    def make(task: str, variant: str) -> Made:
        run, out = folder / f"{task}-{variant}", folder / f"{task}-{variant}-exported"
        settings = ["finetune.dropout=0", *SETTINGS[task], *["finetune.word=mean"] * (variant == MEAN)]
        (result,) = pool(1).run(
            bodies.finetune, task, str(pretrained(variant)), str(folder / "data"), str(run), settings, "zero0", 1
        )
        export(str(run), out)
        files = {language: folder / "data" / f"{task}-{language}" for language in bodies.LANGUAGES}
        return Made(task, variant, run, out, files, result["predictions"])

    return make


def pipeline(model: Made, name: str, language: str) -> Any:
    """A pipeline of the folder; only our own classes and the answering of questions need the folder's code."""
    stock = model.variant != "adpt" and model.task != "qa"
    loaded = transformers.pipeline(name, str(model.folder), trust_remote_code=not stock)
    if model.variant == XMOD:  # whose pipelines take no language
        loaded.model.set_default_language(language)
    return loaded


@pytest.mark.parametrize("task, variant", CASES)
def test_the_class_its_weights_and_its_labels(made, task: str, variant: str) -> None:
    model = made(task, variant)
    name = f"{PREFIXES[variant]}For{HEADS[task]}{'' if task == 'qa' else 'Classification'}"
    assert json.loads((model.folder / "config.json").read_text())["architectures"] == [name]
    kind = getattr(transformers, f"AutoModelFor{name.partition('For')[2]}")
    loaded, facts = kind.from_pretrained(model.folder, output_loading_info=True)
    assert type(loaded).__name__ == name and not any(facts.values()), facts
    saved = json.loads(next((model.run / "checkpoints").glob("step-*/run.json")).read_text())
    wanted = ["start", "end"] if task == "qa" else saved["labels"]
    assert [loaded.config.id2label[number] for number in range(loaded.config.num_labels)] == wanted


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("language", bodies.LANGUAGES)
def test_entities_of_a_whole_file(made, variant: str, language: str) -> None:
    model = made("ner", variant)
    tag = pipeline(model, "ner", language)
    texts = [" ".join(sentence.words) for sentence in model.examples(language)]
    entities = tag(texts, aggregation_strategy="first", **model.language(language))
    assert any(entities)  # not all O
    for sentence, tags, answers in zip(model.examples(language), model.predictions[language], entities, strict=True):
        ends = [sum(map(len, sentence.words[: k + 1])) + k for k in range(len(sentence.words))]
        wanted = [(kind, ends[first] - len(sentence.words[first]), ends[end - 1]) for kind, first, end in spans(tags)]
        text = " ".join(sentence.words)
        trimmed = [answer["start"] + (text[answer["start"]] == " ") for answer in answers]
        assert [(a["entity_group"], s, a["end"]) for a, s in zip(answers, trimmed, strict=True)] == wanted


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("language", bodies.LANGUAGES)
def test_answers_of_a_whole_file(made, variant: str, language: str) -> None:
    model = made("qa", variant)
    answer, questions = pipeline(model, "question-answering", language), model.examples(language)
    answers = answer([{"question": q.question, "context": q.context} for q in questions], **model.language(language))
    assert [given["answer"] for given in answers] == model.predictions[language]
    assert all(q.context[a["start"] : a["end"]] == a["answer"] for q, a in zip(questions, answers, strict=True))
    tokenizer = vocabulary_of(model.folder)
    assert max(len(tokenizer.encode(q.context)) for q in questions) > bodies.LENGTH  # read in windows


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("language", bodies.LANGUAGES)
def test_labels_of_pairs_of_a_whole_file(made, variant: str, language: str) -> None:
    model = made("nli", variant)
    classify = pipeline(model, "text-classification", language)
    pairs = [{"text": pair.premise, "text_pair": pair.hypothesis} for pair in model.examples(language)]
    settings = model.language(language) if variant == "adpt" else {"truncation": True}
    assert [given["label"] for given in classify(pairs, **settings)] == model.predictions[language]


@pytest.mark.parametrize("task, variant", [*CASES, ("ner", MEAN)])
def test_mlflows_model_answers_requests(made, task: str, variant: str) -> None:
    pandas = pytest.importorskip("pandas")
    model = made(task, variant)
    examples = model.examples("as")
    rows = {
        "qa": lambda q: {"question": q.question, "context": q.context},
        "nli": lambda pair: {"text": pair.premise, "text_pair": pair.hypothesis},
    }.get(task, lambda sentence: {"text": " ".join(sentence.words)})
    frame = pandas.DataFrame([{**rows(example), "language": "as"} for example in examples])
    wanted = model.predictions["as"]
    wanted = [" ".join(tags) for tags in wanted] if task in ("ner", "pos") else wanted
    served = Model(model.folder)
    assert served.predict(frame) == wanted
    if variant == XMOD:  # a row's language is not that of the row before
        with pytest.raises(ValueError, match="a row has no language"):
            served.predict(pandas.DataFrame([rows(examples[0])]))
        served.default = "te"
        assert served.predict(pandas.DataFrame([rows(examples[0])])) == served.predict(frame[:1].assign(language="te"))
    if task in ("ner", "pos"):
        long = pandas.DataFrame({"text": [" ".join(["ba"] * 2000)], "language": "as"})
        with pytest.raises(ValueError, match=r"more than the \d+ pieces .* give a sentence in each row"):
            served.predict(long)


def test_words_that_are_tagged_from_all_their_pieces(made) -> None:
    """Otherwise than from the first ones; the card names the strategy of a pipeline that comes near."""
    pandas = pytest.importorskip("pandas")
    model = made("ner", MEAN)
    assert 'aggregation_strategy="average"' in (model.folder / "README.md").read_text()
    texts = [" ".join(sentence.words) for sentence in model.examples("as")]
    served = Model(model.folder)
    served.pipeline.model.config.finetuned["word"] = "first"
    frame = pandas.DataFrame({"text": texts, "language": "as"})
    assert served.predict(frame) != [" ".join(tags) for tags in model.predictions["as"]]
    loaded = transformers.pipeline("ner", str(model.folder), trust_remote_code=True)
    entities = loaded(texts, aggregation_strategy="average", language="as")
    near = 0
    for tags, answers in zip(model.predictions["as"], entities, strict=True):
        kinds = [kind for kind, _, _ in spans(tags)]
        near += kinds == [answer["entity_group"] for answer in answers]
    assert near >= 0.8 * len(texts)


def test_the_card_of_a_checkpoint_that_is_not_the_best_has_its_own_scores(made, tmp_path: Path) -> None:
    tuned = opened(str(made("ner", MEAN).run))
    assert isinstance(tuned, Finetuned)
    chosen = {"batch": 4, "lr": 0.1, "head_lr": 0.1}
    (tmp_path / "summary.json").write_text(json.dumps({"task": "ner", "seeds": [0], "chosen": chosen}))
    model = Finetuned(tmp_path / Point(0, **chosen).name / "checkpoints" / tuned.path.name, tuned.saved)
    assert model.is_best and model.summary
    assert "the best on the dev set" in card._epoch(model)
    progress = {"dev": [{"te": 90.0}, {"te": 80.0}], "best": 90.0, "best_epoch": 1, "best_step": 1, "epoch_loss": []}
    later = Finetuned(model.path, model.saved | {"progress": progress})
    assert not later.is_best and later.summary == {}
    assert "after 2 of" in card._epoch(later) and "| te | 80.0 |" in card._task_scores(later)
    between = Finetuned(model.path, model.saved | {"progress": progress | {"epoch_loss": [1.0]}})
    assert card._task_scores(between) == ["It was not evaluated at this step."]
    none = progress | {"dev": [], "best": -1.0, "best_epoch": 0, "best_step": 0, "epoch_loss": [1.0]}
    assert "after 0 of" in card._epoch(Finetuned(model.path, model.saved | {"progress": none}))


def test_the_classifier_of_texts_is_ours_to_single_precision(made) -> None:
    """The dense layer and the tanh that transformers' class has, and ours lacks, change nothing."""
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(
        made("nli", "joint").folder
    ).classifier.eval()
    features = torch.randn(50, 1, stock.dense.weight.shape[0], generator=torch.Generator().manual_seed(0)) * 5
    weight = stock.out_proj.weight.double() * stock.dense.weight[0, 0].double()
    wanted = features[:, 0].double() @ weight.T + stock.out_proj.bias.double()
    with torch.no_grad():
        torch.testing.assert_close(stock(features).double(), wanted, rtol=0, atol=2e-6 * wanted.abs().max().item())


REGISTERED = """
import sys, pandas, mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
print([column.name for column in model.metadata.signature.inputs.inputs])
print(model.predict(pandas.DataFrame({"text": ["ban de kos"], "language": ["te"]}))[0])
"""


def test_it_is_registered_and_read_without_a_network(made, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    model = made("ner", "adpt")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "HF_HOME": str(tmp_path / "cache")}

    def python(*arguments: str) -> list[str]:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    (tmp_path / "mlflow.db").write_bytes(empty_store())
    tool = str(REPOSITORY / "tools/export_hf.py")
    printed = python(tool, str(model.run), str(tmp_path / "out"), "--register", "tagger")
    assert "MLInterfForTokenClassification" in printed[-2] and "models:/tagger/1" in printed[-1]
    columns, tags = python("-c", REGISTERED, "models:/tagger/1")[-2:]
    assert columns == "['text', 'language']" and len(tags.split()) == 3
