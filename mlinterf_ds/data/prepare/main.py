"""Prepares a corpus: cleans, deduplicates and splits text, learns one vocabulary, and encodes. See `prepare`."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlinterf_ds.data.corpus import (
    FORMAT,
    LANGUAGE,
    MANIFEST,
    VERSION,
    Corpus,
    check_known,
    manifest_digest,
    unknown_share,
)
from mlinterf_ds.data.foreign import is_folder, vocabulary_file
from mlinterf_ds.data.prepare import stages
from mlinterf_ds.data.prepare.inputs import STANDARD_INPUT, STANDARD_INPUT_NAME, Input, find_inputs
from mlinterf_ds.data.prepare.vocabulary import learn
from mlinterf_ds.data.prepare.workers import WorkerKilled, Workers
from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import file_facts, read_json, sha256, write_bytes, write_json

WORK = ".work"  # the folder of finished work, from which an interrupted run goes on; removed at the end
ARGUMENTS = "arguments.json"  # the inputs and settings that the folder is prepared from
TOKENIZER = "tokenizer.model"

# The system's errors when no more can be written: disk full, quota reached, file size limit.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REMEDIES = {errno.EMFILE: "; allow more open files first: `ulimit -n 4096`"}
_REMEDIES |= dict.fromkeys(
    (errno.EACCES, errno.EROFS, errno.ENOTDIR), "; name a folder in which you may write: --out FOLDER"
)


def prepare(
    inputs: Mapping[str, Sequence[str | Path]],
    out: str | Path,
    *,
    vocabulary_size: int = 32_000,
    temperature: float = 2.0,
    tokenizer: str | Path | None = None,
    extends: str | Path | None = None,
    limits: Mapping[str, int] | None = None,
    halves: Mapping[str, str] | None = None,
    licence: str = "",
    meta_split: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Corpus:
    """Writes a corpus of `inputs` (language code -> inputs, see `mlinterf_ds.data.prepare.inputs`) into the folder `out`.

    A sentence is a line; in inputs with documents (dumps, <doc> files, datasets) it is a sentence of a paragraph.
    Sentences are normalised (`mlinterf_ds.data.tokenizer`). Empty ones, lines that are not UTF-8, lines over 64 KiB and exact
    duplicates within a language are dropped and counted. Valid and test, with `meta_split` also meta, get
    `splits.held_out` sentences of a language each, chosen by the hash of the line, or of the document where the input has
    documents (which are never torn apart). A language needs 50 distinct sentences or documents.

    `limits` caps a language's training sentences, in the order of their hashes: a smaller limit keeps a subset of what a
    larger one keeps, and what is held out stays the same. `halves` (a new code -> a language) splits a language's text in two
    without a common sentence, by the hash of the line or document: the language keeps one half, the new code gets the other. The vocabulary is learned on the training splits, language i
    weighing (sentences_i / all)^(1 / temperature), normalised. `tokenizer` takes another corpus's vocabulary instead, so
    that perplexities can be compared, or that of a model's `transformers` folder. `extends` names a corpus whose vocabulary
    is kept, ids and all, and extended to `vocabulary_size` pieces by those of the languages that it lacks; or a model's
    folder, whose vocabulary gets pieces of the scripts that it lacks. `licence` is a note for the manifest.

    The result is the same, bit for bit, for any number of `workers` (default: all cores). After an interruption the same
    call goes on from there; a finished folder is opened as it is. Raises UserError for unusable inputs or numbers, for a
    folder that holds anything else, and when the disk is full.
    """
    if tokenizer is not None and extends is not None:
        raise UserError(
            f"--tokenizer {tokenizer} and --extend {extends}: one takes a vocabulary as it is, the other extends one; give one of them"
        )
    limits, halves = dict(limits or {}), dict(halves or {})
    _check_halves(inputs, halves)
    texts = _checked_inputs(dict(inputs) | {new: inputs[code] for new, code in halves.items()})
    _check_numbers(texts, vocabulary_size, temperature, limits, workers)
    given = None if tokenizer is None else vocabulary_of(tokenizer)
    old, known = (None, []) if extends is None else _extended(Path(extends))
    arguments: dict[str, Any] = {
        "sources": {code: [text.identity() for text in of_language] for code, of_language in texts.items()},
        "vocabulary": [vocabulary_size, temperature] if given is None else _facts(given),
        "limits": limits,
        "licence": licence,
    }
    further = {"extends": old and _facts(old), "meta_split": meta_split, "halves": halves}
    arguments |= {name: value for name, value in further.items() if value}
    folder = Path(out)
    with _explained(folder), _locked(folder):
        if _already_prepared(folder, arguments):
            return _checked(Corpus.open(folder))
        languages = [
            stages.Language(code, of_language, folder / WORK / code, limits.get(code), meta_split, _half(code, halves))
            for code, of_language in texts.items()
        ]
        with _freed(folder), Workers(workers or len(os.sched_getaffinity(0))) as pool:
            manifest = _run(languages, folder, vocabulary_size, temperature, given, old, known, pool, progress)
        _finish(folder, {"format": FORMAT, "version": VERSION, "licence": licence, **manifest})
    return Corpus.open(folder)


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, which makes the corpus one, and removes the work files."""
    write_json(folder / MANIFEST, manifest | {"digest": manifest_digest(manifest)})
    shutil.rmtree(folder / WORK)


