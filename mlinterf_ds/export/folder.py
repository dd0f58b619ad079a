"""Reads the weights of a `transformers` model folder, from which a pretraining run can start.

It reads what `mlinterf_ds.export.hf` wrote, what transformers' `save_pretrained` wrote from that model, and any XLM-RoBERTa-XL
(pre-norm, tied), which is the same model as our encoder under other names. It needs safetensors and json alone, not
transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlinterf_ds.engine.space import Segment
from mlinterf_ds.engine.weights import sliced
from mlinterf_ds.errors import MALFORMED, UserError, refusing
from mlinterf_ds.files import check_files

OURS, STOCK = "mlinterf", "xlm-roberta-xl"
LISTING = "export.json"  # the file that holds size and digest of every other
VOCABULARY = ("embeddings.word.weight", "head.bias")  # exported without the padding of the vocabulary

# Our encoder keeps each head's query, key and value side by side in one projection. XLM-RoBERTa-XL has three projections,
# two more position embeddings (its positions count from after the padding index), and an embedding of the token type, which
# it adds at every position.
FIRST_POSITION = 2  # XLM-RoBERTa-XL's index of a row's first position
WORDS, POSITIONS, TYPES = (
    f"roberta.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
)
TOP = {
    "embeddings.word": "roberta.embeddings.word_embeddings",
    "block.final_layernorm": "roberta.encoder.LayerNorm",
    "head": "lm_head",  # the bias of the output
    "head.dense": "lm_head.dense",
    "head.norm": "lm_head.layer_norm",
}
LAYER = {
    "input_layernorm": "attention.self_attn_layer_norm",
    "self_attention.linear_qkv": "attention.self.query",  # and key and value
    "self_attention.linear_proj": "attention.output.dense",
    "pre_mlp_layernorm": "LayerNorm",
    "mlp.linear_fc1": "intermediate.dense",
    "mlp.linear_fc2": "output.dense",
}


def is_folder(path: Path) -> bool:
    """Whether this is a transformers model folder. A run's output folder has a config.json too, with other keys."""
    try:
        return "model_type" in json.loads((path / "config.json").read_bytes())
    except MALFORMED:
        return False


def verify(path: Path) -> None:
    """Compares the files with the digests that the export wrote. A folder of another program has none, and passes."""
    listing = path / LISTING
    if not listing.is_file():
        return
    with refusing(f"{listing}: damaged", "; export the model again"):
        files = json.loads(listing.read_bytes())["files"]
        check_files(path, files, f"; export it again, or delete {listing} if you meant to change the file")


