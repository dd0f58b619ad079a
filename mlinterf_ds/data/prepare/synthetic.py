"""The corpus that needs no download: synthetic languages, prepared like any text on first use."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlinterf_ds.config import DataConfig
from mlinterf_ds.data.prepare.main import prepare
from mlinterf_ds.data.synthetic import write_text
from mlinterf_ds.errors import UserError

LANGUAGES = ["syn", "syn-mid"]  # of a run that names none
VOCABULARY = 2000


def folder_of(languages: Sequence[str], data: DataConfig) -> Path:
    """Where the corpus of these languages is, or will be made."""
    limits = "".join(f"-{code}={count}" for code, count in sorted(data.synthetic_limit.items()))
    return Path("corpora") / f"synthetic-{data.synthetic_sentences}-{'+'.join(languages)}{limits}"


def prepare_synthetic(languages: Sequence[str], data: DataConfig, folder: Path | None = None) -> None:
    """A corpus in `folder` (default: `folder_of(languages, data)`), unless it is there already.

    With limits it has the vocabulary, and what is held out, of the corpus without them.
    """
    if unknown := [code for code in data.synthetic_limit if code not in languages]:
        raise UserError(
            f"data.synthetic_limit names {', '.join(unknown)}, which the corpus doesn't have: languages are "
            f"{', '.join(languages)}"
        )
    folder, tokenizer = folder or folder_of(languages, data), None
    if data.synthetic_limit:
        whole = data.model_copy(update={"synthetic_limit": {}})
        prepare_synthetic(languages, whole)
        tokenizer = folder_of(languages, whole) / "tokenizer.model"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two jobs that start at once prepare it once
        if (folder / "manifest.json").is_file():
            return
        print(f"making a synthetic corpus of {', '.join(languages)} in {folder}", flush=True)
        text = folder.parent / f".{folder.name}.text"
        text.mkdir(exist_ok=True)
        for language in languages:
            write_text(language, text / f"{language}.txt", data.synthetic_sentences, seed=0)
        sources: Any = {language: [text / f"{language}.txt"] for language in languages}
        limits = data.synthetic_limit
        prepare(sources, folder, vocabulary_size=VOCABULARY, tokenizer=tokenizer, limits=limits, progress=False)
        shutil.rmtree(text)