def _checked(corpus: Corpus) -> Corpus:
    """The corpus. Warns, or raises UserError, if its vocabulary lacks too much of a language's text."""
    check_known(corpus.folder, {code: corpus.unknown(code) for code in corpus.languages})
    return corpus


@contextmanager
def _freed(folder: Path) -> Iterator[None]:
    """A context whose UserError frees the folder for other arguments or inputs, since these must change.

    The cleaned blocks stay; what was made of them with these arguments goes.
    """
    try:
        yield
    except WorkerKilled:
        raise
    except UserError:
        for shard in [*folder.glob("*.bin"), *folder.glob("*.idx")]:
            shard.unlink()
        _forget_after_cleaning(folder)
        (folder / ARGUMENTS).unlink()
        raise


def _run(
    languages: list[stages.Language],
    folder: Path,
    size: int,
    temperature: float,
    given: Tokenizer | None,
    old: Tokenizer | None,
    known: Collection[str],
    pool: Workers,
    show: bool,
) -> dict[str, Any]:
    """Takes the languages through all stages, writes the tokenizer and the shards, and returns the manifest's contents.

    `given` is the tokenizer to use, `old` the one that is extended by pieces of the languages that are not `known` to it.
    """
    for language in languages:
        language.folder.mkdir(exist_ok=True)
    if not stages.clean(languages, pool, show):
        _forget_after_cleaning(folder)
    for language in languages:
        stages.deduplicate_and_split(language, pool, show)
    path = folder / TOKENIZER
    if given is not None:
        write_bytes(path, given.content)
    if not path.exists():  # neither given nor learned before an interruption
        new = [language for language in languages if language.code not in known] if old else []
        learn(new or languages, size, temperature, path, pool, show, old)
    tokenizer = Tokenizer(path)
    splits = stages.encode(languages, tokenizer, folder, pool, show)
    check_known(folder, {code: unknown_share(of_language) for code, of_language in splits.items()})
    return {
        "vocabulary": {"size": tokenizer.size, "temperature": None if given else temperature, **_entry(path)},
        "dtype": tokenizer.dtype.__name__,
        "languages": {
            language.code: _language_facts(language) | {"splits": splits[language.code]} for language in languages
        },
    }


def _language_facts(language: stages.Language) -> dict[str, Any]:
    """What the manifest says of a language's text."""
    sources = [text.facts for text in language.inputs]
    return {"sources": sources, "limit": language.limit, "dropped": language.dropped}


def vocabulary_of(path: str | Path) -> Tokenizer:
    """The tokenizer of a file, a corpus, a checkpoint or a model's `transformers` folder."""
    return Tokenizer(path, vocabulary_file(Path(path)))


def _extended(path: Path) -> tuple[Tokenizer, list[str]]:
    """The vocabulary to extend, and the languages that it has pieces of: of a corpus or of a model's folder."""
    if is_folder(path):
        return vocabulary_of(path), []
    corpus = Corpus.open(path)
    return corpus.tokenizer, corpus.languages


