"""The classifiers of exported fine-tunings: their weights and settings under the names that `transformers` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from mlinterf_ds.pretrained import Finetuned
from mlinterf_ds.sections import WordState
from mlinterf_ds.tasks import TASKS, Limits, Task
from mlinterf_ds.tasks.tagging import Tagger

TOKENS, TEXT, SPAN = "TokenClassification", "SequenceClassification", "QuestionAnswering"
# For each head, the names of its pipeline in `transformers`, and our class for it (see pipelines_mlinterf.py).
PIPELINES = {
    TOKENS: (("token-classification", "ner"), "TokenClassification"),
    TEXT: (("text-classification",), "TextClassification"),
    SPAN: (("question-answering",), "QuestionAnswering"),
}
# Transformers' classifier of texts has a dense layer and a tanh before its output, while ours has neither. If the dense
# layer multiplies by this small number, tanh returns its input with a relative error of at most 1e-6 for features up to 30;
# multiplying by a power of two rounds nothing.
LINEAR = 2.0**-14


def head_of(task: Task) -> str:
    """The head that a task has in `transformers`."""
    return SPAN if task.kind == "span" else TOKENS if isinstance(task, Tagger) else TEXT


def weights(model: Finetuned, classifier: Mapping[str, Tensor], kind: str | None) -> dict[str, Tensor]:
    """The classifier's parameters, converted from ours: weight (classes, width) and bias (classes,).

    kind: the model type of transformers' own class; None for the classes of modeling_mlinterf.py, which use our names.
    """
    weight, bias = classifier["classifier.weight"], classifier["classifier.bias"]
    if kind is None:
        return dict(classifier)
    head = head_of(TASKS[model.saved["config"]["task"]])
    if head == SPAN:
        return {"qa_outputs.weight": weight, "qa_outputs.bias": bias}
    if head == TOKENS:
        return dict(classifier)
    width = weight.shape[1]
    dense, output = (
        ("bert.pooler.dense", "classifier") if kind == "bert" else ("classifier.dense", "classifier.out_proj")
    )
    return {
        f"{dense}.weight": torch.eye(width) * LINEAR,
        f"{dense}.bias": torch.zeros(width),
        f"{output}.weight": weight / LINEAR,
        f"{output}.bias": bias,
    }


def configuration(model: Finetuned, encoder: dict[str, Any], modelling: str, pipelines: str) -> dict[str, Any]:
    """The content of config.json for a fine-tuning.

    encoder: the content for its encoder with the head for masked pieces. modelling, pipelines: the names of the files in
    the folder that hold our classes.
    """
    task = TASKS[model.saved["config"]["task"]]
    head, limits = head_of(task), limits_of(model)
    stock = "auto_map" not in encoder
    (architecture,) = encoder["architectures"]
    architecture = architecture.removesuffix("ForMaskedLM") + f"For{head}"
    names = ["start", "end"] if head == SPAN else model.labels
    tasks, pipeline = PIPELINES[head]
    tokenizer = model.pretrained.tokenizer()
    # The settings by which the pipeline that answers questions makes rows.
    rows = {**vars(limits), "separators": len(tokenizer.vocabulary.separator), "by_word": not tokenizer.foreign}
    config = encoder | {
        "architectures": [architecture],
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "finetuned": {"task": task.name, "no_answer": "none" in model.labels, "word": word_state(model), **rows},
    }
    config.pop("custom_pipelines", None)
    if not stock or head == SPAN:  # transformers has no pipeline that answers questions
        own = {"impl": f"{pipelines}.{pipeline}", "pt": [f"AutoModelFor{head}"]}
        config["custom_pipelines"] = dict.fromkeys(tasks, own)
    if not stock:
        kept = {key: encoder["auto_map"][key] for key in ("AutoConfig", "AutoModel")}
        config["auto_map"] = kept | {f"AutoModelFor{head}": f"{modelling}.{architecture}"}
    if "languages" in encoder and (default := default_language(model)):
        config["default_language"] = model.pretrained.origin.get("languages", {}).get(default, default)
    return config


def limits_of(model: Finetuned) -> Limits:
    """The limits on the length of rows in the fine-tuning."""
    return Limits.of(model.saved["config"]["finetune"], model.pretrained.positions)


def word_state(model: Finetuned) -> WordState:
    """What a word's tag is predicted from (`finetune.word`)."""
    return cast(WordState, model.saved["config"]["finetune"].get("word", "first"))


def default_language(model: Finetuned) -> str | None:
    """The language whose modules read every text (finetune.route=source); None if those of the text's own language do."""
    settings, trained_on = model.saved["config"]["finetune"], model.saved.get("trained_on", [])
    if settings["route"] != "source" or not trained_on:
        return None
    language: str = trained_on[0]
    return language if language in model.pretrained.languages else settings["unseen"]
