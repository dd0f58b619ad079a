"""The weights that `init=` starts a run from: a checkpoint's or a `transformers` folder's, with language modules added."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlinterf_ds.config import with_present_keys
from mlinterf_ds.data.tokenizer import Tokenizer, Vocabulary
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.space import Segment
from mlinterf_ds.engine.weights import CheckpointReader, check_shape
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.export import folder
from mlinterf_ds.export.classes import LANGUAGE
from mlinterf_ds.export.folder import VOCABULARY, Folder
from mlinterf_ds.files import read_json
from mlinterf_ds.ranks import agreed
from mlinterf_ds.sections import ModelConfig, architecture, has_adapters, is_routed

LANGUAGE_ROWS = "embeddings.language.weight"
# keys of `model` that no weight depends on
FREE = ("dropout", "attention_dropout", "output_bias", "recompute", "compile")
TIED = (".decoder.weight", ".decoder.bias", ".position_ids")  # endings of tensors that repeat another, or just count up


def model_keys(init: str | Path) -> dict[str, Any]:
    """The keys of `model` that describe the model which `init` names; those of adapters only if it has any."""
    if folder.is_folder(Path(init)):
        _, keys = folder.read_config(Path(init))
        _as_model(init, keys)
        return keys
    path = checkpoint.find(init, "best")
    with refusing(f"{path}: not a checkpoint of mlinterf_ds"):
        return _keys_of(read_json(path / "run.json"))


def _as_model(init: str | Path, keys: Mapping[str, Any]) -> ModelConfig:
    with refusing(f"init={init}: its model has a shape that none of ours can have"):
        return ModelConfig(**keys)


def _keys_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `model` that describe the model of a checkpoint; saved: the content of its run.json."""
    config = with_present_keys(saved.get("pretrained", saved["config"]))  # a fine-tuning has both
    shape = ModelConfig(**config["model"])
    keys = {key: value for key, value in shape if key not in ("recompute", "compile")}  # a machine's, not the model's
    keys |= {"positions": shape.positions or config["data"]["sequence_length"], "adapter": shape.adapter_width}
    return keys if has_adapters(config["variant"]) else {k: v for k, v in keys.items() if not k.startswith("adapter")}


def check_model(init: str, keys: Mapping[str, Any], model: ModelConfig) -> None:
    """Raises UserError, which names the key, if `model` contradicts the keys of the model that `init` names."""
    source = _as_model(init, keys)
    for key in keys.keys() - set(FREE):
        compared = {"head_width": "kv_channels", "adapter": "adapter_width"}.get(key, key)
        there, here = getattr(source, compared), getattr(model, compared)
        allowed = (key == "language_embeddings" and here) or (key == "positions" and here is None)
        if there != here and not allowed:
            raise UserError(
                f"init={init}: its model has {key}={there}, this run model.{key}={here}: leave model.{key} out, which is "
                f"then read from there, or set model.{key}={there}"
            )


@dataclass(frozen=True)
class Start:
    """The model that `init` names."""

    path: Path  # its folder
    source: CheckpointReader | Folder
    keys: dict[str, Any]  # the keys of `model` that describe it
    pieces: list[str]  # the pieces of its vocabulary, by id
    languages: list[str]  # codes of ours
    variant: str
    origin: dict[str, Any] = field(default_factory=dict)  # see `Folder.origin`

    @classmethod
    def of_folder(cls, path: Path, languages: Sequence[str]) -> Start:
        agreed(lambda: folder.verify(path))
        source = Folder(path, languages)
        return cls(path, source, source.keys, source.pieces, list(source.languages), source.variant, source.origin)

    @classmethod
    def of_checkpoint(cls, init: str) -> Start:
        path = agreed(lambda: checkpoint.find(init, "best"))
        saved = checkpoint.verify(path)
        pieces, source = Tokenizer(path / "tokenizer.model").pieces, CheckpointReader(path)
        variant = str(saved.get("pretrained", saved["config"])["variant"])
        return cls(path, source, _keys_of(saved), pieces, saved["languages"], variant, saved.get("origin", {}))


def weights(
    init: str,
    model: ModelConfig,
    tokenizer: Tokenizer,
    languages: Sequence[str],
    only: Sequence[str] | None = None,
) -> WithLanguages:
    """The weights that `init` names, for a run with this shape, vocabulary and languages; the ranks call it together.

    only: the languages that the run trains, None for all. Raises UserError for weights that could be loaded but would mean
    something else: of another shape or with other pieces, or without modules of a language that the run does not add.
    """
    start = Start.of_folder(Path(init), languages) if folder.is_folder(Path(init)) else Start.of_checkpoint(init)
    check_model(init, start.keys, model)
    _check_vocabulary(start.path, start.pieces, tokenizer)
    lacking = [code for code in languages if code not in start.languages and code not in (only or ())]
    if is_routed(start.variant) and lacking:
        has = ", ".join([*start.languages, *getattr(start.source, "others", [])])
        raise UserError(
            f"init={init}: has no modules of {', '.join(lacking)}; it has {has}: name a language to add in data.only, or "
            "leave it out of languages"
        )
    return WithLanguages(start, tokenizer.vocabulary, languages)


