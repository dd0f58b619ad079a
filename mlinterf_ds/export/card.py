"""The model card of an exported checkpoint: what is told in it; its text is in card.md.j2."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mlinterf_ds.errors import UserError
from mlinterf_ds.export.heads import LINEAR, SPAN, TEXT, TOKENS, default_language, head_of, word_state
from mlinterf_ds.files import markdown_table, read_json, sha256
from mlinterf_ds.pretrained import Finetuned, Pretrained
from mlinterf_ds.sections import MetaConfig, has_adapters, is_meta, is_routed
from mlinterf_ds.tasks import TASKS

TAGS = {TOKENS: "token-classification", TEXT: "text-classification", SPAN: "question-answering"}  # Hugging Face's

VARIANTS = {
    "adpt": "each language has its own residual adapters after attention and feed-forward",
    "ffn": "each language has its own feed-forward layers",
    "attn": "each language has its own attention layers",
    "share_adpt": "all languages share one set of residual adapters",
    "mono": "the model knows one language",
    "joint": "all languages share all parameters",
}


def card(model: Pretrained | Finetuned, config: dict[str, Any]) -> str:
    """The text of README.md: what the model is and scores, how it was trained and how to load it; config: its config.json.

    UserError for a variant whose modules the exported class lacks.
    """
    pretrained = model.pretrained if isinstance(model, Finetuned) else model
    if pretrained.variant not in VARIANTS:
        raise UserError(
            f"{pretrained.path}: variant {pretrained.variant} cannot be exported; its modules belong into "
            "export/modeling_mlinterf.py, and a sentence on them into export/card.py"
        )
    facts = _finetuned(model, config) if isinstance(model, Finetuned) else _pretrained(model)
    environment = Environment(
        loader=PackageLoader("mlinterf_ds.export", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    variant = pretrained.run_variant
    return environment.get_template("card.md.j2").render(
        pretrained=pretrained, config=config, variant=variant, shape=pretrained.shape(), languages=pretrained.languages,
        name=model.saved["config"].get("name", "model"), saved=model.saved, is_routed=is_routed(variant), is_meta=is_meta(variant),
        has_adapters=has_adapters(variant), departures=_departures(pretrained), modules=VARIANTS[pretrained.variant], **facts,
    )  # fmt: skip


def _pretrained(model: Pretrained) -> dict[str, Any]:
    """What is told of a pretraining."""
    config = model.saved["config"]
    return {
        "tuned": None,
        "pipeline": "fill-mask",
        "train": config.get("train", {}),
        "scores": "\n".join(_perplexities(model)),
        "language": f', language="{model.languages[-1]}"',
        "licence": _licence({"manifest": model.saved.get("manifest"), **config}),
    }


def _perplexities(pretrained: Pretrained) -> list[str]:
    """A table of each language's last validation perplexity before the checkpoint, beside that of its unigrams."""
    history = {code: points[-1] for code, points in pretrained.saved.get("history", {}).items() if points}
    if not history:
        return ["It was not evaluated during its training."]
    path = pretrained.path.resolve().parents[1] / "summary.json"
    floors = read_json(path).get("unigram_perplexity", {}) if path.is_file() else {}
    rows = [
        [code, f"{perplexity:.2f}", f"{floors[code]:.1f}" if code in floors else "", step]
        for code, (step, perplexity) in history.items()
    ]
    return markdown_table(["language", "validation perplexity", "unigram", "at step"], rows)


def _finetuned(model: Finetuned, config: dict[str, Any]) -> dict[str, Any]:
    """What is told of a fine-tuning."""
    saved, task = model.saved, model.saved["config"]["task"]
    head, source, remarks = head_of(TASKS[task]), saved.get("source", {}), []
    default = default_language(model) if "auto_map" in config else None
    if default:
        remarks.append(f"Every text is read by the modules of `{default}`, unless a call names another `language=`.")
    if head == TEXT and "auto_map" not in config:
        remarks.append(
            "The dense layer of the classifier is the identity times "
            f"2^{math.log2(LINEAR):.0f}, where tanh is linear: this model was trained without it."
        )
    if config["model_type"] == "xmod" and "default_language" not in config:
        remarks.append("Its pipelines read the language that `pipeline.model.set_default_language(...)` names.")
    if head == TOKENS:
        remarks.append("A text longer than a row is cut: give sentences, or `stride=` to read it in overlapping parts.")
    if head == TOKENS and word_state(model) == "mean":
        remarks.append(
            "A word's label was learned from the mean of its pieces' logits; the pipeline averages their probabilities, which may "
            "differ where two labels are near each other."
        )
    named = "auto_map" in config and not default
    return {
        "tuned": model,
        "pipeline": TAGS[head],
        "task": task,
        "head": head,
        "trained_on": ", ".join(saved.get("trained_on", [])) or "one language",
        "point": saved["point"],
        "epoch": _epoch(model),
        "source": source,
        "examples": model.summary.get("examples", {}).get("train", {}),
        "scores": "\n".join(_task_scores(model)),
        "aggregation": {"first": "first", "mean": "average"}[word_state(model)],
        "folder": "FOLDER, trust_remote_code=True" if "custom_pipelines" in config else "FOLDER",
        "language": f', language="{model.pretrained.languages[-1]}"' if named else "",
        "remarks": remarks,
        "licence": _licence(source),
    }


def _task_scores(model: Finetuned) -> list[str]:
    """A table of this seed's scores on every test set beside the baselines'; without a summary, of those on the dev sets."""
    summary, progress = model.summary, model.saved["progress"]
    if not summary:
        if not _evaluated(model):
            return ["It was not evaluated at this step."]
        scores = progress["dev"][-1]
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


def _evaluated(model: Finetuned) -> bool:
    """Whether the checkpoint was saved at the end of an epoch, where the dev sets are scored."""
    progress = model.saved["progress"]
    return bool(progress["dev"]) and not progress["epoch_loss"]


def _epoch(model: Finetuned) -> str:
    """How far the fine-tuning had come, in words."""
    progress, epochs = model.saved["progress"], model.saved["config"]["finetune"]["epochs"]
    if model.is_best:
        return f"epoch {progress['best_epoch']} of {epochs}, the best on the dev set ({progress['best']:.1f})"
    return f"step {model.pretrained.step}, after {len(progress['dev'])} of {epochs} epochs"


def _departures(pretrained: Pretrained) -> list[str]:
    """How the model and its training differ from the paper's."""
    config, variant, shape = pretrained.saved["config"], pretrained.variant, pretrained.shape()
    said = ["it is pre-norm (XLM is post-norm)"] * (shape.norm == "pre")
    said += ["the embeddings have no LayerNorm"] * (not shape.embedding_norm)
    said += ["queries and keys are rotated by their positions (XLM adds a table's)"] * (shape.position_kind == "rotary")
    if has_adapters(variant):
        before, after = "before the residual sum, after the sublayer's dropout", "after the residual sum"
        place = after if shape.adapter_on == "sum" else before
        said.append(f"adapters use {shape.adapter_activation} and stand {place}")
    said += ["all languages share the norms"] * (variant in ("ffn", "attn"))
    said += pretrained.row_format.departures
    if is_meta(pretrained.run_variant) and "meta" in config:
        said += MetaConfig(**config["meta"]).departures(config.get("data", {}).get("mixed", False))
    return [*said, "all models of a study share one vocabulary"]


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
