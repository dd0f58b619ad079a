"""A `transformers` model folder as a source of weights, a `mlinterf_ds.engine.weights.Weights`.

Read are folders that `mlinterf_ds.export.hf` wrote, or that transformers' `save_pretrained` made of one, and any
XLM-RoBERTa-XL; by safetensors and json alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlinterf_ds.engine.space import Segment
from mlinterf_ds.engine.weights import sliced
from mlinterf_ds.errors import MALFORMED, UserError, refusing
from mlinterf_ds.export import tokenizer
from mlinterf_ds.export.names import from_stock, stock_name
from mlinterf_ds.files import check_files

OURS, STOCK = "mlinterf", "xlm-roberta-xl"
LISTING = "export.json"  # size and digest of every file
VOCABULARY = ("embeddings.word.weight", "head.bias")  # the padding of our vocabulary isn't exported


def is_folder(place: Path) -> bool:
    """Whether this is a transformers model folder (a run's output folder has a config.json too, of another kind)."""
    try:
        return "model_type" in json.loads((place / "config.json").read_text())
    except MALFORMED:
        return False


def verify(place: Path) -> None:
    """Compare the files with the list that the export left; nothing to compare if another program wrote the folder."""
    listing = place / LISTING
    if not listing.is_file():
        return
    with refusing(f"{listing}: damaged", "; export the model again"):
        files = json.loads(listing.read_bytes())["files"]
        check_files(place, files, f"; export it again, or delete {listing} if the change is meant")


class Folder:
    """Reads our parameters by name out of the safetensors of a folder."""

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
        # theirs may differ from ours in what no weight tells
        for key, wanted in {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "tie_word_embeddings": True}.items():
            if (found := self.config.get(key, wanted)) != wanted:
                raise UserError(f"{path / 'config.json'}: {key} is {found!r}, this encoder has {wanted!r}")
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
        """The vocabulary, by id."""
        found = tokenizer.pieces(self.path)
        if len(found) != self.vocabulary:
            raise UserError(
                f"{self.path}: its tokenizer has {len(found)} pieces, its model {self.vocabulary}: they don't belong "
                "together"
            )
        return found

    def has(self, name: str) -> bool:
        there = name if self.ours else stock_name(name)
        return there in self.files

    def read(self, wanted: Segment, kind: str, tensor: int, tensor_rank: int) -> Tensor:
        """The elements of one segment (1-d fp32) at the reader's layout; kind is 'master': a folder has no moments."""
        assert kind == "master", f"{self.path}: a model folder has no {kind}"
        whole = self.whole(wanted.name)
        if wanted.name in VOCABULARY and (short := wanted.shape[0] * tensor - len(whole)) > 0:
            whole = torch.cat([whole, whole.new_zeros(short, *whole.shape[1:])])
        return sliced(whole, wanted, tensor, tensor_rank, self.path)

    def whole(self, name: str) -> Tensor:
        """A parameter in its full shape, fp32; those of the vocabulary without its padding."""
        return self._stored(name) if self.ours else from_stock(name, self._stored, self.heads)

    def _stored(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"{self.path}: has no parameter {name}; it has another variant, language or shape")
        return self.files[name].get_tensor(name).float()
