"""A prepared corpus: memory-mapped token ids of every language and split, the tokenizer, and the counts."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.errors import UserError

MANIFEST = "manifest.json"
FORMAT, VERSION = "mlinterf_ds corpus", 1
_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype(np.uint16), "int32": np.dtype(np.int32)}
LANGUAGE = re.compile(r"[a-z][a-z0-9_-]*")


class Corpus:
    """A folder written by `mlinterf_ds.data.prepare.prepare`; open one with `Corpus.open`.

    Splits are "train", "meta" (the meta step's validation loss), "valid" (reported) and "test".
    """

    folder: Path
    languages: list[str]
    tokenizer: Tokenizer
    manifest: dict[str, Any]
    manifest_hash: str  # SHA-256 of manifest.json, which holds the hashes of all the rest

    @classmethod
    def open(cls, folder: str | Path, languages: Sequence[str] | None = None) -> "Corpus":
        """Open a corpus, or only some of its languages, in the order given (default: all, in the order prepared).

        Raises UserError if the folder is not a whole prepared corpus, a file's size is not what the manifest says, or
        a language is not there. What the files hold is checked by `verify`.
        """
        corpus = cls()
        corpus.folder = Path(folder)
        try:
            data = (corpus.folder / MANIFEST).read_bytes()
        except OSError:
            raise UserError(
                f"{folder}: not a prepared corpus (no {MANIFEST}); run tools/prepare_corpus.py --out {folder} ... "
                "(again, if it was interrupted)"
            ) from None
        corpus.manifest_hash = hashlib.sha256(data).hexdigest()
        try:
            corpus.manifest = json.loads(data)
            corpus._check_version()
            corpus.languages = corpus._chosen(languages)
            for entry in corpus._files():
                corpus._check_size(entry)
            corpus.tokenizer = Tokenizer(corpus.folder / corpus.manifest["vocabulary"]["file"])
            corpus._dtype = _DTYPES[corpus.manifest["dtype"]]
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{corpus.folder / MANIFEST}: damaged ({type(error).__name__}: {error}); prepare the corpus again in "
                "another folder"
            ) from None
        return corpus

    _dtype: np.dtype

    @property
    def vocabulary_size(self) -> int:
        return self.tokenizer.size

    def sentences(self, language: str, split: str) -> int:
        return self._facts(language, split)["sentences"]

    def words(self, language: str, split: str) -> int:
        """Whitespace-separated words."""
        return self._facts(language, split)["words"]

    def characters(self, language: str, split: str) -> int:
        """Unicode characters of the sentences, spaces included and sentence ends not: what bits per character divide by."""
        return self._facts(language, split)["characters"]

    def tokens(self, language: str, split: str) -> np.ndarray:
        """All token ids of a split end to end, every sentence ended by `</s>`; memory-mapped, read-only.

        # (tokens,) uint16, or int32 if the vocabulary has 65,500 pieces or more: widen before you index with them
        """
        entry = self._facts(language, split)["bin"]
        return np.memmap(self._path(entry), dtype=self._dtype, mode="r")

    def verify(self) -> None:
        """Read every file and compare its hash with the manifest's. Raises UserError naming the first that differs."""
        for entry in self._files():
            with self._path(entry).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry["sha256"]:
                raise UserError(
                    f"{self._path(entry)}: its contents are not those that were prepared (SHA-256 differs from "
                    f"{MANIFEST}); prepare the corpus again in another folder"
                )

    def _check_version(self) -> None:
        name, version = self.manifest["format"], self.manifest["version"]
        if (name, version) != (FORMAT, VERSION):
            raise UserError(
                f"{self.folder / MANIFEST}: format {name!r}, version {version!r}; this program reads {FORMAT!r}, version "
                f"{VERSION}: prepare the corpus again"
            )

    def _chosen(self, languages: Sequence[str] | None) -> list[str]:
        known = list(self.manifest["languages"])
        chosen = known if languages is None else list(languages)
        for language in chosen:
            if language not in known:
                raise UserError(f"{self.folder}: no language {language!r} in this corpus; it has: {', '.join(known)}")
        if not chosen or len(set(chosen)) < len(chosen):
            raise UserError(f"languages {chosen}: name each language once, at least one of: {', '.join(known)}")
        return chosen

    def _facts(self, language: str, split: str) -> dict[str, Any]:
        if language not in self.languages:
            raise UserError(f"language {language!r}: not opened; open are: {', '.join(self.languages)}")
        splits = self.manifest["languages"][language]["splits"]
        if split not in splits:
            raise UserError(f"split {split!r}: must be one of {', '.join(splits)}")
        return splits[split]

    def _files(self) -> Iterator[dict[str, Any]]:
        """The manifest's entries of the tokenizer and of the opened languages' shards."""
        yield self.manifest["vocabulary"]
        for language in self.languages:
            for facts in self.manifest["languages"][language]["splits"].values():
                yield from (facts["bin"], facts["idx"])

    def _path(self, entry: dict[str, Any]) -> Path:
        path = self.folder / entry["file"]
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise UserError(
                f"{self.folder / MANIFEST}: the file {entry['file']!r} is outside the corpus folder; a corpus is one "
                "folder of plain files: copy it whole"
            )
        return path

    def _check_size(self, entry: dict[str, Any]) -> None:
        path = self._path(entry)
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise UserError(
                f"{path}: {found}, {entry['bytes']:,} expected; copy the corpus again, or prepare it again in another folder"
            )
