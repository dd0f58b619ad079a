"""Files of tagged words: one word and its tag a line, a blank line after each sentence. They come back byte for byte."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_text
from mlinterf_ds.tasks.files import bad, read_text

Tags = Sequence[Sequence[str]]
Words = list[tuple[int, str, str]]  # (line within the block, word, tag) of each word of a sentence
NUMBER = re.compile(r"[\d.,]*\d[\d.,]*")


@dataclass(frozen=True)
class Sentence:
    """A tagged sentence and the lines of the file that it came from."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    raw: tuple[str, ...]  # every line up to the next sentence, comments and blank lines included
    lines: tuple[int, ...]  # index into `raw` of each word's line
    path: Path
    first_line: int  # number of raw[0], from 1
    column: int = -1  # the tag's column; -1: the last

    def location(self, word: int) -> str:
        """File and line of a word."""
        return f"{self.path}, line {self.first_line + self.lines[word]}"

    def retagged(self, tags: Sequence[str]) -> list[str]:
        """The lines of the file with other tags."""
        lines = list(self.raw)
        for index, old, tag in zip(self.lines, self.tags, tags, strict=True):
            body = lines[index].rstrip("\r")
            ending = lines[index][len(body) :]
            if self.column >= 0:
                columns = body.split("\t")
                columns[self.column] = tag
                body = "\t".join(columns)
            else:  # any separator may stand before the last column
                kept = len(body.rstrip())
                body = body[: kept - len(old)] + tag + body[kept:]
            lines[index] = body + ending
        return lines


def read_blocks(path: Path, parse: Callable[[list[str], int], Words], column: int) -> list[Sentence]:
    """The sentences of a file whose sentences end with a blank line.

    parse: returns the words in a block of lines, given the lines and the number of the first; column: the tag's.
    """
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if "\r" in line.rstrip("\r"):
            raise bad(path, number, "a carriage return inside the line; lines end with a newline, or both")
    sentences: list[Sentence] = []
    pending: list[str] = []  # blocks of comments alone, which belong to the sentence that follows
    for first, end, after in _blocks(lines):
        parsed = parse(lines[first:end], first + 1)
        block, start = pending + lines[first:after], first - len(pending)
        if not parsed:
            pending = block
            continue
        indices, words, tags = zip(*parsed, strict=True)
        indices = tuple(index + len(pending) for index in indices)
        sentences.append(Sentence(words, tags, tuple(block), indices, path, start + 1, column))
        pending = []
    if not sentences:
        raise UserError(f"{path}: the file holds no words; expected one word and its tag a line")
    if pending:  # comments after the last sentence
        sentences[-1] = replace(sentences[-1], raw=(*sentences[-1].raw, *pending))
    return sentences


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


def read_columns(path: Path, check: Callable[[str], str], width: int = 0) -> list[Sentence]:
    """Reads files with the word in the first column and the tag in the last.

    Tabs separate columns, or spaces if the first line has no tab. All lines have `width` columns (0: as many as the first
    line). Exception: in a file of two columns separated by spaces, a number may contain spaces, as in treebanks
    ("10 000 NUM"). check: returns what is wrong with a tag, or ''.
    """
    tabs: bool | None = None

    def columns_of(line: str) -> list[str]:
        nonlocal width, tabs
        tabs = "\t" in line if tabs is None else tabs
        columns = line.split("\t") if tabs else [column for column in line.split(" ") if column]
        width = width or max(2, len(columns))
        if not tabs and width == 2 and len(columns) > 2 and all(NUMBER.fullmatch(part) for part in columns[:-1]):
            return [" ".join(columns[:-1]), columns[-1]]
        return columns

    def parse(lines: list[str], number: int) -> Words:
        words: Words = []
        for index, line in enumerate(lines):
            body = line.rstrip("\r")
            if body.split(maxsplit=1)[0] == "-DOCSTART-":  # CoNLL's mark of a new document
                continue
            columns = columns_of(body)
            if len(columns) != width or not columns[0]:
                raise bad(path, number + index, _wrong_columns(columns, width, bool(tabs)))
            tag = columns[-1].strip()
            if why := check(tag):
                raise bad(path, number + index, why)
            words.append((index, columns[0], tag))
        return words

    return read_blocks(path, parse, -1)


def _wrong_columns(columns: list[str], width: int, tabs: bool) -> str:
    if not columns[0]:
        return "the word is missing before its tag"
    hint = "; CoNLL-U is read from files that end in .conllu" if len(columns) == 10 else ""
    separator = "a tab" if tabs else "spaces"
    return f"{len(columns)} columns, expected {width} (a word, ..., its tag) separated by {separator}{hint}"


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
