"""The weights that `init=` starts a run from: a checkpoint's or a `transformers` folder's, with language modules added."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlinterf_ds.config import with_present_keys
from mlinterf_ds.data.tokenizer import SPECIAL_PIECES, Tokenizer
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.space import Segment
from mlinterf_ds.engine.weights import CheckpointReader, sliced
from mlinterf_ds.errors import UserError
from mlinterf_ds.export import folder
from mlinterf_ds.export.folder import VOCABULARY, Folder
from mlinterf_ds.ranks import agreed
from mlinterf_ds.sections import ModelConfig

LANGUAGE_ROWS = "embeddings.language.weight"


def weights(init: str, model: ModelConfig, tokenizer: Tokenizer, languages: Sequence[str]) -> WithLanguages:
    """The weights that `init` names, for a run with this shape, vocabulary and languages; the ranks call it together.

    Raises UserError where the weights would load and mean something else: other heads, activation or pieces, language
    embeddings that the run lacks.
    """
    source: CheckpointReader | Folder
    if folder.is_folder(Path(init)):
        agreed(lambda: folder.verify(Path(init)))
        source = Folder(Path(init))
        path, heads, activation, pieces = source.path, source.heads, source.adapter_activation, source.pieces
        known = source.config.get("languages") or []
    else:
        path = checkpoint.find(init, "best")
        saved = agreed(lambda: checkpoint.verify(path))
        shape = ModelConfig(**with_present_keys(saved.get("pretrained", saved["config"]))["model"])  # of the encoder
        heads, activation, pieces = shape.heads, shape.adapter_activation, Tokenizer(path / "tokenizer.model").pieces
        source, known = CheckpointReader(path), saved["languages"]
    if source.has(LANGUAGE_ROWS) and not model.language_embeddings:
        raise UserError(f"init={init}: its model has language embeddings: set model.language_embeddings=true")
    if heads != model.heads:
        raise UserError(f"init={init}: its model has {heads} attention heads, model.heads={model.heads}")
    if activation not in (None, model.adapter_activation):
        raise UserError(
            f"init={init}: its adapters use {activation}, model.adapter_activation={model.adapter_activation}"
        )
    _check_vocabulary(path, pieces, tokenizer)
    rows = [known.index(language) if language in known else None for language in languages]
    return WithLanguages(source, len(pieces), tokenizer.size, rows)


def _check_vocabulary(path: Path, old: list[str], tokenizer: Tokenizer) -> None:
    """UserError unless the tokenizer's pieces are those of the model at `path`, or extend them."""
    new = tokenizer.pieces
    if old == new[: len(old)]:
        return
    differences = [number for number, (there, here) in enumerate(zip(old, new, strict=False)) if there != here]
    differ = f"{len(old)} pieces there, {len(new)} here"
    if differences:
        differ = f"piece {differences[0]} is {old[differences[0]]!r} there, {new[differences[0]]!r} here"
    remedy = "start from a model with this vocabulary"
    for name in ("sentencepiece.model", "tokenizer.model"):
        if (path / name).is_file():
            remedy = f"prepare the corpus with --tokenizer {shlex.quote(str(path / name))} (or --extend its corpus)"
    raise UserError(f"{path}: its vocabulary is not that of {tokenizer.path} ({differ}); {remedy}")


class WithLanguages:
    """A source that has modules for every language, and rows for every piece of a vocabulary that extends its own.

    Where `source` shares a module (feed-forward, attention, adapter), every language starts from a copy of that module. Where
    it has no adapter, a new one starts as the identity: its up projection is zero, the rest as initialised. New pieces start at
    the mean of the old ordinary ones, in the embedding and in the output bias; new languages at the mean of the old ones'
    embeddings, or at zero where there are none.
    """

    def __init__(self, source: CheckpointReader | Folder, pieces: int, wanted: int, rows: Sequence[int | None]):
        self.source, self.old, self.new = source, pieces, wanted - pieces  # pieces of the vocabulary
        self.rows = rows  # of each language in the source's language embeddings; None: it is new

    def has(self, name: str) -> bool:
        """False only for what a new adapter is initialised with."""
        return ".adapter." not in name or self.source.has(self._source_name(name)) or name.endswith(".up.weight")

    def read(self, wanted: Segment, kind: str, tensor: int, tensor_rank: int) -> Tensor:
        name = self._source_name(wanted.name)
        if self.new and wanted.name in VOCABULARY:
            old = self.source.whole(wanted.name)[: self.old]
            mean = old[len(SPECIAL_PIECES) :].mean(0, keepdim=True)
            rows = wanted.shape[0] * tensor  # padding included
            grown = torch.cat([old, mean.expand(rows - self.old, *old.shape[1:])])
            return sliced(grown, wanted, tensor, tensor_rank, self.source.path)
        if wanted.name == LANGUAGE_ROWS:
            width = wanted.shape[1]
            old = self.source.whole(name) if self.source.has(name) else torch.zeros(0, width)
            mean = old.mean(0) if len(old) else torch.zeros(width)
            whole = torch.stack([mean if row is None or not len(old) else old[row] for row in self.rows])
            return sliced(whole, wanted, tensor, tensor_rank, self.source.path)
        if ".adapter." in wanted.name and not self.source.has(name):
            return torch.zeros(wanted.length)
        return self.source.read(Segment(**vars(wanted) | {"name": name}), kind, tensor, tensor_rank)

    def _source_name(self, name: str) -> str:
        """The name under which the source has this parameter, if it has it."""
        return name if self.source.has(name) else re.sub(r"\.copies\.language_[^.]+", "", name)
