"""Writes a checkpoint, of a pretraining or a fine-tuning, as a `transformers` model folder: weights, configuration, tokenizer, card.

Transformers loads a model as a class of its own where one has the same graph (XLM-RoBERTa, X-MOD, XLM-RoBERTa-XL, or the class
that the model came from). It loads all others as `MLInterfForMaskedLM`, whose file the export copies to the folder. An
export needs neither DeepSpeed nor megatron.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from mlinterf_ds.engine.weights import CheckpointReader
from mlinterf_ds.errors import UserError
from mlinterf_ds.export import heads, tokenizer
from mlinterf_ds.export.card import card
from mlinterf_ds.export.classes import (
    OURS,
    OWN_KEYS,
    SPECIAL_IDS,
    Names,
    first_position,
    stock_config,
    stock_type,
    with_first_rows,
)
from mlinterf_ds.export.folder import LISTING, VOCABULARY
from mlinterf_ds.files import flushed_facts
from mlinterf_ds.pretrained import Finetuned, Pretrained, opened

MODELLING, PIPELINES = "modeling_mlinterf", "pipelines_mlinterf"  # files of this folder that exports hold too


def export(source: str, out: Path) -> dict[str, Any]:
    """Exports a checkpoint, or the best checkpoint of an output folder, to the new folder `out`: a pretraining's or a fine-tuning's.

    `out` appears when it is complete, or not at all. Returns its config.json.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; nothing was written: name a new folder")
    model = opened(source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as temporary:
            folder = Path(temporary) / "model"
            folder.mkdir()
            config = _write(model, folder)
            os.replace(folder, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    return config


def stock_class(pretrained: Pretrained) -> str | None:
    """The model type of the class of `transformers` with the same graph, by preference that which the model came from; or None."""
    kind = stock_type(pretrained.shape(), pretrained.variant)
    origin = pretrained.origin.get("model_type")
    if kind and _first_rows(pretrained, kind) > pretrained.positions:
        return (
            None  # the padding token is one of the last of its vocabulary: the class would need as many rows of zeros
        )
    return origin if kind == "xlm-roberta" and origin in ("roberta", "camembert", "bert") else kind


def _first_rows(pretrained: Pretrained, kind: str) -> int:
    """The number of rows that the class's position table has before the first position, and ours does not."""
    padded = pretrained.origin or {"pad_token_id": pretrained.tokenizer().vocabulary.pad}
    return first_position(kind, padded) - pretrained.shape().position_offset


def _write(model: Pretrained | Finetuned, folder: Path) -> dict[str, Any]:
    pretrained = model.pretrained if isinstance(model, Finetuned) else model
    vocabulary, kind = int(pretrained.saved["vocabulary"]), stock_class(pretrained)
    reader = CheckpointReader(pretrained.path)
    weights = {name: reader.whole(name) for name in reader.names}
    classifier = {name: weights.pop(name) for name in reader.names if name.startswith("classifier.")}
    weights |= {name: weights[name][:vocabulary].contiguous() for name in VOCABULARY if name in weights}
    if kind:
        languages = {code: code for code in pretrained.languages} | pretrained.origin.get("languages", {})
        weights = with_first_rows(weights, _first_rows(pretrained, kind))
        weights = Names(kind, languages).converted(weights, pretrained.shape().heads)
    config = configuration(pretrained)
    if isinstance(model, Finetuned):
        weights |= heads.weights(model, classifier, kind)
        config = heads.configuration(model, config, MODELLING, PIPELINES)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    # safetensors makes a file that only its owner can read
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    vocabulary_file = folder / "sentencepiece.model"  # for tools/prepare_corpus.py --tokenizer
    if not pretrained.tokenizer().foreign:
        shutil.copyfile(pretrained.path / "tokenizer.model", vocabulary_file)
    longest = heads.limits_of(model).max_length if isinstance(model, Finetuned) else pretrained.positions
    tokenizer.write(pretrained.tokenizer(), folder, longest)
    for name, needed in {MODELLING: not kind, PIPELINES: "custom_pipelines" in config}.items():
        if needed:
            shutil.copyfile(Path(__file__).with_name(f"{name}.py"), folder / f"{name}.py")
    (folder / "README.md").write_text(card(model, config), "utf-8")
    files = flushed_facts(sorted(path for path in folder.iterdir() if path.name != "README.md"))
    (folder / LISTING).write_text(
        json.dumps({"checkpoint": pretrained.path.name, "files": files}, indent=1) + "\n", "utf-8"
    )
    return config


def configuration(pretrained: Pretrained) -> dict[str, Any]:
    """The content of config.json."""
    shape, kind, origin = pretrained.shape(), stock_class(pretrained), pretrained.origin
    positions = shape.positions or pretrained.positions  # rows of the table
    special = pretrained.tokenizer().vocabulary
    config: dict[str, Any] = {
        "vocab_size": int(pretrained.saved["vocabulary"]),
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn,
        "hidden_dropout_prob": shape.dropout,
        "attention_probs_dropout_prob": shape.attention_dropout,
        "layer_norm_eps": shape.epsilon,
        "bos_token_id": special.bos,
        "pad_token_id": special.pad,
        "eos_token_id": special.eos,
        "tie_word_embeddings": True,
        "dtype": "float32",
    } | ({key: origin.get(key) for key in SPECIAL_IDS} if origin else {})
    if not kind:
        return config | _own_keys(pretrained, positions)
    if kind == "xmod":
        names = origin.get("languages", {})
        config |= {"languages": [names.get(code, code) for code in pretrained.languages]}
        config |= {"default_language": config["languages"][0]} if len(config["languages"]) == 1 else {}
    return config | stock_config(kind, shape, positions + _first_rows(pretrained, kind))


def _own_keys(pretrained: Pretrained, positions: int) -> dict[str, Any]:
    """The keys of config.json that are particular to our own class; positions: rows of its position table."""
    shape = pretrained.shape()
    return {
        "model_type": OURS,
        "architectures": ["MLInterfForMaskedLM"],
        "auto_map": {
            "AutoConfig": f"{MODELLING}.MLInterfConfig",
            "AutoModel": f"{MODELLING}.MLInterfModel",
            "AutoModelForMaskedLM": f"{MODELLING}.MLInterfForMaskedLM",
        },
        "custom_pipelines": {
            "fill-mask": {"impl": f"{PIPELINES}.FillMask", "pt": ["AutoModelForMaskedLM"]},
            "feature-extraction": {"impl": f"{PIPELINES}.FeatureExtraction", "pt": ["AutoModel"]},
        },
        "head_dim": shape.kv_channels,
        "max_position_embeddings": positions,
        "variant": pretrained.variant,
        "languages": pretrained.languages,
        "language_embeddings": shape.language_embeddings,
        "adapter_size": shape.adapter_width,
        "adapter_activation": shape.adapter_activation,
        **{key: getattr(shape, key) for key in OWN_KEYS},
    }
