"""The corpus that needs no download: synthetic languages, prepared like any text on first use."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlinterf_ds.data.prepare.main import prepare
from mlinterf_ds.data.synthetic import write_text
from mlinterf_ds.errors import UserError

LANGUAGES = ["syn", "syn-mid"]  # of a run that names none
VOCABULARY = 2000


def folder_of(languages: Sequence[str], sentences: int, limits: Mapping[str, int]) -> Path:
    """The folder of the corpus of these languages, whether it is there or not."""
    suffix = "".join(f"-{code}={count}" for code, count in sorted(limits.items()))
    return Path("corpora") / f"synthetic-{sentences}-{'+'.join(languages)}{suffix}"


def prepare_synthetic(
    languages: Sequence[str], sentences: int, limits: Mapping[str, int] | None = None, folder: Path | None = None
) -> None:
    """Make the corpus of these languages in `folder` (default: `folder_of`), unless it is there.

    sentences: of each language. limits: training sentences that some languages keep; the corpus then has the vocabulary
    and the held-out sentences of the corpus without limits.
    """
    limits = limits or {}
    if unknown := [code for code in limits if code not in languages]:
        raise UserError(
            f"data.synthetic_limit names {', '.join(unknown)}, which the corpus doesn't have: languages are "
            f"{', '.join(languages)}"
        )
    folder, tokenizer = folder or folder_of(languages, sentences, limits), None
    if limits:
        prepare_synthetic(languages, sentences)
        tokenizer = folder_of(languages, sentences, {}) / "tokenizer.model"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two jobs that start at once prepare it once
        if (folder / "manifest.json").is_file():
            return
        print(f"making a synthetic corpus of {', '.join(languages)} in {folder}", flush=True)
        text = folder.parent / f".{folder.name}.text"
        text.mkdir(exist_ok=True)
        for language in languages:
            write_text(language, text / f"{language}.txt", sentences, seed=0)
        sources: Any = {language: [text / f"{language}.txt"] for language in languages}
        prepare(sources, folder, vocabulary_size=VOCABULARY, tokenizer=tokenizer, limits=dict(limits), progress=False)
        shutil.rmtree(text)
