"""From a raw block to a clean one: normalised sentences, factored into distinct words and indices, and their hashes."""

import html
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.data.prepare.inputs import LONGEST_LINE, RawBlock
from mlinterf_ds.data.text import hashes, strip_invisible
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import read_json, write_array, write_arrays, write_json

FIRST_NUMBERS = 5  # line numbers reported for each reason
# Texts of documents come as paragraphs; a sentence ends at one of these before a space, or at a full-width one.
SENTENCE_END = re.compile(r"(?<=[.!?\u2026\u0964\u0965\u061f\u06d4])\s+|(?<=[\u3002\uff01\uff1f])")
# A block with this many undecodable lines, and more than half of its lines so, is not UTF-8 text at all.
FEWEST_UNDECODABLE = 5

EMPTY, CONTROL, UTF8, TOO_LONG = "empty", "control characters only", "invalid UTF-8", "too long"


Dropped = dict[str, dict[str, Any]]  # reason -> {"lines": how many, "first": where the first few are, as "SOURCE:LINE"}


def add_dropped(total: Dropped, reason: str, lines: int, first: list[str]) -> None:
    entry = total.setdefault(reason, {"lines": 0, "first": []})
    entry["lines"] += lines
    entry["first"] += first[: FIRST_NUMBERS - len(entry["first"])]


@dataclass
class _Found:
    """Lines of a block that may hold a sentence, their whitespace not yet folded, and what was lost."""

    lines: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of the line, or of the document in its source
    documents: list[int] = field(default_factory=list)  # empty where every line stands alone
    lost: dict[str, list[int]] = field(default_factory=dict)  # reason -> line or document numbers

    def lose(self, reason: str, number: int) -> None:
        self.lost.setdefault(reason, []).append(number)


def hash_path(block: Path) -> Path:
    """Where the hashes of a block's lines are, in ascending order, and which line each is of.  # (2, lines) uint64"""
    return block.with_name(block.name.replace(".block.npz", ".hash.npy"))


def clean_block(task: tuple[RawBlock, Path]) -> dict[str, Any]:
    """Clean a raw block and write it to a path, unless that has been done. Raises UserError if it is not UTF-8 text.

    The file's arrays: `words`, the distinct words, as UTF-8 bytes with a newline between two; `index` (words of the
    text,) into them; for each sentence `lengths` (in words), `line` (its hash), `unit` (the hash of what must not be
    torn apart by a split: its document, or itself), `document` (a number that differs from one to the next) and
    `number` (of its line in the source). Returns "source", "sentences", "characters", "dropped" and "reused".
    """
    raw, path = task
    facts_path = path.with_suffix(".json")
    fingerprint = _fingerprint(raw)
    if facts_path.exists() and (facts := read_json(facts_path))["fingerprint"] == fingerprint:
        return {**facts, "reused": True}
    facts_path.unlink(missing_ok=True)
    found = _read(raw)
    # All words of the block with a NUL, which no line holds any more, between two lines: no loop over lines.
    words = " \0 ".join(found.lines).split()
    lines = " ".join(words).split(" \0 ") if words else []
    known: defaultdict[str, int] = defaultdict(count(-1).__next__)
    separator = known["\0"]
    index = np.fromiter(map(known.__getitem__, words), dtype=np.int32, count=len(words))
    line = hashes(lines)
    unit, document = line, np.arange(len(lines), dtype=np.int32)
    if raw.kind != "lines":
        document = np.array(found.documents, dtype=np.int32)
        unit = _document_hashes(lines, document)
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
        number=np.array(found.numbers, dtype=np.int64),
        words=np.frombuffer("\n".join(known).encode(), dtype=np.uint8),
    )
    dropped: Dropped = {}
    for reason, numbers in found.lost.items():
        add_dropped(dropped, reason, len(numbers), [f"{raw.source}:{n}" for n in numbers[:FIRST_NUMBERS]])
    facts = {
        "fingerprint": fingerprint,
        "source": raw.source,
        "sentences": len(lines),
        "characters": sum(map(len, lines)),
        "dropped": dropped,
    }
    write_json(facts_path, facts)
    return {**facts, "reused": False}


def _fingerprint(raw: RawBlock) -> str:
    """Tells a block of an earlier run that is the same from one that isn't."""
    content = raw.content if isinstance(raw.content, bytes) else "\0".join(raw.content).encode(errors="surrogatepass")
    return blake2b(content, digest_size=16, key=f"{raw.source} {raw.kind} {raw.first}".encode()[-64:]).hexdigest()


def _document_hashes(lines: list[str], document: np.ndarray) -> np.ndarray:
    """For each line the hash of the text of its document.  # (lines,) uint64"""
    starts = np.flatnonzero(np.diff(document, prepend=-1))
    sizes = np.diff(starts, append=len(lines))
    return np.repeat(hashes(["\n".join(lines[a : a + n]) for a, n in zip(starts, sizes, strict=True)]), sizes)


def _read(raw: RawBlock) -> _Found:
    found = _Found()
    if isinstance(raw.content, list):
        for number, text in enumerate(raw.content, raw.first):
            if raw.kind == "pages":
                from mlinterf_ds.data.prepare.wikitext import plain_text

                text = plain_text(text)
            for paragraph in strip_invisible(text).split("\n"):
                _add_paragraph(found, paragraph, number, number)
        return found
    numbers, lines = _decoded(raw, found)
    clean = strip_invisible("\n".join(lines)).split("\n") if lines else []
    if raw.kind == "docs":
        document = 0
        for number, line in zip(numbers, clean, strict=True):
            if line.startswith("<doc "):
                document += 1
            elif line.strip() != "</doc>":
                _add_paragraph(found, strip_invisible(html.unescape(line)), number, document)
        return found
    blank = {i for i, line in enumerate(clean) if not line or line.isspace()}
    for i in sorted(blank):
        found.lose(CONTROL if lines[i].strip() else EMPTY, numbers[i])
    found.lines = [line for i, line in enumerate(clean) if i not in blank] if blank else clean
    found.numbers = [number for i, number in enumerate(numbers) if i not in blank]
    return found


def _add_paragraph(found: _Found, paragraph: str, number: int, document: int) -> None:
    for sentence in SENTENCE_END.split(paragraph):
        if len(sentence.encode()) > LONGEST_LINE:
            found.lose(TOO_LONG, number)
        elif sentence and not sentence.isspace():
            found.lines.append(sentence)
            found.numbers.append(number)
            found.documents.append(document)


def _decoded(raw: RawBlock, found: _Found) -> tuple[Sequence[int], list[str]]:
    """Numbers and text of a block's lines, but for those too long or not UTF-8, which are noted in `found`.

    Raises UserError if so many can't be decoded that this is something else than UTF-8 text.
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
            found.lose(TOO_LONG, number)
            continue
        try:
            lines.append(row.decode())
            numbers.append(number)
        except UnicodeDecodeError:
            found.lose(UTF8, number)
    bad = found.lost.get(UTF8, [])
    if len(bad) >= FEWEST_UNDECODABLE and 2 * len(bad) > len(rows):
        raise UserError(
            f"{raw.source}, line {bad[0]}: not UTF-8 ({len(bad)} of the {len(rows)} lines from line {raw.first} on can't be "
            "decoded); convert the file to UTF-8 first, for example with iconv"
        )
    return numbers, lines
