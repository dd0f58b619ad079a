"""Inputs of a corpus, read as a stream and cut into raw blocks of about 2 MB, whatever they are.

An input is a path (plain text, or .gz, .bz2, .xz of it; a Wikipedia XML dump; the <doc ...> files that WikiExtractor
makes of one; a folder of any of these, read in name order), `-` for standard input, or `hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]`
for a Hugging Face dataset. A file's kind is recognised by its first bytes, not by its name.
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

from mlinterf_ds.data.running_text import check_running_text
from mlinterf_ds.data.tokenizer import line_end
from mlinterf_ds.errors import UserError

BLOCK = 1 << 21  # bytes (of texts: characters). Fixed, so that a corpus never depends on the number of workers
LONGEST_LINE = 1 << 16  # bytes: a longer line is dropped, and never held in memory whole
LONGEST_DOCUMENT = 1 << 24  # bytes: a longer <doc> is cut at a line
UNSHOWN = ("-2", "6", "14")  # keys of the namespaces of media, pictures and categories in a dump's head

STANDARD_INPUT, STANDARD_INPUT_NAME = "-", "standard input"
_DECOMPRESSORS: dict[bytes, Any] = {
    b"\x1f\x8b": lambda stored: gzip.GzipFile(fileobj=stored),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}


@dataclass(frozen=True)
class RawBlock:
    """A piece of one input: whole lines, or whole documents.

    `kind` says how `content` is to be read: "lines" (bytes, a sentence a line), "docs" (bytes, <doc> elements), "pages" (wiki
    markup, a string a page) or "texts" (plain text, a string a document).
    """

    name: str  # of the input
    kind: Literal["lines", "docs", "pages", "texts"]
    first: int  # number of the first line (lines, docs) or document (pages, texts) in the input, from 1
    content: bytes | list[str]
    unshown: tuple[str, ...] = ()  # pages: the dump's names of the namespaces of pictures and categories


@dataclass
class Input:
    """One file, standard input, or one dataset. Once `blocks` has been read, `facts` holds its name, and of a file or
    standard input its size and SHA-256."""

    name: str  # in messages and in the manifest: never a path of this machine
    path: Path | None  # None: standard input or a dataset
    dataset: str = ""  # NAME[:CONFIG[:SPLIT[:COLUMN]]]
    unshown: tuple[str, ...] = ()  # of a dump, once its head has been read

    def identity(self) -> list[Any]:
        """Returns what identifies an input before it is read: an interrupted run only goes on with the same inputs."""
        return [self.name] if self.path is None else [str(self.path.resolve()), self.path.stat().st_size]

    def blocks(self) -> Iterator[RawBlock]:
        self.facts: dict[str, Any] = {"name": self.name}
        self.bytes_read = 0
        if self.dataset:
            yield from _batches(self, "texts", _dataset_texts(self))
            return
        try:
            raw = _Hashed(self, sys.stdin.buffer if self.path is None else self.path.open("rb", buffering=0))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None
        with io.BufferedReader(raw, 1 << 20) as stored:
            try:
                opener = next(
                    (_DECOMPRESSORS[magic] for magic in _DECOMPRESSORS if stored.peek(8).startswith(magic)), None
                )
                stream: Any = io.BufferedReader(opener(stored), 1 << 20) if opener else stored
                yield from _stream_blocks(self, stream)
            except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:  # bz2 and gzip raise OSError
                raise UserError(f"{self.name}: the compressed file is damaged or cut short ({error})") from None
            while stored.read(1 << 20):  # bytes that a decompressor left over belong to the digest
                pass
        if self.bytes_read == 0:
            raise UserError(f"{self.name}: the input is empty; give it text, one sentence a line")
        self.facts |= {"bytes": self.bytes_read, "sha256": raw.digest.hexdigest()}


def find_inputs(specification: str | Path) -> list[Input]:
    """Returns the inputs that one argument names. Raises UserError for a missing or empty file, or a folder without files."""
    text = str(specification)
    if text == STANDARD_INPUT:
        if sys.stdin is None:
            raise UserError("- (standard input): it is closed; pipe the text into this command, or name a file")
        return [Input(STANDARD_INPUT_NAME, None)]
    if text.startswith("hf:"):
        return [Input(text, None, text.removeprefix("hf:"))]
    path = Path(specification)
    if path.is_dir():
        shown = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = sorted(p for p in shown if p.is_file() and p.stat().st_size)
        if not files:
            raise UserError(
                f"{path}: the folder holds no files, or only empty or hidden ones; give text files, one sentence a line"
            )
        return [Input(f"{path.name}/{file.relative_to(path)}", file) for file in files]
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path (or use - for standard input)")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; give it text, one sentence a line")
    return [Input(path.name, path)]


class _Hashed(io.RawIOBase):
    """A stream whose bytes are counted and hashed as they are read."""

    def __init__(self, owner: Input, file: BinaryIO) -> None:
        self._owner, self._file, self.digest = owner, file, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except OSError as error:
            raise UserError(f"{self._owner.name}: cannot be read: {error.strerror}") from None
        buffer[: len(data)] = data
        self.digest.update(data)
        self._owner.bytes_read += len(data)
        return len(data)


def _stream_blocks(text: Input, stream: io.BufferedReader) -> Iterator[RawBlock]:
    start = stream.peek(LONGEST_LINE).lstrip(b"\xef\xbb\xbf\r\n\t ")  # without byte-order marks
    if start.startswith((b"<mediawiki", b"<?xml")):
        yield from _batches(text, "pages", _dump_pages(text, stream))
    elif start.startswith(b"<doc "):
        yield from _cut(text, "docs", stream, b"</doc>", LONGEST_DOCUMENT)
    else:
        check_running_text(text.name, start)
        yield from _cut(text, "lines", stream, b"\n", LONGEST_LINE, line_end(start))


def _cut(
    text: Input,
    kind: Literal["lines", "docs"],
    stream: io.BufferedReader,
    boundary: bytes,
    longest: int,
    line_end: bytes = b"\n",
) -> Iterator[RawBlock]:
    """Yields blocks that end at `boundary`, or at any newline if no boundary comes within `longest` bytes.

    Newlines stand in for carriage returns, with a newline or alone, and for the file's `line_end`. Of a line that is too long only so much is kept that it is recognised as too long.
    """
    open_ends = (b"\r", *(line_end[:size] for size in range(1, len(line_end))))
    rest, line = b"", 1
    skipping = False  # inside a line that is too long, whose start is in `rest`
    while chunk := stream.read(BLOCK):
        while chunk.endswith(open_ends) and (more := stream.read(1)):  # the line end may go on there
            chunk += more
        chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(line_end, b"\n")
        if (nul := chunk.find(b"\0")) >= 0:
            number = line + rest.count(b"\n") + chunk.count(b"\n", 0, nul)
            raise UserError(
                f"{text.name}, line {number}: a NUL byte, so this is not UTF-8 text; give plain text "
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
            yield RawBlock(text.name, kind, line, content)
            line += content.count(b"\n")
        open_line = rest.rfind(b"\n") + 1
        if len(rest) - open_line > LONGEST_LINE:
            rest, skipping = rest[: open_line + LONGEST_LINE + 1], True
    if rest:
        yield RawBlock(text.name, kind, line, rest)


def _batches(text: Input, kind: Literal["pages", "texts"], texts: Iterator[str]) -> Iterator[RawBlock]:
    batch: list[str] = []
    size, first = 0, 1
    for document in texts:
        batch.append(document)
        size += len(document)
        if size >= BLOCK:
            yield RawBlock(text.name, kind, first, batch, text.unshown)
            first += len(batch)
            batch, size = [], 0
    if batch:
        yield RawBlock(text.name, kind, first, batch, text.unshown)


def _dump_pages(text: Input, stream: io.BufferedReader) -> Iterator[str]:
    """Yields the wiki markup of a MediaWiki XML dump's articles: the pages of namespace 0 that are not redirects."""
    try:
        events = ElementTree.iterparse(stream, events=("start", "end"))
        _, root = next(events)
        if (name := root.tag.rpartition("}")[2]) != "mediawiki":
            raise UserError(
                f"{text.name}: XML whose root is <{name}>, and not a MediaWiki dump, which begins with <mediawiki>; take the "
                "text out first, one sentence a line"
            )
        for event, element in events:
            tag = element.tag.rpartition("}")[2]
            if event == "end" and tag == "namespace" and element.get("key") in UNSHOWN:
                text.unshown += (element.text or "",)
            if event == "start" or tag != "page":
                continue
            prefix = element.tag.removesuffix("page")
            markup = element.findtext(f"{prefix}revision/{prefix}text")
            if markup and element.findtext(f"{prefix}ns") == "0" and element.find(f"{prefix}redirect") is None:
                yield markup
            root.clear()  # else the pages already read stay in memory
    except ElementTree.ParseError as error:
        raise UserError(
            f"{text.name}, line {error.position[0]}: not well-formed XML ({error}); download the dump again"
        ) from None


def _dataset_texts(text: Input) -> Iterator[str]:
    """Yields the text column of a Hugging Face dataset as a stream; each row is a document."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{text.name}: needs the library `datasets`: pip install datasets, or give a file instead"
        ) from None
    name, config, split, column, *more = [*text.dataset.split(":"), "", "", ""]
    if not name or any(more):
        raise UserError(f"{text.name}: expected hf:NAME[:CONFIG[:SPLIT[:COLUMN]]]")
    column = column or "text"
    try:
        for row in datasets.load_dataset(name, config or None, split=split or "train", streaming=True):
            if not isinstance(row.get(column, 0), str | None):
                raise UserError(f"{text.name}: no text column {column!r}; it has: {', '.join(sorted(row))}")
            yield row[column] or ""
    except UserError:
        raise
    except Exception as error:  # the library raises dozens of types: offline, unknown name, gated, moved
        raise UserError(
            f"{text.name}: the dataset cannot be loaded ({type(error).__name__}: {error}); check the name, that this "
            "machine is online, or download it elsewhere and give the files"
        ) from error
