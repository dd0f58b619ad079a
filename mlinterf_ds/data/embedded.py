"""The corpus that needs no download: synthetic languages, prepared like any text on first use."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlinterf_ds.data.prepare import prepare
from mlinterf_ds.data.synthetic import write_text

LANGUAGES = ["syn", "syn-mid"]  # of a run that names none
VOCABULARY = 2000


def prepare_synthetic(folder: Path, languages: Sequence[str], count: int) -> None:
    """A corpus of `count` sentences a language in `folder`, unless it is there already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two jobs that start at once prepare it once
        if (folder / "manifest.json").is_file():
            return
        print(f"making a synthetic corpus of {', '.join(languages)} in {folder}", flush=True)
        text = folder.parent / f".{folder.name}.text"
        text.mkdir(exist_ok=True)
        for language in languages:
            write_text(language, text / f"{language}.txt", count, seed=0)
        sources: Any = {language: [text / f"{language}.txt"] for language in languages}
        prepare(sources, folder, vocabulary_size=VOCABULARY, progress=False)
        shutil.rmtree(text)
