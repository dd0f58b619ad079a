"""Prepare a corpus: clean, deduplicate, split, learn one vocabulary, encode. See `prepare`."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlinterf_ds.data.corpus import FORMAT, LANGUAGE, MANIFEST, VERSION, Corpus, manifest_digest
from mlinterf_ds.data.prepare import stages
from mlinterf_ds.data.prepare.inputs import STANDARD_INPUT, STANDARD_INPUT_NAME, find_sources, source_identity
from mlinterf_ds.data.prepare.workers import WorkerKilled, Workers
from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import file_facts, read_json, write_bytes, write_json

WORK = ".work"  # what an interrupted run had finished; removed at the end
ARGUMENTS = "arguments.json"  # what a folder was, or is being, prepared from
TOKENIZER = "tokenizer.model"

# What the system says when no more can be written: disk full, quota reached, file size limit.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def prepare(
    sources: Mapping[str, Sequence[str | Path]],
    out: str | Path,
    *,
    vocabulary_size: int = 32_000,
    temperature: float = 2.0,
    tokenizer: str | Path | None = None,
    extends: str | Path | None = None,
    limits: Mapping[str, int] | None = None,
    licence: str = "",
    workers: int | None = None,
    progress: bool = True,
) -> Corpus:
    """Write a corpus of `sources` (language code -> inputs, see `mlinterf_ds.data.prepare.inputs`) into the folder `out`.

    A sentence is a line; for inputs that have documents (dumps, <doc> files, datasets), a sentence of a paragraph.
    Sentences are normalised (`mlinterf_ds.data.text`); empty ones, lines that aren't UTF-8, lines over 64 KiB and exact
    duplicates within a language are dropped and counted. Valid, test and meta get 2% of a language's sentences each, but
    at least 50 or a tenth, whichever is less, and at most 10,000: by the hash of the line, or of the document where the
    input has documents (these are never torn apart). A language needs 50 distinct sentences or documents.

    `limits` caps a language's training sentences, in the order of their hashes, so that a smaller limit is a subset of a
    larger and what is held out stays the same. The vocabulary is learned on the training splits, language i weighing
    (sentences_i / all)^(1 / temperature), normalised; or `tokenizer` takes another corpus's, so that perplexities can
    be compared between the two. `extends` names a corpus whose vocabulary is kept, ids and all, and extended to
    `vocabulary_size` pieces by those of the languages that it lacks. `licence` is a note for the manifest.

    The result is the same, bit for bit, for any number of `workers` (default: all cores). After an interruption the same
    call goes on where it was; a folder that is finished is returned as it is. Raises UserError for unusable input, for a
    folder that holds anything else, and when the disk is full.
    """
    found = _checked_sources(sources)
    limits = dict(limits or {})
    _check_numbers(found, vocabulary_size, temperature, limits, workers)
    old = None if extends is None else Corpus.open(extends)
    arguments = {
        "sources": {code: [source_identity(source) for source in of] for code, of in found.items()},
        "vocabulary": [vocabulary_size, temperature] if tokenizer is None else _entry(Tokenizer(tokenizer).path),
        **({} if old is None else {"extends": _entry(old.tokenizer.path)}),
        "limits": limits,
        "licence": licence,
    }
    folder = Path(out)
    with _explained(folder), _locked(folder):
        if _already_prepared(folder, arguments):
            return Corpus.open(folder)
        languages = [_language(code, of, folder, limits.get(code)) for code, of in found.items()]
        try:
            with Workers(workers or len(os.sched_getaffinity(0))) as pool:
                manifest = _run(languages, folder, vocabulary_size, temperature, tokenizer, old, pool, progress)
        except WorkerKilled:
            raise
        except UserError:  # the arguments or the input must change, and then this folder may be used
            (folder / ARGUMENTS).unlink()
            raise
        manifest = {"format": FORMAT, "version": VERSION, "licence": licence, **manifest}
        write_json(folder / MANIFEST, manifest | {"digest": manifest_digest(manifest)})
        shutil.rmtree(folder / WORK)
    return Corpus.open(folder)


def _run(
    languages: list[stages.Language],
    folder: Path,
    size: int,
    temperature: float,
    given: str | Path | None,
    old: Corpus | None,
    pool: Workers,
    show: bool,
) -> dict[str, Any]:
    if not stages.clean(languages, pool, show):
        _forget_after_cleaning(folder)
    for language in languages:
        stages.deduplicate_and_split(language, pool, show)
    path = folder / TOKENIZER
    if given is not None:
        write_bytes(path, Path(given).read_bytes())
    if path.exists():
        tokenizer = Tokenizer(path)
    elif old:
        new = [language for language in languages if language.code not in old.languages]
        tokenizer = stages.learn(new or languages, size, temperature, path, pool, show, old.tokenizer)
    else:
        tokenizer = stages.learn(languages, size, temperature, path, pool, show)
    splits = stages.encode(languages, tokenizer, folder, pool, show)
    return {
        "vocabulary": {"size": tokenizer.size, "temperature": None if given else temperature, **_entry(path)},
        "dtype": tokenizer.dtype.__name__,
        "languages": {
            x.code: {
                "sources": [source.facts for source in x.sources],
                "limit": x.limit,
                "dropped": x.dropped,
                "splits": splits[x.code],
            }
            for x in languages
        },
    }


def _entry(path: Path) -> dict[str, Any]:
    """Returns what the manifest says of a file: its name, size and digest."""
    return {"file": path.name, **file_facts(path)}


def limits_of(arguments: Sequence[str]) -> dict[str, int]:
    """Parses the arguments of `--limit`, LANGUAGE=N each: the training sentences that a language keeps."""
    limits: dict[str, int] = {}
    for argument in arguments:
        language, _, number = argument.partition("=")
        if not number.isdecimal() or language in limits:
            raise UserError(f"--limit {argument}: expected LANGUAGE=N once for a language, for example fr=10000")
        limits[language] = int(number)
    return limits


def _checked_sources(sources: Mapping[str, Sequence[str | Path]]) -> dict[str, list[Any]]:
    if not sources:
        raise UserError("no languages: give at least one, as LANGUAGE=FILE, for example en=english.txt")
    for code in sources:
        if not LANGUAGE.fullmatch(code):
            hint = f"write {code.lower()!r}" if LANGUAGE.fullmatch(code.lower()) else "for example 'en' or 'zh-hant'"
            raise UserError(
                f"language {code!r}: a code is a lower-case letter, then lower-case letters, digits, - or _, and not "
                f"'shared'; {hint}"
            )
    found = {code: [source for x in of for source in find_sources(x)] for code, of in sources.items()}
    if empty := [code for code, of in found.items() if not of]:
        raise UserError(f"language {empty[0]!r}: no input; give at least one file")
    if sum(str(x) == STANDARD_INPUT for of in sources.values() for x in of) > 1:
        raise UserError("standard input (-) is given twice; it can be read once")
    return found


def _check_numbers(
    found: Mapping[str, Any], size: int, temperature: float, limits: Mapping[str, int], workers: int | None
) -> None:
    for code, limit in limits.items():
        if code not in found:
            raise UserError(f"limit {code}={limit}: no such language here; there are: {', '.join(found)}")
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
    """Tell the user what a failing disk or folder means for the corpus."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"{folder}: the disk is full ({error.strerror}); free some space and run the same command again: what is "
                "finished is kept"
            ) from error
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep the folder to ourselves. The lock is the process's own: workers don't inherit it."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file; give a folder for the corpus")
    foreign = [] if (folder / ARGUMENTS).exists() or not folder.exists() else sorted(set(os.listdir(folder)) - {WORK})
    if foreign:
        raise UserError(f"{folder}: holds other files ({', '.join(foreign[:3])}); give an empty or a new folder")
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    with (folder / WORK / "lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is preparing a corpus here; wait for it") from None
        yield


