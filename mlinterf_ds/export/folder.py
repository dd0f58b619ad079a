"""Reads the weights of a `transformers` model folder, from which a pretraining run can start.

It reads the folders that `mlinterf_ds.export.hf` wrote, and any encoder of the classes in `mlinterf_ds.export.classes`, one
tensor at a time, and only the rows of the word embeddings that are needed. It works without transformers, and unpickles
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlinterf_ds.data.foreign import FAIRSEQ, piece_ids, vocabulary_file
from mlinterf_ds.data.tokenizer import Tokenizer, by_id
from mlinterf_ds.engine.space import Segment
from mlinterf_ds.engine.weights import check_shape
from mlinterf_ds.errors import MALFORMED, UserError, refusing
from mlinterf_ds.export.classes import OURS, SPECIAL_IDS, Names, check, joined, language_of, model_keys
from mlinterf_ds.files import check_files

LISTING = "export.json"  # the file that holds size and digest of every other
INDEX = "model.safetensors.index.json"  # lists the tensors where weights lie in several files
ROWS = 1 << 14  # of the vocabulary that are read at once
VOCABULARY = ("embeddings.word.weight", "head.bias")  # exported without the padding of the vocabulary
CONVERT = (
    "convert it once with transformers, on a machine where you trust the file: AutoModelForMaskedLM.from_pretrained(FOLDER)"
    ".save_pretrained(NEW), and give NEW"
)


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


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of a model folder's config.json, and the keys of `model` that give its shape.

    Raises UserError if this encoder cannot be a model of its class.
    """
    where = path / "config.json"
    with refusing(f"{where}: not a model's configuration"):
        config: dict[str, Any] = json.loads(where.read_bytes())
        check(config, str(where))
        return config, model_keys(config)


