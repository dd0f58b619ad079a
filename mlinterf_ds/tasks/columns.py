"""Files of tagged words: a word and its tag a line, a blank line after each sentence. They come back byte for byte.

Read are files with the word in the first column and the tag in the last (CoNLL 2003, WikiAnn, MultiCoNER), and files whose
first column numbers the words (CoNLL-U, CoNLL-U Plus, GermEval, Universal NER), with comments in both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from mlinterf_ds.data.tokenizer import normalise
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_text
from mlinterf_ds.tasks.files import bad, read_text

Tags = Sequence[Sequence[str]]
Check = Callable[[str], str]  # returns what is wrong with a tag, or ''
NUMBER = re.compile(r"[\d.,]*\d[\d.,]*")
NO_WORD = re.compile(r"\d+-\d+|\d+\.\d+")  # IDs of multiword tokens (their words follow) and of empty nodes
NAMES = re.compile(r"#\s*global\.columns\s*=\s*(.+)")  # the first line of CoNLL-U Plus
COMMONEST, FEWEST_WORDS = 0.5, 20  # a word that makes up more than this share of so many words is no word
PLACEHOLDERS = 3  # so many words of a sentence are `_`, and all of them: the text was left out


@dataclass(frozen=True)
class Sentence:
    """A tagged sentence and the lines of the file that it came from."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    raw: tuple[str, ...]  # every line up to the next sentence, comments and blank lines included
    lines: tuple[int, ...]  # index into `raw` of each word's line
    path: Path
    first_line: int  # number of raw[0], from 1
    column: int | None = -1  # the tag's column; -1: the last; None: the lines hold words alone
    remark: str = ""  # what the user should know of how the file was read
    ignored: frozenset[int] = frozenset()  # words that are not scored

    def location(self, word: int) -> str:
        """File and line of a word."""
        return f"{self.path}, line {self.first_line + self.lines[word]}"

    def retagged(self, tags: Sequence[str]) -> list[str]:
        """The lines of the file with other tags."""
        lines = list(self.raw)
        for index, tag in zip(self.lines, tags, strict=True):
            body = lines[index].rstrip("\r")
            ending = lines[index][len(body) :]
            if self.column is None:
                body += f"\t{tag}"
            else:
                end = len(body.rstrip())
                start = end - len(body.split()[-1])
                if self.column >= 0:
                    start, end = _span(body, self.column)
                body = body[:start] + tag + body[end:]
            lines[index] = body + ending
        return lines


@dataclass(frozen=True)
class Layout:
    """Which column of a file holds what."""

    tabs: bool  # tabs separate columns, not spaces
    width: int  # columns of a line
    word: int = 0
    tag: int | None = -1  # None: there is no column of tags
    numbered: bool = False  # the first column numbers the words
    strict: bool = False  # it does so from 1 without a gap, as in CoNLL-U
    remark: str = ""

    def columns(self, line: str) -> list[str]:
        """The columns of a line. In two columns separated by spaces, a number may hold spaces, as in treebanks ("10 000 NUM")."""
        columns = split(line, self.tabs)
        if not self.tabs and self.width == 2 < len(columns) and all(map(NUMBER.fullmatch, columns[:-1])):
            return [" ".join(columns[:-1]), columns[-1]]
        return columns

    def comments(self, line: str) -> bool:
        """Whether a line before a sentence's first word is a comment: it starts with `# ` (or `## `) and is no such word with a tag."""
        if self.numbered or not line.startswith("#"):
            return line.startswith("#")
        columns = self.columns(line)
        return line.lstrip("#")[:1] in ("", " ", "\t") and (
            len(columns) != self.width or bool(re.search("[=:/]", columns[-1]))
        )


CONLLU = Layout(tabs=True, width=10, word=1, tag=3, numbered=True, strict=True)


def split(line: str, tabs: bool) -> list[str]:
    """The columns of a line."""
    return line.split("\t") if tabs else [column for column in line.split(" ") if column]


def _span(body: str, column: int) -> tuple[int, int]:
    """Where a column, counted from 0, lies in a line."""
    if "\t" not in body:
        return list(re.finditer("[^ ]+", body))[column].span()
    columns = body.split("\t")
    start = len("\t".join(columns[:column])) + (column > 0)
    return start, start + len(columns[column])


