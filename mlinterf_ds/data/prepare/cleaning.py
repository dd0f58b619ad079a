"""Turns a raw block into a clean one: normalised sentences, stored as distinct words and indices, and their hashes."""

import html
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.data.prepare.inputs import LONGEST_LINE, RawBlock
from mlinterf_ds.data.tokenizer import strip_invisible
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import read_json, write_array, write_arrays, write_json

FIRST_NUMBERS = 5  # how many line numbers are reported for each reason to drop lines
# Documents hold paragraphs. A sentence ends at one of these marks before a space (Latin, Indic, Arabic, Armenian, Ethiopic,
# Burmese, Khmer, Tibetan, where they come in pairs), or at a full-width mark that no closing bracket or quotation mark follows.
SENTENCE_END = re.compile(
    r"(?<=[.!?\u2026\u0964\u0965\u061f\u06d4\u0589\u1362\u1367\u104b\u17d4\u17d5\u0f0d\u0f0e])\s+(?![\s\u0f0d\u0f0e])"
    r"|(?<=[\u3002\uff01\uff1f\uff61])(?![\u3002\uff01\uff1f\uff61\u300d\u300f\uff63\u201d\u2019\uff09\u300b])"
)
# A block in which this many lines, and more than half of all, cannot be decoded is no UTF-8 text at all.
FEWEST_UNDECODABLE = 5
# English names of namespaces are known in every wiki, and a dump's head lacks the aliases of its language's.
_UNSHOWN = {"media", "file", "image", "category"}
_MEDIA = re.compile(r"(?i)\.(?:jpe?g|png|gif|svg|tiff?|webp|xcf|pdf|djvu|og[agv]|opus|webm|mp3|wav|flac|midi?)\s*$")
_LANGUAGE = re.compile(r"[a-z]{2,}(?:-[a-z]+)*")  # the prefix of a link to the same article in another language
_LINE_BREAK = re.compile(r"(?i)</?(?:br|p)\b[^<>]*>")
_TAGS_WITHOUT_TEXT = ("ref", "table", "gallery", "math")
_HEADING_OR_LIST = re.compile(r"^[=*#:;|!{}\s]+|[=\s]+$")

EMPTY, CONTROL, UTF8, TOO_LONG = "empty", "control characters only", "invalid UTF-8", "too long"

Dropped = dict[str, dict[str, Any]]  # reason -> {"lines": how many, "first": the first few, as "INPUT:LINE"}


def add_dropped(total: Dropped, reason: str, lines: int, first: list[str]) -> None:
    """Adds lines that were dropped for a reason to `total`."""
    entry = total.setdefault(reason, {"lines": 0, "first": []})
    entry["lines"] += lines
    entry["first"] += first[: FIRST_NUMBERS - len(entry["first"])]


@dataclass
class _Lines:
    """The lines of a block that may hold a sentence, their whitespace not yet folded, and the lines that were dropped."""

    lines: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of the line, or of the document, in its input
    documents: list[int] = field(default_factory=list)  # empty where every line stands alone
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason -> line or document numbers

    def drop(self, reason: str, number: int) -> None:
        self.dropped.setdefault(reason, []).append(number)

    def told(self, name: str) -> Dropped:
        """The dropped lines of an input of this name."""
        first = {why: [f"{name}:{number}" for number in lines[:FIRST_NUMBERS]] for why, lines in self.dropped.items()}
        return {why: {"lines": len(lines), "first": first[why]} for why, lines in self.dropped.items()}


def hash_path(block: Path) -> Path:
    """Returns the file of a block's line hashes, ascending, and of the line that each belongs to.  # (2, lines) uint64"""
    return block.with_name(block.name.replace(".block.npz", ".hash.npy"))


