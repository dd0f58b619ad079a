"""A prepared corpus: memory-mapped token ids by language and split, the tokenizer, counts, and checks against alteration."""

import hashlib
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.data.tokenizer import MANY_UNKNOWN, TOO_MANY_UNKNOWN, Tokenizer, Vocabulary
from mlinterf_ds.errors import UserError, refusing, warn
from mlinterf_ds.files import sha256

MANIFEST = "manifest.json"
FORMAT, VERSION = "mlinterf_ds corpus", 1
INDEX_HEADER = "<9sQBQQ"  # of an idx file: magic, version, dtype, sentences, documents + 1 (see data/prepare/shards.py)
_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype(np.uint16), "int32": np.dtype(np.int32)}
LANGUAGE = re.compile(r"(?!shared$)[a-z][a-z0-9_-]*")  # "shared" names the parameters that all languages use
SPLITS = ("train", "meta", "valid", "test")
COUNTS = ("sentences", "words", "characters", "tokens")
UNKNOWN_COUNTS = ("unknown", "unknown_characters")  # not in every older manifest
SYNTHETIC_LANGUAGES = ["syn", "syn-mid"]  # the languages of a run on corpus=synthetic that names none
AGAIN = "; copy the corpus again, or prepare it again in another folder"


class Corpus:
    """A folder written by `mlinterf_ds.data.prepare.main.prepare`; open one with `Corpus.open`.

    Its splits are "train", "valid" (reported), "test", and "meta" (for meta.text=held_out), which is empty unless asked for.
    """

    folder: Path
    languages: list[str]
    tokenizer: Tokenizer
    manifest: dict[str, Any]
    manifest_hash: str  # SHA-256 of manifest.json, which holds the hashes of all the rest

    @classmethod
    def open(cls, folder: str | Path, languages: Sequence[str] | None = None) -> "Corpus":
        """Open a corpus, or only some of its languages, in the order given (default: all, in the order prepared).

        Raises UserError if the folder is not a complete corpus, a file's size differs from the manifest's, or a language
        is missing. `verify` compares the contents with the manifest, and `unchanged` watches them during a run.
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
            version = corpus.manifest["format"], corpus.manifest["version"]
            if version != (FORMAT, VERSION):
                raise UserError(
                    f"{corpus.folder / MANIFEST}: format {version[0]!r}, version {version[1]!r}; this program reads "
                    f"{FORMAT!r}, version {VERSION}: prepare the corpus again"
                )
            corpus.languages = corpus._chosen(languages)
            corpus._seen, corpus._documents = {}, {}
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
    _documents: dict[tuple[str, str], tuple[np.ndarray, np.ndarray] | None]  # see `_map_documents`
    _seen: dict[Path, tuple[int, ...]]  # each file's state when it was opened, or when its digest was last compared

    @property
    def vocabulary(self) -> Vocabulary:
        return self.tokenizer.vocabulary

    @property
    def vocabulary_size(self) -> int:
        return self.tokenizer.size

    def sentences(self, language: str, split: str) -> int:
        return self._facts(language, split)["sentences"]

    def characters(self, language: str, split: str) -> int:
        """Unicode characters of the sentences, with spaces, without sentence ends: the divisor of bits per character."""
        return self._facts(language, split)["characters"]

    def tokens(self, language: str, split: str) -> np.ndarray:
        """All token ids of a split, `</s>` after every sentence; memory-mapped and read-only.

        # (tokens,) uint16, or int32 if the vocabulary has 65,500 pieces or more: widen them before indexing with them
        """
        entry = self._facts(language, split)["bin"]
        if not entry["bytes"]:
            return np.empty(0, dtype=self._dtype)  # an empty file cannot be mapped
        return np.memmap(self._path(entry), dtype=self._dtype, mode="r")

    def unknown(self, language: str) -> float:
        """Returns which share of a language's text the vocabulary lacks."""
        return unknown_share(self.manifest["languages"][language]["splits"])

    def starts_document(self, language: str, split: str, offsets: np.ndarray) -> np.ndarray:
        """Returns which sentences begin a document, by the offsets of their first tokens: (n,) int64 -> (n,) bool.

        A line that stands alone is a document. The index file is mapped into memory at the first call.
        """
        if (language, split) not in self._documents:
            self._documents[language, split] = self._map_documents(language, split)
        if (mapped := self._documents[language, split]) is None:
            return np.ones(len(offsets), dtype=bool)
        starts, firsts = mapped
        sentence = _search(starts, offsets * self._dtype.itemsize)
        return firsts[_search(firsts, sentence)] == sentence

    def _map_documents(self, language: str, split: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns the byte at which each sentence starts, and each document's first sentence; None if each is a document."""
        path, start = self._path(self._facts(language, split)["idx"]), struct.calcsize(INDEX_HEADER)
        with open(path, "rb") as file:
            _, _, _, sentences, documents = struct.unpack(INDEX_HEADER, file.read(start))
        if sentences == documents - 1:
            return None
        start += sentences * np.dtype(np.int32).itemsize  # the sentences' lengths
        starts = np.memmap(path, np.int64, "r", start, (sentences,))
        return starts, np.memmap(path, np.int64, "r", start + starts.nbytes, (documents,))

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Reads every file and compares its SHA-256 with the manifest's. Raises UserError that names the first to differ.

        Of `parts` processes that share the work, process `part` reads every `parts`-th file.
        """
        for entry in [*self._files()][part::parts]:
            self._check_hash(entry)

    def unchanged(self, language: str, split: str) -> bool:
        """Returns whether the files of a split's text and of the tokenizer stayed untouched since the last call.

        This takes three system calls. A file that was touched is read again: if its contents are the same, the next call
        returns True; if they differ from what was prepared, this raises UserError.
        """
        same = True
        facts = self._facts(language, split)
        for entry in (self.manifest["vocabulary"], facts["bin"], facts["idx"]):
            path = self.folder / entry["file"]
            if (now := _state(path)) != self._seen[path]:
                self._check_size(entry)
                self._check_hash(entry)
                self._seen[path], same = now, False
        return same

    def _check_hash(self, entry: dict[str, Any]) -> None:
        path = self._path(entry)
        with refusing(f"{path}: cannot be read", AGAIN):
            if sha256(path) == entry["sha256"]:
                return
        raise UserError(
            f"{path}: its contents are not those that were prepared (SHA-256 differs from {MANIFEST}){AGAIN}"
        )

    def _check_manifest(self) -> None:
        """Checks the manifest's own digest (older ones have none) and that its numbers fit each other."""
        if self.manifest.get("digest") not in (None, manifest_digest(self.manifest)):
            raise UserError(f"{self.folder / MANIFEST}: altered since it was written{AGAIN}")
        if self._dtype != self.tokenizer.dtype or self.manifest["vocabulary"]["size"] != self.tokenizer.size:
            raise ValueError(f"dtype or vocabulary size is not that of {self.tokenizer.path.name}")
        if any(type(entry["sha256"]) is not str for entry in self._files()):
            raise TypeError("sha256 must be text")
        for language in self.languages:
            splits = self.manifest["languages"][language]["splits"]
            for split in SPLITS:
                if split not in splits:
                    raise KeyError(f"{language}: no split {split!r}")
            for split, facts in splits.items():
                counts = [facts[name] for name in COUNTS] + [facts.get(name, 0) for name in UNKNOWN_COUNTS]
                if any(type(count) is not int or count < 0 for count in counts):
                    raise ValueError(f"{language}, {split}: {', '.join(COUNTS)} must be whole numbers, 0 or more")
                if facts["tokens"] * self._dtype.itemsize != facts["bin"]["bytes"]:
                    raise ValueError(f"{language}, {split}: {facts['tokens']} tokens in {facts['bin']['bytes']} bytes")

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
        """Yields the manifest's entries of the tokenizer and of the opened languages' shards."""
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
            state = "is missing" if size is None else f"has {size:,} bytes"
            raise UserError(f"{path}: {state}, {entry['bytes']:,} expected{AGAIN}")


def synthetic_folder(languages: Sequence[str], sentences: int, limits: Mapping[str, int] | None = None) -> Path:
    """Returns the folder, below the working directory, where the corpus of these synthetic languages is or will be made.

    `sentences` is each language's number of sentences, `limits` the training sentences that some languages keep.
    """
    suffix = "".join(f"-{code}={count}" for code, count in sorted((limits or {}).items()))
    return Path("corpora") / f"synthetic-{sentences}-{'+'.join(languages)}{suffix}"


def unknown_share(splits: Mapping[str, Mapping[str, Any]]) -> float:
    """Returns the larger of two shares over all splits: unknown characters among all, and `<unk>` among all pieces."""
    total = {name: sum(facts.get(name, 0) for facts in splits.values()) for name in (*COUNTS, *UNKNOWN_COUNTS)}
    pieces = total["tokens"] - total["sentences"]  # the </s> of every sentence belongs to no text
    return max(total["unknown_characters"] / max(1, total["characters"]), total["unknown"] / max(1, pieces))


def check_known(folder: Path, shares: Mapping[str, float]) -> None:
    """Warns of each language of which the vocabulary lacks more than 1%. Raises UserError if it lacks more than 20% of one:
    a model would learn to predict `<unk>`, and its perplexity would look splendid."""
    remedy = "prepare the text again with more pieces (--vocab-size), and without --tokenizer"
    for language, share in shares.items():
        if share > TOO_MANY_UNKNOWN:
            raise UserError(
                f"{folder}: the vocabulary lacks {share:.0%} of the text of {language}, at most {TOO_MANY_UNKNOWN:.0%} can be "
                f"trained on; {remedy}"
            )
        if share > MANY_UNKNOWN:
            warn(
                f"{folder}: the vocabulary lacks {share:.1%} of the text of {language}, which is <unk> to a model; {remedy}"
            )


def _search(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the first index whose element is not below each value, as np.searchsorted does, which copies mapped memory."""
    low, high = np.zeros(len(values), dtype=np.int64), np.full(len(values), len(ascending), dtype=np.int64)
    while (low < high).any():
        middle = (low + high) // 2
        below = (ascending[np.minimum(middle, len(ascending) - 1)] < values) & (low < high)
        low, high = np.where(below, middle + 1, low), np.where(below, high, np.minimum(middle, high))
    return low


def _state(path: Path) -> tuple[int, ...]:
    """Returns values that change when a file is written, replaced or touched; () if it is missing."""
    try:
        stat = os.stat(path)
    except OSError:
        return ()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a manifest's contents without its own digest, whatever their spacing and order."""
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def open_corpus(
    corpus: str, languages: Sequence[str] | None, sentences: int, limits: Mapping[str, int] | None = None
) -> Corpus:
    """Opens a run's corpus on all ranks together, and has its files read once in full on every host.

    `corpus` is a prepared folder, or `synthetic` (of `sentences` and `limits`, see `synthetic_folder`), which is prepared on
    first use. Raises UserError, on every rank, unless the text is what was prepared.
    """
    from mlinterf_ds.ranks import agreed, agreed_by_all  # torch, without which a corpus is prepared
    from mlinterf_ds.runtime.launchers import local_share

    folder = Path(corpus)
    if corpus == "synthetic":
        languages = list(languages or SYNTHETIC_LANGUAGES)
        folder = synthetic_folder(languages, sentences, limits)
        if not agreed((folder / MANIFEST).is_file):
            agreed(lambda: _prepare_synthetic(json.dumps([languages, sentences, limits])))
    opened = Corpus.open(folder, languages)
    agreed(lambda: check_known(folder, {language: opened.unknown(language) for language in opened.languages}))
    agreed_by_all(lambda: opened.verify(*local_share()))
    return opened


def _prepare_synthetic(arguments: str) -> None:
    """Prepares a synthetic corpus in a process of its own: it forks workers, which a process of torch's threads must not."""
    folder = str(Path(__file__).parents[2])  # the child imports this package from where this process did
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))}
    line = [sys.executable, "-m", "mlinterf_ds.data.prepare.synthetic", arguments]
    done = subprocess.run(line, env=environment, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    if done.returncode == 2:
        raise UserError(done.stderr.strip())
    if done.returncode:
        raise RuntimeError(f"{' '.join(line[1:])} failed:\n{done.stderr}")