class Folder:
    """A model folder as a source of weights (`mlinterf_ds.engine.weights.Weights`), which are asked for by our names.

    languages: our codes of the languages whose modules are wanted; the model may have other names for them.
    """

    def __init__(self, path: Path, languages: Sequence[str] = ()):
        self.path = path
        self.config, self.keys = read_config(path)
        with refusing(f"{path / 'config.json'}: not a model's configuration"):
            self.heads, self.vocabulary = int(self.keys["heads"]), int(self.config["vocab_size"])
            self.ours = self.config["model_type"] == OURS
            theirs = [str(name) for name in self.config.get("languages") or []]
        matched: dict[str, str | None] = {code: code for code in theirs}
        if not self.ours:
            matched = {code: language_of(code, theirs, path) for code in languages}
        self.languages = {code: name for code, name in matched.items() if name}  # our code -> the model's name
        self.others = [name for name in theirs if name not in self.languages.values()]
        self.table = None if self.ours else Names(self.config["model_type"], self.languages)
        self.files = _files(path)  # name of a tensor -> the file that holds it

    @property
    def names(self) -> list[str]:
        """The folder's own names of all its tensors."""
        return list(self.files)

    @property
    def variant(self) -> str:
        """The variant that has the model's modules, which says which of them is language-specific."""
        return str(self.config.get("variant", "joint")) if self.ours else "adpt" if "adapter" in self.keys else "joint"

    @property
    def origin(self) -> dict[str, Any]:
        """What a run that starts here keeps for its own export: the class, the special ids and the languages' names."""
        kept = ("model_type", *SPECIAL_IDS)
        present = {key: self.config[key] for key in kept if self.config.get(key) is not None}
        return {} if self.ours else present | {"languages": self.languages}

    @property
    def pieces(self) -> list[str]:
        """The pieces of the vocabulary, by id."""
        pieces = stored_pieces(self.path)
        if len(pieces) != self.vocabulary:
            raise UserError(
                f"{self.path}: the tokenizer has {len(pieces)} pieces and the model {self.vocabulary}, so that they do not "
                "belong together"
            )
        return pieces

    def theirs(self, name: str) -> tuple[str, ...]:
        """The folder's names of our parameter."""
        return (name,) if self.table is None else self.table.theirs(name)

    def has(self, name: str) -> bool:
        """Whether the folder has our parameter of this name."""
        theirs = self.theirs(name)
        return bool(theirs) and all(part in self.files for part in theirs)

    def read(self, wanted: Segment, kind: str, tensor: int, tensor_rank: int) -> Tensor:
        """The elements of one segment (1-d, fp32) at the reader's layout. kind: 'master', since a folder has no moments."""
        assert kind == "master", f"{self.path}: a model folder has no {kind}"
        names, dim = self.theirs(wanted.name), wanted.partition_dim
        if wanted.name in VOCABULARY:
            return self._vocabulary_rows(names[0], wanted, tensor_rank)
        parts = [self._stored(name, dim, tensor, tensor_rank) for name in names or (wanted.name,)]
        check_shape(wanted, (sum(len(part) for part in parts), *parts[0].shape[1:]), self.path)
        local = joined(parts, self.heads // tensor) if len(parts) > 1 else parts[0]
        return local.reshape(-1)[wanted.start : wanted.start + wanted.length]

    def whole(self, name: str) -> Tensor:
        """A parameter in its full shape, fp32. Parameters of the vocabulary lack its padding."""
        parts = [self._stored(part) for part in self.theirs(name) or (name,)]
        return joined(parts, self.heads) if len(parts) > 1 else parts[0]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` to `last` of our parameter of the vocabulary, fp32; nothing else of it is read."""
        (theirs,) = self.theirs(name)
        with self._opened(theirs) as file:
            rows: Tensor = file.get_slice(theirs)[first:last].float()
            return rows

    def _vocabulary_rows(self, name: str, wanted: Segment, tensor_rank: int) -> Tensor:
        """Elements of a parameter of the vocabulary, with zeros for its padding; only the rows that hold them are read."""
        width = torch.Size(wanted.shape[1:]).numel()
        first, last = wanted.start // width, -(-(wanted.start + wanted.length) // width)
        with self._opened(name) as file:
            stored = file.get_slice(name)
            rows, *others = stored.get_shape()
            check_shape(wanted, (wanted.shape[0], *others), self.path)
            if rows != self.vocabulary:
                raise UserError(
                    f"{self.path}: {name} has {rows} rows, but vocab_size is {self.vocabulary}: they do not belong together"
                )
            offset = wanted.shape[0] * tensor_rank
            low, high = min(rows, offset + first), min(rows, offset + last)
            elements = torch.zeros(last - first, *others)
            for begin in range(low, high, ROWS):
                end = min(high, begin + ROWS)
                elements[begin - low : end - low] = stored[begin:end]
        return elements.reshape(-1)[wanted.start - first * width :][: wanted.length]

    def _stored(self, name: str, dim: int | None = None, tensor: int = 1, tensor_rank: int = 0) -> Tensor:
        """A tensor of the folder in fp32, or a tensor-parallel rank's part of it along `dim`."""
        with self._opened(name) as file:
            if dim is None or tensor == 1:
                return file.get_tensor(name).float()
            stored = file.get_slice(name)
            size = stored.get_shape()[dim] // tensor
            own = slice(size * tensor_rank, size * (tensor_rank + 1))
            part = stored[own] if dim == 0 else stored[:, own]
            return part.float()

    def _opened(self, name: str) -> Any:
        """Opens the file that holds a tensor. Every read opens it anew, so that no tensor stays in memory."""
        if name not in self.files:
            raise UserError(
                f"{self.path}: has no parameter {name}: its variant, languages or shape differ from this run's, or it was "
                "saved without the head that predicts masked tokens (save it from AutoModelForMaskedLM)"
            )
        return safe_open(self.files[name], framework="pt")


def _files(path: Path) -> dict[str, Path]:
    """The file of each tensor of a model folder."""
    files: dict[str, Path] = {}
    shards = sorted(path.glob("model*.safetensors"))
    index = path / INDEX
    if index.is_file():
        with refusing(f"{index}: not an index of weights", "; copy the folder again"):
            listed: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
            shards = [path / name for name in sorted(set(listed.values()))]
    for file in shards:
        try:
            with safe_open(file, framework="pt") as opened:
                files |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); export or copy it again") from None
    if index.is_file() and (lost := sorted(listed.keys() - files.keys())):
        raise UserError(f"{index}: names {lost[0]}, which {listed[lost[0]]} does not hold; copy the folder again")
    if files:
        return files
    if pickles := sorted(path.glob("*.bin")) + sorted(path.glob("*.pt")):
        raise UserError(f"{pickles[0]}: a pickle, which may run code when it is read: {CONVERT}")
    raise UserError(f"{path}: has no model.safetensors; save the model there with save_pretrained")


def stored_pieces(folder: Path) -> list[str]:
    """The pieces of a folder's vocabulary, by id: of its tokenizer.json, or else of its SentencePiece model."""
    path = folder / "tokenizer.json"
    if not path.is_file() and (folder / FAIRSEQ).is_file():
        return Tokenizer(folder, vocabulary_file(folder)).pieces
    if not path.is_file():
        raise UserError(f"{path} is missing: save the tokenizer there with transformers' tokenizer.save_pretrained")
    with refusing(f"{path}: not a tokenizer"):
        pieces = by_id(piece_ids(json.loads(path.read_bytes())))
    return pieces