def clean_block(task: tuple[RawBlock, Path]) -> dict[str, Any]:
    """Cleans a raw block and writes it to a path, unless an earlier run did. Raises UserError if it is not UTF-8 text.

    The file's arrays: `words`, the distinct words, as UTF-8 bytes with a newline between two; `index` (words of the
    text,) into them; and for each sentence `lengths` (in words), `line` (its hash), `unit` (the hash of what splits keep
    together: its document, or itself), `document` (a number that differs from one document to the next) and `number` (of
    its line in the input). Returns "source", "sentences", "characters", "dropped" and "reused".
    """
    raw, path = task
    facts_path = path.with_suffix(".json")
    fingerprint = _fingerprint(raw)
    if facts_path.exists() and (facts := read_json(facts_path))["fingerprint"] == fingerprint:
        return {**facts, "reused": True}
    facts_path.unlink(missing_ok=True)
    text = _read(raw)
    # A NUL, which no line holds any more, stands between two lines: the block is split into words without a loop.
    words = " \0 ".join(text.lines).split()
    lines = " ".join(words).split(" \0 ") if words else []
    known: defaultdict[str, int] = defaultdict(count(-1).__next__)
    separator = known["\0"]
    index = np.fromiter(map(known.__getitem__, words), dtype=np.int32, count=len(words))
    line = hashes(lines)
    unit, document = (line, np.arange(len(lines), dtype=np.int32)) if raw.kind == "lines" else _units(text, lines)
    del known["\0"]
    order = np.argsort(line, kind="stable")
    write_array(hash_path(path), np.stack([line[order], order.astype(np.uint64)]))
    write_arrays(
        path,
        index=index[index != separator],
        lengths=(np.diff(np.flatnonzero(index == separator), prepend=-1, append=len(words)) - 1)[: len(lines)],
        line=line,
        unit=unit,
        document=document,
        number=np.array(text.numbers, dtype=np.int64),
        words=np.frombuffer("\n".join(known).encode(), dtype=np.uint8),
    )
    facts = {
        "fingerprint": fingerprint,
        "source": raw.name,
        "sentences": len(lines),
        "characters": sum(map(len, lines)),
        "dropped": text.told(raw.name),
    }
    write_json(facts_path, facts)
    return {**facts, "reused": False}


