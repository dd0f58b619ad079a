"""The model card of an exported checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mlinterf_ds.export.heads import LINEAR, SPAN, TEXT, TOKENS, default_language, head_of
from mlinterf_ds.files import markdown_table, read_json, sha256
from mlinterf_ds.pretrained import Finetuned, Pretrained
from mlinterf_ds.sections import MetaConfig, has_adapters, is_meta, is_routed
from mlinterf_ds.tasks import TASKS

ROUTED = {
    "adpt": "each language has its own residual adapters after attention and feed-forward",
    "ffn": "each language has its own feed-forward layers",
    "attn": "each language has its own attention layers",
    "share_adpt": "all languages share one set of residual adapters",
    "mono": "the model knows one language",
    "joint": "all languages share all parameters",
}
STOCK_USE = """\
```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForMaskedLM.from_pretrained(FOLDER).eval()
logits = model(**tokenizer("... <mask> ...", return_tensors="pt")).logits
```"""
ROUTED_USE = """\
```python
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True).eval()
tokens = tokenizer("... <mask> ...", return_tensors="pt")
logits = model(**tokens, language=CODE).logits  # or one code for each row
encoder = AutoModel.from_pretrained(FOLDER, trust_remote_code=True).eval()  # without the head
hidden = encoder(**tokens, language=CODE).last_hidden_state
fill = pipeline("fill-mask", FOLDER, trust_remote_code=True)  # "feature-extraction" takes a language too
fill("... <mask> ...", language=CODE)
model.set_default_language(CODE)  # from here on, calls need no language=
```

After `import mlinterf_ds.export.modeling_mlinterf` the two models need no `trust_remote_code=True`; pipelines always do."""

HEAD_USE = {
    TOKENS: """\
tag = pipeline("ner", FOLDER, aggregation_strategy="first")  # a word has its first piece's label
tag("...")""",
    TEXT: """\
classify = pipeline("text-classification", FOLDER)
classify({"text": "...", "text_pair": "..."}, truncation=True)""",
    SPAN: """\