def _facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """The name, size and digest of a tokenizer."""
    content = tokenizer.content
    return {"file": tokenizer.path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _entry(path: Path) -> dict[str, Any]:
    """Returns the manifest's entry of a file: its name, size and digest."""
    return {"file": path.name, **file_facts(path)}


def _checked_inputs(inputs: Mapping[str, Sequence[str | Path]]) -> dict[str, list[Input]]:
    """Returns each language's inputs. Raises UserError for a bad language code or an input that is not there."""
    if not inputs:
        raise UserError("no languages: give at least one, as LANGUAGE=FILE, for example en=english.txt")
    for code in inputs:
        if not LANGUAGE.fullmatch(code):
            hint = f"write {code.lower()!r}" if LANGUAGE.fullmatch(code.lower()) else "for example 'en' or 'zh-hant'"
            raise UserError(
                f"language {code!r}: a code is a lower-case letter, then lower-case letters, digits, - or _, and not "
                f"'shared'; {hint}"
            )
    texts = {code: [text for argument in named for text in find_inputs(argument)] for code, named in inputs.items()}
    if empty := [code for code, of_language in texts.items() if not of_language]:
        raise UserError(f"language {empty[0]!r}: no input; give at least one file")
    if sum(str(argument) == STANDARD_INPUT for named in inputs.values() for argument in named) > 1:
        raise UserError("standard input (-) is given twice, but can be read only once")
    return texts


def _check_halves(inputs: Mapping[str, Any], halves: Mapping[str, str]) -> None:
    for new, code in halves.items():
        if code not in inputs or new in inputs or list(halves.values()).count(code) > 1:
            raise UserError(
                f"halves {new}={code}: expected a new code and, once, a language that has inputs ({', '.join(inputs)}), whose text "
                "the two then share out"
            )
        if any(str(argument) == STANDARD_INPUT for argument in inputs[code]):
            raise UserError(
                f"halves {new}={code}: both read the text of {code}, and standard input can be read only once"
            )


def _half(code: str, halves: Mapping[str, str]) -> int | None:
    """Which half of the text it was given a language keeps: 0, a new code 1; None: all of it."""
    return 1 if code in halves else 0 if code in halves.values() else None


def _check_numbers(
    languages: Collection[str], size: int, temperature: float, limits: Mapping[str, int], workers: int | None
) -> None:
    for code, limit in limits.items():
        if code not in languages:
            raise UserError(f"limit {code}={limit}: no such language in this corpus; it has {', '.join(languages)}")
        if limit < 1:
            raise UserError(f"limit {code}={limit}: must be at least 1 sentence")
    if size < 1:
        raise UserError(f"vocabulary size {size}: must be positive")
    if not temperature > 0:
        raise UserError(
            f"vocabulary temperature {temperature}: must be above 0; 1 is proportional, higher is more even"
        )
    if workers is not None and workers < 1:
        raise UserError(f"workers {workers}: must be at least 1")


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turns an error of the disk or the folder into a UserError that says what it means for the corpus."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"{folder}: the disk is full ({error.strerror}); free some space and run the same command again: "
                "finished blocks are kept"
            ) from error
        path = Path(error.filename or folder)
        ours = path.is_relative_to(folder) or folder.is_relative_to(path)  # and not a text that is read
        remedy = _REMEDIES.get(error.errno or 0, "") if ours else ""
        raise UserError(f"{path}: {error.strerror or error}{remedy}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the folder against other preparations. The lock is this process's own: workers do not inherit it."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder for the corpus")
    foreign = [] if (folder / ARGUMENTS).exists() or not folder.exists() else sorted(set(os.listdir(folder)) - {WORK})
    if foreign:
        raise UserError(f"{folder}: holds other files ({', '.join(foreign[:3])}); give an empty or a new folder")
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    with (folder / WORK / "lock").open("wb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is preparing a corpus here; wait for it") from None
        yield


def _already_prepared(folder: Path, arguments: dict[str, Any]) -> bool:
    """Returns whether the folder holds the finished corpus; if not, claims it for `arguments`.

    Raises UserError if it was claimed for other arguments, or if an input of the finished corpus is newer than the corpus
    or can be read only once.
    """
    path = folder / ARGUMENTS
    if path.exists():
        with refusing(f"{path}: damaged", "; give another folder, or remove this one first"):
            claimed = dict(read_json(path))
        names = [*arguments, *claimed.keys() - arguments.keys()]  # a key that is left out stands for an empty value
        if differing := [name for name in names if (claimed.get(name) or None) != (arguments.get(name) or None)]:
            raise UserError(
                f"{folder}: {'holds' if (folder / MANIFEST).exists() else 'is half-way to'} a corpus with other "
                f"{', '.join(differing)} (see {path}); give another folder, or remove this one first"
            )
    if (folder / MANIFEST).exists():
        _check_unchanged(folder, arguments["sources"])
        shutil.rmtree(folder / WORK)
        return True
    if not path.exists():
        _forget_after_cleaning(folder)
        write_json(path, arguments)
    return False


def _check_unchanged(folder: Path, sources: Mapping[str, Sequence[Sequence[Any]]]) -> None:
    """UserError if an input of a finished corpus was changed since, or can be read only once. A time alone, which a clock that
    runs wrong may have written, is no change."""
    finished = (folder / MANIFEST).stat().st_mtime_ns
    with refusing(f"{folder / MANIFEST}: damaged", "; prepare the corpus anew"):
        languages = read_json(folder / MANIFEST)["languages"]
        known = [facts.get("sha256") for code in sources for facts in languages[code]["sources"]]
    for (name, *size), digest in zip(
        (text for of_language in sources.values() for text in of_language), known, strict=True
    ):
        if name == STANDARD_INPUT_NAME:
            raise UserError(f"{folder}: the corpus is finished; to read {name} again give another folder")
        if size and Path(name).stat().st_mtime_ns > finished and sha256(Path(name)) != digest:
            raise UserError(f"{folder}: the corpus is finished, and {name} was changed since; give another folder")


def _forget_after_cleaning(folder: Path) -> None:
    """Removes the work files that an earlier run made from other sentences or with other arguments."""
    for stale in [folder / TOKENIZER, *(folder / WORK).glob("*/*.tokens.*")]:
        stale.unlink(missing_ok=True)
