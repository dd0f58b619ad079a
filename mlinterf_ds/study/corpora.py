"""The corpora of a study: one of all its languages, and with the same vocabulary one for each set of limits."""

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
from mlinterf_ds.files import sha256
from mlinterf_ds.study.config import SYNTHETIC, StudyConfig


class Corpora:
    """The prepared text of every model. `limits` are training sentences kept of a language, for low-resource versions."""

    def __init__(self, config: StudyConfig, output: Path):
        self.section = config.corpus
        self.languages = config.languages
        self.made = bool(config.corpus.text) or config.corpus.folder == SYNTHETIC
        self.meta_split = config.controls.held_out
        self.limits = [dict(limits) for limits in dict.fromkeys(tuple(sorted(s.limits.items())) for s in config.sets)]
        self.limits += [{code: n} for limits in self.limits for code, n in limits.items()]  # for monolingual models
        self.halves = {group.languages[1]: group.languages[0] for group in config.sets if group.kind == "null"}
        self.own = [code for code in self.languages if config.controls.vocabulary and config.mono]
        if missing := [code for code in self.languages if self.section.text and code not in self.section.text]:
            raise UserError(f"corpus.text has no {', '.join(missing)}: name a file for every language of the sets")
        if (any(self.limits) or self.halves or self.own) and not self.made:
            raise UserError(
                f"corpus.folder={self.section.folder}: a prepared corpus can't be subsampled for sets with limits or of kind "
                "null, nor cut into other pieces for controls.vocabulary: give corpus.text, from which the study prepares what it needs"
            )
        texts = {code: path for code, path in self.section.text.items() if code in self.languages}
        files = {code: file_hash(f"corpus.text: {code}", path) for code, path in texts.items()}
        facts = [self.section.model_dump() | {"text": files}, self.languages, *["meta_split"] * self.meta_split]
        self.root = (
            output / "corpora" / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
        ).resolve()

    @property
    def vocabulary(self) -> int:
        """The number of pieces in the vocabulary; UserError for a folder that is no corpus."""
        return self.section.vocabulary if self.made else Corpus.open(self.section.folder).vocabulary_size

    def of(self, limits: Mapping[str, int], half: str = "", own: str = "") -> tuple[str, str]:
        """The folder of the corpus with these limits, and its manifest's hash, '' before the corpus is prepared.

        half: instead the text of one language alone, half of it under this code. own: instead this language alone, with a vocabulary
        of its own.
        """
        folder = self._folder(limits, half, own)
        return str(folder), Corpus.open(folder).manifest_hash if (folder / MANIFEST).is_file() else ""

    def make(self) -> None:
        """Prepare the corpora that are missing. UserError for text that can't be used."""
        if not self.made:
            Corpus.open(self.section.folder, self.languages)
            return
        sources: dict[str, list[str | Path]] = {code: [Path(self._text(code)).resolve()] for code in self.languages}
        for limits in [{}, *filter(None, self.limits)]:
            folder = self._folder(limits)
            if not (folder / MANIFEST).is_file():
                vocabulary: dict[str, Any] = {"vocabulary_size": self.section.vocabulary}
                if limits:
                    vocabulary = {"tokenizer": self._folder({}) / "tokenizer.model"}
                folder.parent.mkdir(parents=True, exist_ok=True)
                prepare(sources, folder, limits=limits, progress=False, meta_split=self.meta_split, **vocabulary)
        tokenizer = self._folder({}) / "tokenizer.model"
        for half, source in self.halves.items():
            if not (self._folder({}, half) / MANIFEST).is_file():
                text = {source: sources[source]}
                prepare(text, self._folder({}, half), halves={half: source}, tokenizer=tokenizer, progress=False)

        for code in self.own:
            if not (self._folder({}, own=code) / MANIFEST).is_file():
                folder, pieces = self._folder({}, own=code), self.section.vocabulary
                prepare(
                    {code: sources[code]}, folder, vocabulary_size=pieces, meta_split=self.meta_split, progress=False
                )

    def adopt(self) -> bool:
        """If the present text was never prepared, uses the corpora that were prepared last; False if there are none."""
        others = [folder for folder in self.root.parent.glob("*") if folder.is_dir()]
        if not self.made or self.root.is_dir() or not others:
            return False
        self.root = max(others, key=lambda folder: folder.stat().st_mtime)
        return True

    def _folder(self, limits: Mapping[str, int], half: str = "", own: str = "") -> Path:
        if not self.made:
            return Path(self.section.folder).resolve()
        if half:
            return self.root / f"halves+{half}"
        if own:
            return self.root / f"own+{own}"
        return self.root / ("all" if not limits else "+".join(f"{code}@{n}" for code, n in sorted(limits.items())))

    def _text(self, language: str) -> str | Path:
        """The text file of a language; a synthetic one is written first."""
        if self.section.text:
            return self.section.text[language]
        path = self.root / "text" / f"{language}.txt"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_sentences(language, path, self.section.sentences, seed=0)
        return path


def file_hash(key: str, path: str) -> str:
    """The hash of a file's content; UserError, which names the configuration key, if it can't be read."""
    try:
        return sha256(Path(path))
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}; name an existing file, or leave the language out") from None
