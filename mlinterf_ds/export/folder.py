"""Reads the weights of a `transformers` model folder, from which a pretraining run can start.

It reads what `mlinterf_ds.export.hf` wrote, what transformers' `save_pretrained` made of that, and any XLM-RoBERTa-XL. It
needs safetensors and json alone, not transformers.
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
LISTING = "export.json"  # the file that holds size and digest of every other
VOCABULARY = ("embeddings.word.weight", "head.bias")  # exported without the padding of the vocabulary


def is_folder(path: Path) -> bool:
    """Whether this is a transformers model folder. A run's output folder has a config.json too, with other keys."""
    try:
        return "model_type" in json.loads((path / "config.json").read_text())
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
        pieces = tokenizer.pieces(self.path)
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