class Folder:
    """A model folder as a source of weights (`mlinterf_ds.engine.weights.Weights`), by our parameters' names."""

    def __init__(self, path: Path):
        self.path = path
        with refusing(f"{path / 'config.json'}: not a model's configuration"):
            self.config: dict[str, Any] = json.loads((path / "config.json").read_bytes())
            kind = self.config["model_type"]
            self.heads = int(self.config["num_attention_heads"])
            self.adapter_activation: str | None = self.config.get("adapter_activation")
            self.vocabulary = int(self.config["vocab_size"])
        if kind not in (OURS, STOCK):
            raise UserError(f"{path}: a model of type {kind!r}; only {OURS} and {STOCK} have the shape of this encoder")
        self.ours = kind == OURS
        # A model may differ from our encoder in settings that no weight shows.
        for key, expected in {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "tie_word_embeddings": True}.items():
            if (value := self.config.get(key, expected)) != expected:
                raise UserError(f"{path / 'config.json'}: {key} is {value!r}, this encoder has {expected!r}")
        self.files: dict[str, Any] = {}
        try:
            for file in sorted(path.glob("model*.safetensors")):
                opened = safe_open(file, framework="pt")
                self.files |= dict.fromkeys(opened.keys(), opened)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); export or copy it again") from None
        if not self.files:
            raise UserError(f"{path}: has no model.safetensors; save the model there with save_pretrained")

    @property
    def pieces(self) -> list[str]:
        """The pieces of the vocabulary, by id."""
        pieces = stored_pieces(self.path)
        if len(pieces) != self.vocabulary:
            raise UserError(
                f"{self.path}: the tokenizer has {len(pieces)} pieces and the model {self.vocabulary}: they are not of "
                "one model"
            )
        return pieces

    def has(self, name: str) -> bool:
        """Whether the folder has our parameter of this name."""
        return (name if self.ours else stock_name(name)) in self.files

    def read(self, wanted: Segment, kind: str, tensor: int, tensor_rank: int) -> Tensor:
        """The elements of one segment (1-d fp32) at the reader's layout. kind must be 'master': a folder has no moments."""
        assert kind == "master", f"{self.path}: a model folder has no {kind}"
        whole = self.whole(wanted.name)
        if wanted.name in VOCABULARY and (missing := wanted.shape[0] * tensor - len(whole)) > 0:
            whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
        return sliced(whole, wanted, tensor, tensor_rank, self.path)

    def whole(self, name: str) -> Tensor:
        """A parameter in its full shape, fp32. Parameters of the vocabulary lack its padding."""
        return self._stored(name) if self.ours else from_stock(name, self._stored, self.heads)

    def _stored(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(
                f"{self.path}: has no parameter {name}: its variant, languages or shape are others than this run's"
            )
        return self.files[name].get_tensor(name).float()


def stored_pieces(folder: Path) -> list[str]:
    """The pieces of a folder's tokenizer.json, by id."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: save the tokenizer there with transformers' tokenizer.save_pretrained")
    with refusing(f"{path}: not a tokenizer"):
        content = json.loads(path.read_bytes())
        vocabulary = content["model"]["vocab"]
        ids = vocabulary if isinstance(vocabulary, dict) else {piece: id for id, (piece, _) in enumerate(vocabulary)}
        ids = ids | {added["content"]: added["id"] for added in content["added_tokens"]}
        ordered = sorted(ids, key=ids.__getitem__)
        if [ids[piece] for piece in ordered] != list(range(len(ordered))):
            raise ValueError("its ids are not 0, 1, 2, ...")
    return ordered


def stock_name(name: str) -> str | None:
    """XLM-RoBERTa-XL's name of our parameter (the query's, for the joint projection); None if it has no such part."""
    module, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"block\.layers\.(\d+)\.(.+)", module):
        part = LAYER.get(match[2])
        return part and f"roberta.encoder.layer.{match[1]}.{part}.{kind}"
    if name == "embeddings.position.weight":
        return POSITIONS
    return f"{TOP[module]}.{kind}" if module in TOP else None


def from_stock(name: str, read: Callable[[str], Tensor], heads: int) -> Tensor:
    """Our parameter of this name in its full shape; read: returns XLM-RoBERTa-XL's parameter of a name."""
    stock = stock_name(name)
    assert stock, f"{name} is no part of an XLM-RoBERTa-XL"
    if stock == POSITIONS:
        return read(POSITIONS)[FIRST_POSITION:] + read(TYPES)[0]
    if ".linear_qkv." in name:
        parts = [read(stock.replace("query", part)).unflatten(0, (heads, -1)) for part in ("query", "key", "value")]
        return torch.stack(parts, dim=1).flatten(0, 2)
    return read(stock)


def to_stock(weights: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """XLM-RoBERTa-XL's parameters, converted from all of ours."""
    converted: dict[str, Tensor] = {}
    for name, weight in weights.items():
        stock = stock_name(name)
        assert stock, f"{name} is no part of an XLM-RoBERTa-XL"
        if stock == POSITIONS:
            converted[POSITIONS] = torch.cat([weight.new_zeros(FIRST_POSITION, weight.shape[1]), weight])
            converted[TYPES] = weight.new_zeros(1, weight.shape[1])
        elif ".linear_qkv." in name:
            for number, part in enumerate(("query", "key", "value")):
                converted[stock.replace("query", part)] = weight.unflatten(0, (heads, 3, -1))[:, number].flatten(0, 1)
        else:
            converted[stock] = weight
    return {name: weight.contiguous() for name, weight in converted.items()}
