"""The corpus that needs no download: synthetic languages, prepared like any text when a run first needs them.

python -m mlinterf_ds.data.prepare.synthetic '[["syn", "syn-mid"], 20000, {"syn-mid": 2000}]'
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mlinterf_ds.data.corpus import MANIFEST, synthetic_folder
from mlinterf_ds.data.prepare.main import TOKENIZER, prepare
from mlinterf_ds.data.synthetic import write_sentences
from mlinterf_ds.errors import UserError, ready_streams
from mlinterf_ds.files import lock

VOCABULARY = 2000


def prepare_synthetic(
    languages: Sequence[str], sentences: int, limits: Mapping[str, int] | None = None, folder: Path | None = None
) -> None:
    """Makes the corpus of these languages in `folder` (default: `synthetic_folder(...)`), unless it is there already.

    `sentences` are generated for each language. `limits` caps the training sentences of some languages; such a corpus has
    the vocabulary and the held-out sentences of the corpus without limits, which is made first.
    """
    limits = dict(limits or {})
    if unknown := [code for code in limits if code not in languages]:
        raise UserError(
            f"data.synthetic_limit names {', '.join(unknown)}, which the corpus does not have: its languages are "
            f"{', '.join(languages)}"
        )
    folder, tokenizer = folder or synthetic_folder(languages, sentences, limits), None
    if limits:
        prepare_synthetic(languages, sentences)
        tokenizer = synthetic_folder(languages, sentences) / TOKENIZER
    with _writing(folder.parent), _locked(folder):
        if (folder / MANIFEST).is_file():
            return
        print(f"making a synthetic corpus of {', '.join(languages)} in {folder}", flush=True)
        text = folder.parent / f".{folder.name}.text"
        text.mkdir(exist_ok=True)
        inputs: dict[str, list[str | Path]] = {language: [text / f"{language}.txt"] for language in languages}
        for language in languages:
            write_sentences(language, text / f"{language}.txt", sentences, seed=0)
        prepare(inputs, folder, vocabulary_size=VOCABULARY, tokenizer=tokenizer, limits=limits, progress=False)
        shutil.rmtree(text)


@contextmanager
def _writing(corpora: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{corpora}: the synthetic corpus cannot be written there ({error.strerror}): start in another working directory, or prepare a "
            "corpus with tools/prepare_corpus.py"
        ) from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A context that one process at a time is in: of two runs that start at once one prepares the corpus, the other waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("wb") as file:
        lock(file, wait=True)
        yield


if __name__ == "__main__":
    ready_streams()
    try:
        prepare_synthetic(*json.loads(sys.argv[1]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
