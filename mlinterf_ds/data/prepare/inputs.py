"""Inputs of a corpus, read as a stream and cut into raw blocks of about 2 MB, whatever they are.

A source is a path (plain text, or .gz, .bz2, .xz of it; a Wikipedia XML dump; the <doc ...> files that WikiExtractor
makes of one; a folder of any of these, read in name order), `-` for standard input, or `hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]`
for a Hugging Face dataset. What a file holds is told from its first bytes, not its name.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal
from xml.etree import ElementTree

from mlinterf_ds.errors import UserError

BLOCK = 1 << 21  # bytes (of texts: characters). Fixed: what a corpus holds never depends on the number of workers
LONGEST_LINE = 1 << 16  # bytes: a longer line is dropped and counted, and never held in memory whole
LONGEST_DOCUMENT = 1 << 24  # bytes: a longer <doc> is cut at a line

STANDARD_INPUT, STANDARD_INPUT_NAME = "-", "standard input"
_DECOMPRESSORS: dict[bytes, Any] = {
    b"\x1f\x8b": lambda stored: gzip.GzipFile(fileobj=stored),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}


@dataclass(frozen=True)
class RawBlock:
    """A piece of one source: whole lines, or whole documents.

    `kind` says what `content` is: "lines" (bytes, a sentence a line), "docs" (bytes, <doc> elements), "pages" (wiki
    markup, a string a page) or "texts" (plain text, a string a document).
    """

    source: str
    kind: Literal["lines", "docs", "pages", "texts"]
    first: int  # number of the first line (lines, docs) or document (pages, texts) in the source, from 1
    content: bytes | list[str]


@dataclass
class Source:
    """One file, standard input or dataset. `facts` (its name, and for bytes their number and SHA-256) fills up as
    `blocks` is gone through."""

    name: str  # in messages and in the manifest: never a path of this machine
    path: Path | None  # None: standard input or a dataset
    dataset: str = ""  # NAME[:CONFIG[:SPLIT[:COLUMN]]]

    def blocks(self) -> Iterator[RawBlock]:
        self.facts: dict[str, Any] = {"name": self.name}
        self.bytes_read = 0
        if self.dataset:
            yield from _batches(self, "texts", _dataset_texts(self))
            return
        raw = _Hashed(self, sys.stdin.buffer if self.path is None else _open(self.path))
        with io.BufferedReader(raw, 1 << 20) as stored:
            try:
                yield from _stream_blocks(self, _decompressed(stored))
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                raise UserError(f"{self.name}: the compressed file is damaged or cut short ({error})") from None
            while stored.read(1 << 20):  # what a decompressor left over counts in the hash
                pass
        if self.bytes_read == 0:
            raise UserError(f"{self.name}: the input is empty; give it text, one sentence a line")
        self.facts |= {"bytes": self.bytes_read, "sha256": raw.digest.hexdigest()}


def find_sources(specification: str | Path) -> list[Source]:
    """The sources that one argument names. Raises UserError if it is missing, or a folder without files."""
    text = str(specification)
    if text == STANDARD_INPUT:
        return [Source(STANDARD_INPUT_NAME, None)]
    if text.startswith("hf:"):
        return [Source(text, None, text.removeprefix("hf:"))]
    path = Path(specification)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size and not p.name.startswith("."))
        if not files:
            raise UserError(
                f"{path}: the folder holds no files with anything in them; give text files, one sentence a line"
            )
        return [Source(f"{path.name}/{file.relative_to(path)}", file) for file in files]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path (or use - for standard input)")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; give it text, one sentence a line")
    return [Source(path.name, path)]


class _Hashed(io.RawIOBase):
    """The bytes of a stream, counted and hashed as they go by."""

    def __init__(self, source: Source, file: BinaryIO) -> None:
        self._source, self._file, self.digest = source, file, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except OSError as error:
            raise UserError(f"{self._source.name}: cannot be read: {error.strerror}") from None
        buffer[: len(data)] = data
        self.digest.update(data)
        self._source.bytes_read += len(data)
        return len(data)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _decompressed(stored: Any) -> io.BufferedReader:
    start = stored.peek(8)
    for magic, opener in _DECOMPRESSORS.items():
        if start.startswith(magic):
            return io.BufferedReader(opener(stored), 1 << 20)
    return stored


def _stream_blocks(source: Source, stream: io.BufferedReader) -> Iterator[RawBlock]:
    start = stream.peek(512)[:512].removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith((b"<mediawiki", b"<?xml")):
        yield from _batches(source, "pages", _dump_pages(source, stream))
    elif start.startswith(b"<doc "):
        yield from _cut(source, "docs", stream, b"</doc>", LONGEST_DOCUMENT)
    else:
        yield from _cut(source, "lines", stream, b"\n", LONGEST_LINE)


def _cut(
    source: Source, kind: Literal["lines", "docs"], stream: io.BufferedReader, boundary: bytes, longest: int
) -> Iterator[RawBlock]:
    """Blocks that end at `boundary`, or at any newline where none comes within `longest` bytes.

    Of an over-long line only enough is kept for it to be seen as such.
    """
    rest, line = b"", 1
    skipping = False  # inside an over-long line, whose start is in `rest`
    while chunk := stream.read(BLOCK):
        if (nul := chunk.find(b"\0")) >= 0:
            number = line + rest.count(b"\n") + chunk.count(b"\n", 0, nul)
            raise UserError(
                f"{source.name}, line {number}: a NUL byte, so this is no UTF-8 text; give plain text "
                "(UTF-16 can be converted with iconv), .gz, .bz2 or .xz of it, or a Wikipedia dump"
            )
        if skipping:
            newline = chunk.find(b"\n")
            if newline < 0:
                continue
            chunk, skipping = chunk[newline:], False
        data = rest + chunk
        cut = data.rfind(boundary) + len(boundary)
        if cut < len(boundary):
            cut = 0 if len(data) <= longest else data.rfind(b"\n") + 1
        content, rest = data[:cut], data[cut:]
        if content:
            yield RawBlock(source.name, kind, line, content)
            line += content.count(b"\n")
        open_line = rest.rfind(b"\n") + 1
        if len(rest) - open_line > LONGEST_LINE:
            rest, skipping = rest[: open_line + LONGEST_LINE + 1], True
    if rest:
        yield RawBlock(source.name, kind, line, rest)


def _batches(source: Source, kind: Literal["pages", "texts"], texts: Iterator[str]) -> Iterator[RawBlock]:
    batch: list[str] = []
    size, first = 0, 1
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BLOCK:
            yield RawBlock(source.name, kind, first, batch)
            first += len(batch)
            batch, size = [], 0
    if batch:
        yield RawBlock(source.name, kind, first, batch)


def _dump_pages(source: Source, stream: io.BufferedReader) -> Iterator[str]:
    """Wiki markup of the articles of a MediaWiki XML dump: pages of namespace 0 that are not redirects."""
    try:
        events = ElementTree.iterparse(stream, events=("start", "end"))
        _, root = next(events)
        for event, element in events:
            if event == "start" or element.tag.rpartition("}")[2] != "page":
                continue
            prefix = element.tag.removesuffix("page")
            text = element.findtext(f"{prefix}revision/{prefix}text")
            if text and element.findtext(f"{prefix}ns") == "0" and element.find(f"{prefix}redirect") is None:
                yield text
            root.clear()  # pages already read would otherwise stay in memory
    except ElementTree.ParseError as error:
        raise UserError(
            f"{source.name}, line {error.position[0]}: not well-formed XML ({error}); download the dump again"
        ) from None


def _dataset_texts(source: Source) -> Iterator[str]:
    """The text column of a Hugging Face dataset, streamed; each row is a document."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source.name}: needs the library `datasets`: pip install datasets, or give a file instead"
        ) from None
    name, config, split, column, *more = [*source.dataset.split(":"), "", "", ""]
    if not name or any(more):
        raise UserError(f"{source.name}: expected hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]")
    column = column or "text"
    try:
        for row in datasets.load_dataset(name, config or None, split=split or "train", streaming=True):
            if not isinstance(row.get(column), str):
                raise UserError(f"{source.name}: no text column {column!r}; it has: {', '.join(sorted(row))}")
            yield row[column]
    except UserError:
        raise
    except Exception as error:  # the library raises dozens of kinds: offline, unknown name, gated, moved
        raise UserError(
            f"{source.name}: the dataset cannot be loaded ({type(error).__name__}: {error}); check the name, that this "
            "machine is online, or download it elsewhere and give the files"
        ) from error


def source_identity(source: Source) -> list[Any]:
    """What tells, before reading, whether a source is still the one that an interrupted run was reading."""
    return [source.name] if source.path is None else [str(source.path.resolve()), source.path.stat().st_size]