answer = pipeline("question-answering", FOLDER)
answer(question="...", context="...")""",
}


def card(model: Pretrained | Finetuned, config: dict[str, Any]) -> str:
    """The text of README.md: what the model is and scores, how it was trained and how to load it; config: its config.json."""
    if isinstance(model, Finetuned):
        pretrained, heading, training = model.pretrained, _task_heading(model), _finetuning(model)
        scores, use, source = _task_scores(model), _task_use(model, config), model.saved.get("source", {})
    else:
        pretrained, heading, training = model, _heading(model), _pretraining(model)
        scores, use = _perplexities(model), STOCK_USE
        if "auto_map" in config:
            use = ROUTED_USE.replace("CODE", json.dumps(model.languages[-1]))
        source = {"manifest": model.saved.get("manifest"), **model.saved["config"]}
    lines = [*heading, *_shape(pretrained), *training, "", "## Scores", "", *scores, "", "## Use", "", use, ""]
    lines += [_reading(pretrained), "", "## Limits and licence", "", _departures(pretrained), "", _licence(source)]
    return "\n".join(lines) + "\n"


def _shape(pretrained: Pretrained) -> list[str]:
    """What the model is made of."""
    variant, shape = pretrained.run_variant, pretrained.shape()
    how = "by the meta step (Algorithm 1 of the paper)" if is_meta(variant) else "with all other parameters"
    trained = f", trained {how}" if is_routed(variant) else ""
    width = f", adapters of width {shape.adapter_width} ({shape.adapter_activation})" if has_adapters(variant) else ""
    return [
        f"- Variant `{variant}`: {ROUTED[pretrained.variant]}{trained}.",
        f"- {shape.layers} layers, width {shape.width}, {shape.heads} heads of width {shape.kv_channels}, feed-forward "
        f"{shape.ffn}{width}, a vocabulary of {pretrained.saved['vocabulary']} pieces, rows of up to "
        f"{pretrained.positions} pieces.",
    ]


def _reading(pretrained: Pretrained) -> str:
    """How the tokenizer reads a text."""
    if pretrained.tokenizer().foreign:
        return "The tokenizer is that of the model whose vocabulary the corpus took."
    return (
        "The tokenizer reads `<mask>` and the other special pieces in a text as such. It gives all other text the ids of "
        "`sentencepiece.model`, after NFC normalisation and with single spaces."
    )


def _yaml(languages: list[str], pipeline: str, tags: list[str]) -> list[str]:
    """The head of the card, in YAML, which programs read."""
    lines = ["---", "language:", *(f"- {json.dumps(code)}" for code in languages)]
    lines += ["library_name: transformers", f"pipeline_tag: {pipeline}", "tags:"]
    return [*lines, *(f"- {tag}" for tag in tags), "---"]


# --- a pretraining -------------------------------------------------------------------------------------------------------
def _heading(pretrained: Pretrained) -> list[str]:
    languages = pretrained.languages
    return [
        *_yaml(languages, "fill-mask", ["multilingual", "mlinterf"]),
        f"# {pretrained.saved['config'].get('name', 'model')}: {pretrained.run_variant} on {', '.join(languages)}",
        "",
        "A masked language model of mlinterf_ds, a study of negative interference between languages "
        "([arXiv:2010.03017](https://arxiv.org/abs/2010.03017)).",
        "",
    ]


def _pretraining(pretrained: Pretrained) -> list[str]:
    """How the model was trained."""
    saved, train = pretrained.saved, pretrained.saved["config"].get("train", {})
    lines = [f"- {saved['updates']} steps, checkpoint `{pretrained.path.name}`."]
    if "batch" in train:
        tokens = saved["updates"] * train["batch"] * pretrained.positions
        share = f"{pretrained.row_format.mask_share:.0%} of a row masked"
        lines.append(
            f"- A step read {train['batch']} rows: {tokens:,} pieces in all, {share}; peak learning rate {train['lr']:g}, "
            f"seed {train['seed']}."
        )
    return lines


def _perplexities(pretrained: Pretrained) -> list[str]:
    """A table of each language's last validation perplexity before the checkpoint, beside that of its unigrams."""
    history = {code: points[-1] for code, points in pretrained.saved.get("history", {}).items() if points}
    if not history:
        return ["It was not evaluated during its training."]
    path = pretrained.path.parents[1] / "summary.json"
    floors = read_json(path).get("unigram_perplexity", {}) if path.is_file() else {}
    rows = [
        [code, f"{perplexity:.2f}", f"{floors[code]:.1f}" if code in floors else "", step]
        for code, (step, perplexity) in history.items()
    ]
    return markdown_table(["language", "validation perplexity", "unigram", "at step"], rows)


# --- a fine-tuning -------------------------------------------------------------------------------------------------------
def _task_heading(model: Finetuned) -> list[str]:
    task, languages = model.saved["config"]["task"], model.pretrained.languages
    trained_on = ", ".join(model.saved.get("trained_on", [])) or "one language"
    pipeline = {TOKENS: "token-classification", TEXT: "text-classification", SPAN: "question-answering"}
    return [
        *_yaml(languages, pipeline[head_of(TASKS[task])], ["multilingual", "mlinterf", task]),
        f"# {model.saved['config'].get('name', 'model')}: {task}, fine-tuned on {trained_on}",
        "",
        f"A model of {', '.join(languages)} with a classifier for the task `{task}`, fine-tuned on {trained_on}. From mlinterf_ds, a "
        "study of negative interference between languages ([arXiv:2010.03017](https://arxiv.org/abs/2010.03017)).",
        "",
        f"- Labels: {', '.join(f'`{label}`' for label in model.labels)}.",
    ]


def _finetuning(model: Finetuned) -> list[str]:
    """How the model was trained."""
    point, progress, source = model.saved["point"], model.saved["progress"], model.saved.get("source", {})
    epochs = model.saved["config"]["finetune"]["epochs"]
    counts = model.summary.get("examples", {}).get("train", {})
    read = f" on {', '.join(f'{count:,} examples of {code}' for code, count in counts.items())}" if counts else ""
    lines = [
        f"- Fine-tuned{read}: epoch {progress['best_epoch']} of {epochs}, the best on the dev set "
        f"({progress['best']:.1f}); {point['batch']} rows a step, peak learning rate {point['lr']:g}, of the classifier "
        f"{point['head_lr']:g}, seed {point['seed']}."
    ]
    if source.get("steps") is not None:
        rows = f" of {source['rows']} rows" if source.get("rows") else ""
        lines.append(f"- Pretrained for {source['steps']} steps{rows}, checkpoint `{Path(source['checkpoint']).name}`.")
    return lines