def read_columns(
    path: Path,
    check: Check,
    name: str,
    *,
    width: int = 0,
    layout: Layout | None = None,
    rename: Callable[[str], str] = str,
    blank: str = "",
) -> list[Sentence]:
    """The sentences of a file; without a `layout` it is found out.

    name: of the tags' column in CoNLL-U Plus; width: columns of a file whose words have no numbers (0: as many as the first
    line has); rename: the tag by which a file's tag is replaced; blank: of new text, the tag of words that have none, else "".
    UserError names the line of a mistake.
    """
    lines = _lines(path)
    layout = layout or find_layout(path, lines, lambda tag: check(rename(tag)), name, width, bool(blank))
    sentences: list[Sentence] = []
    pending: list[str] = []  # blocks of comments alone, which belong to the sentence that follows
    for first, end, after in _blocks(lines):
        block, start = pending + lines[first:after], first - len(pending)
        pending = block
        if parsed := list(_words(path, lines, first, end, layout)):
            numbers, words, tags = zip(*parsed, strict=True)
            tags = tuple(map(rename, tags))
            if blank:  # what the file has instead of a tag, if it has anything, is replaced
                tags = tuple(blank if check(tag) else tag for tag in tags)
            for number, tag in zip(numbers, tags, strict=True):
                if why := check(tag):
                    raise bad(path, number + 1, why)
            raw, indices = tuple(block), tuple(number - start for number in numbers)
            sentences.append(Sentence(words, tags, raw, indices, path, start + 1, layout.tag, layout.remark))
            pending = []
    if not sentences:
        raise UserError(f"{path}: the file holds no words; expected one word and its tag a line")
    if pending:  # comments after the last sentence
        sentences[-1] = replace(sentences[-1], raw=(*sentences[-1].raw, *pending))
    _check_words(sentences)
    return sentences


def _lines(path: Path) -> list[str]:
    """The lines of a file, each with the carriage return that may end it."""
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if "\r" in line.rstrip("\r"):
            ends = "all lines end alike: with a newline, a carriage return, or both"
            raise bad(path, number, f"a carriage return inside the line; {ends}")
    return lines


def _blocks(lines: list[str]) -> Iterator[tuple[int, int, int]]:
    """(first line, line after the last, line after the blank lines that follow) of every block of non-blank lines."""
    first = 0
    while first < len(lines):
        end = first
        while end < len(lines) and lines[end].strip():
            end += 1
        after = end
        while after < len(lines) and not lines[after].strip():
            after += 1
        yield first, end, after
        first = after


def _words(path: Path, lines: list[str], first: int, end: int, layout: Layout) -> Iterator[tuple[int, str, str]]:
    """(index of the line, word, tag) of every word in a block of lines."""
    count = 0
    for index in range(first, end):
        body = lines[index].rstrip("\r")
        if _starts_document(body) or ((layout.numbered or not count) and layout.comments(body)):
            continue
        columns = layout.columns(body)
        if len(columns) != layout.width:
            separator = "tabs" if layout.tabs else "spaces"
            expected = "a word alone" if layout.tag is None else "a word, ..., its tag"
            expected = "CoNLL-U" if layout.strict else expected
            message = f"{len(columns)} columns, expected {layout.width} ({expected}) separated by {separator}"
            raise bad(path, index + 1, message)
        if layout.numbered:
            if NO_WORD.fullmatch(columns[0]):
                continue
            expected = str(count + 1) if layout.strict else columns[0] if columns[0].isdecimal() else "a number"
            if columns[0] != expected:
                raise bad(path, index + 1, f"ID {columns[0]!r}: expected {expected}, N-M or N.M")
        count += 1
        tag = "" if layout.tag is None else columns[layout.tag]
        yield index, columns[layout.word], tag.strip() if layout.tag == -1 else tag


def _starts_document(line: str) -> bool:
    """Whether a line is CoNLL's mark of a new document."""
    return line.split(maxsplit=1)[:1] == ["-DOCSTART-"]