def _units(text: _Lines, lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hash of each line's document, and the document's number: two arrays (lines,)."""
    document = np.array(text.documents, dtype=np.int32)
    starts = np.flatnonzero(np.diff(document, prepend=-1))
    sizes = np.diff(starts, append=len(lines))
    unit = hashes(["\n".join(lines[a : a + n]) for a, n in zip(starts, sizes, strict=True)])
    return np.repeat(unit, sizes), document


def _fingerprint(raw: RawBlock) -> str:
    """Returns a hash of a raw block, by which a later run knows whether its clean block can be reused."""
    content = raw.content if isinstance(raw.content, bytes) else "\0".join(raw.content).encode(errors="surrogatepass")
    content += "\0".join(raw.unshown).encode()
    return blake2b(content, digest_size=16, key=f"{raw.name} {raw.kind} {raw.first}".encode()[-64:]).hexdigest()


def hashes(texts: list[str]) -> np.ndarray:
    """Returns a 64-bit hash of each text, the same on every machine and in every process.  # (texts,) uint64

    Two different texts have the same hash with probability 2^-64: of 23,000 corpora of 40 million lines each, one is
    expected to lose a line that is no duplicate.
    """
    digests = b"".join([blake2b(text.encode(), digest_size=8).digest() for text in texts])
    return np.frombuffer(digests, dtype="<u8")


def _read(raw: RawBlock) -> _Lines:
    text = _Lines()
    if isinstance(raw.content, list):
        for number, document in enumerate(raw.content, raw.first):
            if raw.kind == "pages":
                document = plain_text(document, raw.unshown)
            for paragraph in strip_invisible(document).split("\n"):
                _add_paragraph(text, paragraph, number, number)
        return text
    numbers, lines = _decoded(raw, text)
    clean = strip_invisible("\n".join(lines)).split("\n") if lines else []
    if raw.kind == "docs":
        count = 0
        for number, line in zip(numbers, clean, strict=True):
            if line.startswith("<doc "):
                count += 1
            elif line.strip() != "</doc>":
                _add_paragraph(text, strip_invisible(html.unescape(line)), number, count)
        return text
    blank = {i for i, line in enumerate(clean) if not line or line.isspace()}
    for i in sorted(blank):
        text.drop(CONTROL if lines[i].strip() else EMPTY, numbers[i])
    text.lines = [line for i, line in enumerate(clean) if i not in blank] if blank else clean
    text.numbers = [number for i, number in enumerate(numbers) if i not in blank]
    return text


def plain_text(markup: str, unshown: Sequence[str] = ()) -> str:
    """Returns the paragraphs of an article, one a line, without tables, templates, references, pictures and categories.

    unshown: the names of the namespaces of pictures and categories in the article's language. Raises UserError if mwparserfromhell, which does the parsing, is not installed.
    """
    try:
        import mwparserfromhell
    except ImportError:
        raise UserError(
            "a Wikipedia XML dump needs the library mwparserfromhell: pip install mwparserfromhell"
        ) from None
    # as a character without a meaning in the markup, since a link may hold one and no newline
    code = mwparserfromhell.parse(_LINE_BREAK.sub("\u2028", markup), skip_style_tags=True)
    names = _UNSHOWN.union(name.casefold() for name in unshown)
    links = [link for link in code.filter_wikilinks(recursive=True) if not _is_shown(link, names)]
    tags = code.filter_tags(recursive=True, matches=lambda tag: str(tag.tag).lower() in _TAGS_WITHOUT_TEXT)
    for node in [*links, *tags]:
        with suppress(ValueError):  # the node around it may have been removed before
            code.remove(node)
    text = code.strip_code(normalize=True, collapse=True, keep_template_params=False)
    lines = (
        _HEADING_OR_LIST.sub("", line.replace("'''", "").replace("''", "")) for line in re.split("[\n\u2028]", text)
    )
    return "\n".join(line for line in lines if line)


def _is_shown(link: Any, unshown: Collection[str]) -> bool:
    """Whether a link is read in the text, as "3:10 to Yuma" and ":Category:Towns" are, and no picture, category or language."""
    prefix, _, target = str(link.title).strip().partition(":")
    if not prefix or not target:
        return True
    if prefix.replace("_", " ").strip().casefold() in unshown or _MEDIA.search(target):
        return False
    return link.text is not None or target[0].isspace() or not _LANGUAGE.fullmatch(prefix)


def _add_paragraph(text: _Lines, paragraph: str, number: int, document: int) -> None:
    for sentence in SENTENCE_END.split(paragraph):
        if len(sentence.encode()) > LONGEST_LINE:
            text.drop(TOO_LONG, number)
        elif sentence and not sentence.isspace():
            text.lines.append(sentence)
            text.numbers.append(number)
            text.documents.append(document)


def _decoded(raw: RawBlock, text: _Lines) -> tuple[Sequence[int], list[str]]:
    """Returns the numbers and the text of a block's lines. Lines that are too long or not UTF-8 go to `text.dropped`.

    Raises UserError if so many lines cannot be decoded that the input is something else than UTF-8 text.
    """
    assert isinstance(raw.content, bytes)
    content = raw.content.removesuffix(b"\n")
    rows = content.split(b"\n")
    if max(map(len, rows)) <= LONGEST_LINE:
        try:
            return range(raw.first, raw.first + len(rows)), content.decode().split("\n")
        except UnicodeDecodeError:
            pass
    numbers, lines = [], []
    for number, row in enumerate(rows, raw.first):
        if len(row) > LONGEST_LINE:
            text.drop(TOO_LONG, number)
            continue
        try:
            lines.append(row.decode())
            numbers.append(number)
        except UnicodeDecodeError:
            text.drop(UTF8, number)
    bad = text.dropped.get(UTF8, [])
    if len(bad) >= FEWEST_UNDECODABLE and 2 * len(bad) > len(rows):
        raise UserError(
            f"{raw.name}, line {bad[0]}: not UTF-8 ({len(bad)} of the {len(rows)} lines from line {raw.first} on cannot "
            "be decoded); convert the file to UTF-8 first, for example with iconv"
        )
    return numbers, lines
