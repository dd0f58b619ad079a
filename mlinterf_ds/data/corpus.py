"""A prepared corpus: memory-mapped token ids of every language and split, the tokenizer, and the counts."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import sha256

MANIFEST = "manifest.json"
FORMAT, VERSION = "mlinterf_ds corpus", 1
_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype(np.uint16), "int32": np.dtype(np.int32)}
LANGUAGE = re.compile(r"(?!shared$)[a-z][a-z0-9_-]*")  # "shared" are the parameters of all languages
SPLITS = ("train", "meta", "valid", "test")
COUNTS = ("sentences", "words", "characters", "tokens")
SYNTHETIC_LANGUAGES = ["syn", "syn-mid"]  # of a run on corpus=synthetic that names no languages
AGAIN = "; copy the corpus again, or prepare it again in another folder"


class Corpus:
    """A folder written by `mlinterf_ds.data.prepare.main.prepare`; open one with `Corpus.open`.

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
        a language is not there. What the shards hold is checked by `verify`, and that it stays so by `unchanged`.
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
        with refusing(f"{corpus.folder / MANIFEST}: damaged", AGAIN):
            corpus.manifest = json.loads(data)
            corpus._check_version()
            corpus.languages = corpus._chosen(languages)
            corpus._seen = {}
            for entry in corpus._files():
                path = corpus._path(entry)
                corpus._seen[path] = _state(path)
                corpus._check_size(entry)
            corpus._check_hash(corpus.manifest["vocabulary"])  # before a parser meets it
            corpus.tokenizer = Tokenizer(corpus._path(corpus.manifest["vocabulary"]))
            corpus._dtype = _DTYPES[corpus.manifest["dtype"]]
            corpus._check_manifest()
        return corpus

    _dtype: np.dtype
    _seen: dict[Path, tuple[int, ...]]  # how each file was when it was opened, or last found whole

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

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read every file and compare its hash with the manifest's. Raises UserError naming the first that differs.

        With `parts`, only every so many-th file: the processes of a host share the work.
        """
        for entry in [*self._files()][part::parts]:
            self._check_hash(entry)

    def unchanged(self, language: str, split: str) -> bool:
        """Whether nothing happened to a split's tokens, and the tokenizer, since they were opened or last looked at.

        Two system calls, unless something did: then the file is read, and what was only touched, or replaced by a copy, may
        go on. UserError if it is no longer what was prepared.
        """
        same = True
        for entry in (self.manifest["vocabulary"], self._facts(language, split)["bin"]):
            path = self.folder / entry["file"]
            if (now := _state(path)) != self._seen[path]:
                self._check_size(entry)
                self._check_hash(entry)
                self._seen[path], same = now, False
        return same

    def _check_hash(self, entry: dict[str, Any]) -> None:
        path = self._path(entry)
        with refusing(f"{path}: cannot be read", AGAIN):
            digest = sha256(path)
        if digest != entry["sha256"]:
            raise UserError(
                f"{path}: its contents are not those that were prepared (SHA-256 differs from {MANIFEST}){AGAIN}"
            )

    def _check_manifest(self) -> None:
        """Its own digest (older ones have none), and that its numbers fit each other."""
        if self.manifest.get("digest") not in (None, manifest_digest(self.manifest)):
            raise UserError(f"{self.folder / MANIFEST}: altered since it was written{AGAIN}")
        if self._dtype != self.tokenizer.dtype or self.manifest["vocabulary"]["size"] != self.tokenizer.size:
            raise ValueError(f"dtype or vocabulary size is not that of {self.tokenizer.path.name}")
        digests = [entry["sha256"] for entry in self._files()]
        if any(type(digest) is not str for digest in digests):
            raise TypeError("sha256 must be text")
        for language in self.languages:
            splits = self.manifest["languages"][language]["splits"]
            if missing := [split for split in SPLITS if split not in splits]:
                raise KeyError(f"{language}: no split {missing[0]!r}")
            for split, facts in splits.items():
                counts = [facts[name] for name in COUNTS]
                if any(type(count) is not int or count < 0 for count in counts):
                    raise ValueError(f"{language}, {split}: {', '.join(COUNTS)} must be whole numbers, 0 or more")
                if facts["tokens"] * self._dtype.itemsize != facts["bin"]["bytes"]:
                    raise ValueError(f"{language}, {split}: {facts['tokens']} tokens in {facts['bin']['bytes']} bytes")

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
            if language not in known or not LANGUAGE.fullmatch(language):
                raise UserError(f"{self.folder}: no language {language!r} in this corpus; it has: {', '.join(known)}")
        if not chosen or len(set(chosen)) < len(chosen):
            raise UserError(
                f"{self.folder}: languages {chosen}: name each language once, at least one of: {', '.join(known)}"
            )
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
        if path.name != entry["file"] or not path.resolve().is_relative_to(self.folder.resolve()):
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
            raise UserError(f"{path}: {found}, {entry['bytes']:,} expected{AGAIN}")


def synthetic_folder(languages: Sequence[str], sentences: int, limits: Mapping[str, int] | None = None) -> Path:
    """Returns the folder, below the working directory, where the corpus of these synthetic languages is or will be made.

    `sentences` is each language's number of sentences, `limits` the training sentences that some languages keep.
    """
    suffix = "".join(f"-{code}={count}" for code, count in sorted((limits or {}).items()))
    return Path("corpora") / f"synthetic-{sentences}-{'+'.join(languages)}{suffix}"


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written, replaced or touched; () if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, its digest apart, however it is spaced and ordered."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