def _already_prepared(folder: Path, arguments: dict[str, Any]) -> bool:
    """Whether the folder is finished. Claims it for `arguments`; raises UserError if it is taken for others."""
    path = folder / ARGUMENTS
    if path.exists():
        with refusing(f"{path}: damaged", "; give another folder, or remove this one first"):
            theirs = dict(read_json(path))
        if differing := [name for name, value in arguments.items() if theirs.get(name) != value]:
            done = (folder / MANIFEST).exists()
            raise UserError(
                f"{folder}: {'holds' if done else 'is half-way to'} a corpus with other {', '.join(differing)} (see {path}); "
                "give another folder, or remove this one first"
            )
    if (folder / MANIFEST).exists():
        _check_unchanged(folder, arguments)
        shutil.rmtree(folder / WORK)
        return True
    if not path.exists():
        _forget_after_cleaning(folder)
        write_json(path, arguments)
    return False


def _check_unchanged(folder: Path, arguments: dict[str, Any]) -> None:
    finished = (folder / MANIFEST).stat().st_mtime_ns
    for sources in arguments["sources"].values():
        for name, *size in sources:
            if size and Path(name).stat().st_mtime_ns > finished:
                raise UserError(f"{folder}: the corpus is finished, and {name} was changed since; give another folder")
            if name == STANDARD_INPUT_NAME:
                raise UserError(f"{folder}: the corpus is finished; to read {name} again give another folder")


def _forget_after_cleaning(folder: Path) -> None:
    """Remove what an earlier run made of other sentences or with other arguments."""
    for stale in [folder / TOKENIZER, *(folder / WORK).glob("*/*.tokens.*")]:
        stale.unlink(missing_ok=True)


def _language(code: str, sources: list[Any], folder: Path, limit: int | None) -> stages.Language:
    work = folder / WORK / code
    work.mkdir(exist_ok=True)
    return stages.Language(code, sources, work, limit)