def find_layout(path: Path, lines: list[str], check: Check, name: str, width: int, blank: bool) -> Layout:
    """The layout of a file, from the names in its header or from its lines; blank: the tags need not be there."""
    bodies = [line.rstrip("\r") for line in lines]
    full = [body for body in bodies if body.strip() and not _starts_document(body)]
    sure = [body for body in full if not body.startswith("#")] or full
    tabs = bool(sure) and "\t" in sure[0]
    if header := next((match for body in full[:1] if (match := NAMES.match(body))), None):
        names = header[1].split()
        tags = [index for index, title in enumerate(names) if name in title.upper()]
        if "FORM" not in names or not (tags or blank):
            raise UserError(f"{path}: global.columns has {' '.join(names)}, expected FORM and a column named {name}")
        return Layout(tabs, len(names), names.index("FORM"), tags[0] if tags else None, names[0] == "ID")
    first = split(sure[0], tabs) if sure else []
    if not _is_numbered(bodies, tabs):
        if blank and len(first) == 1:
            return Layout(tabs, 1, tag=None)
        rows = [split(body, tabs) for body in sure]
        others = [
            k for k in range(1, (width or len(first)) - 1) if not any(check(row[k]) for row in rows if len(row) > k)
        ]
        return Layout(tabs, width or max(2, len(first)), remark=_remark(path, len(first) - 1, others))
    if name == "UPOS" and tabs and len(first) == CONLLU.width:
        return CONLLU
    rows = [row for row in (split(body, tabs) for body in full) if row[0].isdecimal()]
    if len(first) < (2 if blank else 3):
        message = "the first column numbers the words, and there is no other for words and tags; remove the numbers"
        raise bad(path, bodies.index(sure[0]) + 1, message)
    wrong = {k: sum(bool(check(row[k])) for row in rows if len(row) > k) for k in range(2, len(first))}
    if not wrong:
        return Layout(tabs, len(first), 1, None, True)
    tag = min(wrong, key=lambda column: wrong[column])
    others = [column for column, count in wrong.items() if column != tag and not count]
    return Layout(tabs, len(first), 1, tag, True, remark=_remark(path, tag, others))


def _remark(path: Path, tag: int, others: Sequence[int]) -> str:
    """What the user should know of a file in which other columns, counted from 0, also hold tags."""
    columns = ", ".join(str(column + 1) for column in others)
    return f"{path.name} has tags in column {tag + 1}, which are read, and in column {columns}" if others else ""


def _is_numbered(bodies: list[str], tabs: bool) -> bool:
    """Whether the first column counts: nearly every line's number is one more than that of the line before it."""
    rows = [[] if body.startswith("#") or _starts_document(body) else split(body, tabs) for body in bodies]
    first = [row[0] if any(row) and not NO_WORD.fullmatch(row[0]) else "" for row in rows]
    following = [_counts(b) and int(b) == int(a) + 1 for a, b in pairwise(first) if _counts(a) and b]
    words = [number for row, number in zip(rows, first, strict=True) if any(row)]
    if not following:  # every sentence is one word, or the words are no numbers
        return bool(words) and set(words) <= {"0", "1"} and all(len(row) > 2 for row in rows if any(row))
    return sum(following) > 0.9 * len(following) and sum(map(_counts, words)) > 0.5 * len(words)


def _counts(column: str) -> bool:
    """Whether this may be the number of a word."""
    return column.isdecimal() and len(column) < 10


def _check_words(sentences: list[Sentence]) -> None:
    """Refuses files whose words cannot be meant: the text was left out, or the column holds something else."""
    left_out = "the text was left out: merge it into the file first, as the README of the treebank or corpus says"
    for sentence in sentences:
        if len(sentence.words) >= PLACEHOLDERS and set(sentence.words) == {"_"}:
            raise UserError(f"{sentence.location(0)}: every word of the sentence is '_': {left_out}")
    counts = Counter(normalise(word) for sentence in sentences for word in sentence.words)
    ((commonest, count),) = counts.most_common(1)
    if counts.total() >= FEWEST_WORDS and count > COMMONEST * counts.total():
        hint = left_out if commonest == "_" else "the first column must hold the words, or number them"
        raise UserError(f"{sentences[0].path}: {count} of {counts.total()} words are {commonest!r}: {hint}")


def in_memory(tagged: Sequence[tuple[Sequence[str], Sequence[str]]], path: Path, line: int = 1) -> list[Sentence]:
    """Sentences of (words, tags) pairs, as if they stood in a file `path` from this line on."""
    sentences = []
    for words, tags in tagged:
        raw = (*(f"{word}\t{tag}" for word, tag in zip(words, tags, strict=True)), "")
        sentences.append(Sentence(tuple(words), tuple(tags), raw, tuple(range(len(words))), path, line))
        line += len(raw)
    return sentences


def write(sentences: Sequence[Sentence], tags: Tags, path: Path) -> None:
    """Writes the file that the sentences came from, with other tags."""
    lines = (line for sentence, new in zip(sentences, tags, strict=True) for line in sentence.retagged(new))
    write_text(path, "\n".join(lines))