def _task_scores(model: Finetuned) -> list[str]:
    """A table of this seed's scores on every test set beside the baselines'; without a summary, of those on the dev sets."""
    summary, progress = model.summary, model.saved["progress"]
    if not summary:
        scores = progress["dev"][progress["best_epoch"] - 1]
        return markdown_table(["language", "dev score"], [[code, f"{score:.1f}"] for code, score in scores.items()])
    seed = summary["seeds"].index(model.saved["point"]["seed"])
    metric, floors = summary["metric"], summary["baselines"]
    names = sorted({name for scores in floors.values() for name in scores}, reverse=True)
    rows = []
    for code, values in summary["per_seed"].items():
        cells = [code, summary["setting"][code], summary["examples"]["test"][code], f"{values[seed]:.1f}"]
        rows.append(cells + [f"{floors[code][name][metric]:.1f}" if name in floors[code] else "" for name in names])
    lines = markdown_table(["language", "setting", "examples", metric, *names], rows)
    return [*lines, "", "The columns after the score are baselines that need no model: see the task's guide."]


def _task_use(model: Finetuned, config: dict[str, Any]) -> str:
    head = head_of(TASKS[model.saved["config"]["task"]])
    code, remarks = HEAD_USE[head], []
    if "custom_pipelines" in config:
        code = code.replace("FOLDER", "FOLDER, trust_remote_code=True")
    if "auto_map" in config:
        default = default_language(model)
        if default:
            remarks.append(
                f"Every text is read by the modules of `{default}`, unless a call names another `language=`."
            )
        else:
            language = json.dumps(model.pretrained.languages[-1])
            code = f"{code.removesuffix(')')}, language={language})"
    elif head == TEXT:
        remarks.append(
            "The dense layer of the classifier is the identity times "
            f"2^{math.log2(LINEAR):.0f}, where tanh is linear: this model was trained without it."
        )
    if config["model_type"] == "xmod" and "default_language" not in config:
        remarks.append("Its pipelines read the language that `pipeline.model.set_default_language(...)` names.")
    if head == TOKENS:
        remarks.append("A text longer than a row is cut: give sentences, or `stride=` to read it in overlapping parts.")
    lines = ["```python", "from transformers import pipeline", "", code, "```"]
    return "\n".join([*lines, *(["", " ".join(remarks)] if remarks else [])])


def _departures(pretrained: Pretrained) -> str:
    """How the model and its training differ from the paper's."""
    config, variant, shape = pretrained.saved["config"], pretrained.variant, pretrained.shape()
    said = ["it is pre-norm (XLM is post-norm)"] * (shape.norm == "pre")
    said += ["the embeddings have no LayerNorm"] * (not shape.embedding_norm)
    said += ["queries and keys are rotated by their positions (XLM adds a table's)"] * (shape.position_kind == "rotary")
    if has_adapters(variant):
        place = (
            "before the residual sum, after the sublayer's dropout"
            if shape.adapter_on != "sum"
            else "after the residual sum"
        )
        said.append(f"adapters use {shape.adapter_activation} and stand {place}")
    said += ["all languages share the norms"] * (variant in ("ffn", "attn"))
    said += pretrained.row_format.departures
    said += MetaConfig(**config["meta"]).departures if is_meta(pretrained.run_variant) and "meta" in config else []
    said.append("all models of a study share one vocabulary")
    return (
        f"The model departs from the paper in these ways: {'; '.join(said)}. Perplexities of models with different vocabularies "
        "cannot be compared."
    )


def _licence(source: dict[str, Any]) -> str:
    """A sentence on the licences of the texts, with the note in the corpus's manifest if the corpus still exists unchanged.

    source: the corpus of the pretraining and the digest of its manifest.
    """
    note, corpus = "", source.get("corpus") or ""
    manifest = Path(corpus) / "manifest.json"
    if manifest.is_file() and sha256(manifest) == source.get("manifest"):
        note = json.loads(manifest.read_bytes()).get("licence", "")
    if corpus == "synthetic":
        return "Trained on synthetic text only."
    return f"The licences of the texts (corpus `{Path(corpus).name}`) apply: {note or 'see the notes of the corpus.'}"
