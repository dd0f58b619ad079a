"""The corpora of a study: one of all its languages and, with the same vocabulary, one for each low-resource version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlinterf_ds.data.corpus import MANIFEST, Corpus
from mlinterf_ds.data.prepare.main import prepare
from mlinterf_ds.data.synthetic import write_sentences
from mlinterf_ds.errors import UserError
from mlinterf_ds.study.config import SYNTHETIC, StudyConfig


class Corpora:
    """Where the text of a set's models is; `make` prepares what is missing."""

    def __init__(self, config: StudyConfig, output: Path):
        self.given = config.corpus
        self.languages = config.languages
        self.made = bool(config.corpus.text) or config.corpus.folder == SYNTHETIC
        self.limits = [dict(found) for found in dict.fromkeys(tuple(sorted(s.limits.items())) for s in config.sets)]
        self.limits += [{code: n} for found in self.limits for code, n in found.items()]  # of monolingual models
        if missing := [code for code in self.languages if self.given.text and code not in self.given.text]:
            raise UserError(f"corpus.text has no {', '.join(missing)}: name a file for every language of the sets")
        if any(self.limits) and not self.made:
            raise UserError(
                f"corpus.folder={self.given.folder}: a prepared corpus can't be subsampled for sets with limits: give "
                "corpus.text, from which the study prepares what it needs"
            )
        files = {
            code: sha256(f"corpus.text: {code}", self.given.text[code]) for code in self.languages if self.given.text
        }
        facts = json.dumps([self.given.model_dump() | {"text": files}, self.languages], sort_keys=True)
        self.root = (output / "corpora" / hashlib.sha256(facts.encode()).hexdigest()[:10]).resolve()

    @property
    def vocabulary(self) -> int:
        """Pieces of the vocabulary; UserError for a folder that is no corpus."""
        return self.given.vocabulary if self.made else Corpus.open(self.given.folder).vocabulary_size

    def of(self, limits: Mapping[str, int]) -> tuple[str, str]:
        """(folder, hash of its manifest) of the corpus with these limits; '' for one that is not prepared yet."""
        folder = self._folder(limits)
        if not (folder / MANIFEST).is_file():
            return str(folder), ""
        return str(folder), Corpus.open(folder).manifest_hash

    def make(self) -> None:
        """Prepare all that is missing. UserError for text that can't be used."""
        if not self.made:
            Corpus.open(self.given.folder, self.languages)
            return
        sources: dict[str, list[str | Path]] = {code: [Path(self._text(code)).resolve()] for code in self.languages}
        for limits in [{}, *(found for found in self.limits if found)]:
            folder = self._folder(limits)
            if (folder / MANIFEST).is_file():
                continue
            vocabulary: dict[str, Any] = {"tokenizer": self._folder({}) / "tokenizer.model"}
            if not limits:
                vocabulary = {"vocabulary_size": self.given.vocabulary}
            folder.parent.mkdir(parents=True, exist_ok=True)
            prepare(sources, folder, limits=limits, progress=False, **vocabulary)

    def adopt(self) -> bool:
        """If nothing was prepared from the text as it is now, take what was prepared last; whether that was so."""
        others = [place for place in self.root.parent.glob("*") if place.is_dir()]
        if not self.made or self.root.is_dir() or not others:
            return False
        self.root = max(others, key=lambda place: place.stat().st_mtime)
        return True

    def _folder(self, limits: Mapping[str, int]) -> Path:
        if not self.made:
            return Path(self.given.folder).resolve()
        return self.root / ("all" if not limits else "+".join(f"{code}@{n}" for code, n in sorted(limits.items())))

    def _text(self, language: str) -> str | Path:
        if self.given.text:
            return self.given.text[language]
        path = self.root / "text" / f"{language}.txt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_sentences(language, path, self.given.sentences, seed=0)
        return path


def sha256(key: str, path: str) -> str:
    """Of a file's content; UserError, which names the key, if it can't be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}; name an existing file, or leave the language out") from None