def _check_vocabulary(path: Path, old: list[str], tokenizer: Tokenizer) -> None:
    """UserError unless the tokenizer's pieces are those of the model at `path`, or extend them."""
    new = tokenizer.pieces
    if old == new[: len(old)]:
        return
    differences = [number for number, (there, here) in enumerate(zip(old, new, strict=False)) if there != here]
    differ = f"{len(old)} pieces there, {len(new)} here"
    if differences:
        differ = f"piece {differences[0]} is {old[differences[0]]!r} there, {new[differences[0]]!r} here"
    remedy = f"prepare the corpus with --tokenizer {shlex.quote(str(path))} (or --extend its corpus or folder)"
    raise UserError(f"{path}: its vocabulary is not that of {tokenizer.path} ({differ}); {remedy}")


class WithLanguages:
    """A source that has modules for every language, and rows for every piece of a vocabulary that extends its own.

    Where the source shares a module (feed-forward, attention, adapter), every language starts from a copy of that module.
    Where it has no adapter of a language, a new one starts as the identity: its up projection is zero, the rest as
    initialised. New pieces start at the mean of the old ordinary ones, in the embedding and in the output bias; new
    languages at the mean of the old ones' embeddings, or at zero where there are none.
    """

    def __init__(self, start: Start, wanted: Vocabulary, languages: Sequence[str]):
        self.start, self.source = start, start.source
        self.adapts_each = architecture(start.variant) == "adpt"  # the source has adapters of each language
        self.wanted = wanted
        self.old, self.new = len(start.pieces), wanted.size - len(start.pieces)  # pieces of the vocabulary
        known = start.languages
        # each language's row in the source's language embeddings; None for a new language
        self.rows = [known.index(language) if language in known else None for language in languages]

    def has(self, name: str) -> bool:
        """Whether `read` gives this parameter; all but those with which a new adapter is initialised."""
        return not self._is_new(name) or name.endswith(".up.weight")

    def read(self, wanted: Segment, kind: str, tensor: int, tensor_rank: int) -> Tensor:
        name = self._source_name(wanted.name)
        if self.new and wanted.name in VOCABULARY:
            return self._grown(wanted, tensor, tensor_rank)
        if wanted.name == LANGUAGE_ROWS:
            width = wanted.shape[1]
            old = self.source.whole(name) if self.source.has(name) else torch.zeros(0, width)
            mean = old.mean(0) if len(old) else torch.zeros(width)
            whole = torch.stack([mean if row is None or not len(old) else old[row] for row in self.rows])
            check_shape(wanted, whole.shape, self.start.path)
            return whole.view(-1)[wanted.start : wanted.start + wanted.length]
        if self._is_new(wanted.name):
            return torch.zeros(wanted.length)
        return self.source.read(Segment(**vars(wanted) | {"name": name}), kind, tensor, tensor_rank)

    def _grown(self, wanted: Segment, tensor: int, tensor_rank: int) -> Tensor:
        """Elements of a parameter of the vocabulary with rows for new pieces and for padding, which hold the mean row."""
        assert wanted.partition_dim == 0 or tensor == 1
        width, is_text = math.prod(wanted.shape[1:]), torch.zeros(self.wanted.size, dtype=torch.bool)
        is_text[self.wanted.ordinary] = True
        first, last = wanted.start // width, -(-(wanted.start + wanted.length) // width)
        offset = wanted.shape[0] * tensor_rank + first  # the piece of the first row that is asked for
        rows, total = torch.empty(last - first, *wanted.shape[1:]), torch.zeros(wanted.shape[1:], dtype=torch.float64)
        for begin, old in self._old_rows(wanted.name):
            check_shape(wanted, (wanted.shape[0], *old.shape[1:]), self.start.path)
            end = begin + len(old)
            total += old[is_text[begin:end]].sum(0, dtype=torch.float64)
            low, high = max(begin, offset), min(end, offset + len(rows))
            if low < high:
                rows[low - offset : high - offset] = old[low - begin : high - begin]
        rows[max(0, self.old - offset) :] = total / is_text[: self.old].sum()
        return rows.reshape(-1)[wanted.start - first * width :][: wanted.length]

    def _old_rows(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """The source's rows of a parameter of the vocabulary, without padding, by parts: (number of the first, rows)."""
        if isinstance(self.source, Folder):
            for first in range(0, self.old, folder.ROWS):
                yield first, self.source.rows(name, first, min(self.old, first + folder.ROWS))
        else:
            yield 0, self.source.whole(name)[: self.old]

    def left_out(self, names: Iterable[str]) -> list[str]:
        """The source's tensors that a model with parameters of these names does not take."""
        sources = [self._source_name(name) for name in names]
        renamed = self.source.theirs if isinstance(self.source, Folder) else lambda name: (name,)
        used = {part for name in sources for part in renamed(name)}
        return [name for name in self.source.names if name not in used and not name.endswith(TIED)]

    def _is_new(self, name: str) -> bool:
        """Whether this is a part of an adapter that the source does not have."""
        if "_bda.adapter" not in name:
            return False
        if not has_adapters(self.start.variant):
            return True
        language = re.search(LANGUAGE, name)
        return language is not None and self.adapts_each and language[1] not in self.start.languages

    def _source_name(self, name: str) -> str:
        """The name under which the source has this parameter: a module that all share serves every language."""
        language = re.search(LANGUAGE, name)
        own = language and self.adapts_each and "_bda.adapter" in name and language[1] in self.start.languages
        return name if own or self.source.has(name) else re.sub(LANGUAGE, "", name)
