"""Word tagging (entities, parts of speech): files of words in columns, rows of the encoder, predictions.

A word's tag is predicted from its first piece (paper, section 3.2). A word that tokenises to nothing (control characters
alone) stands as `<unk>`, so that every word has a prediction. A sentence too long for the encoder is cut into windows at
word boundaries: each word is predicted in one window, whose first words repeat up to `stride` pieces of what went before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlinterf_ds.data.tokenizer import BOS, EOS, UNK, Tokenizer
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_text
from mlinterf_ds.tasks.base import Limits, Row
from mlinterf_ds.tasks.files import bad, read_text

Predictions = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Sentence:
    """A tagged sentence and the very lines of the file it came from."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    raw: tuple[str, ...]  # every line from here to the next sentence: comments, blank lines and all
    at: tuple[int, ...]  # which of them are the words'
    path: Path
    first_line: int  # number of raw[0], from 1
    column: int = -1  # of the tag

    def place(self, word: int) -> str:
        """File and line of a word."""
        return f"{self.path}, line {self.first_line + self.at[word]}"

    def retagged(self, tags: Sequence[str]) -> list[str]:
        """The lines of the file with other tags."""
        lines = list(self.raw)
        for index, old, tag in zip(self.at, self.tags, tags, strict=True):
            body = lines[index].rstrip("\r")
            end = lines[index][len(body) :]
            if self.column >= 0:
                columns = body.split("\t")
                columns[self.column] = tag
                body = "\t".join(columns)
            else:  # the last column, whatever separates it from the others
                kept = len(body.rstrip())
                body = body[: kept - len(old)] + tag + body[kept:]
            lines[index] = body + end
        return lines


# --- files -----------------------------------------------------------------------------------------------------------
Found = list[tuple[int, str, str]]  # (line within the block, word, tag)
NUMBER = re.compile(r"[\d.,]*\d[\d.,]*")


def read_blocks(path: Path, parse: Callable[[list[str], int], Found], column: int) -> list[Sentence]:
    """Sentences of a file whose sentences end with a blank line; `parse(lines, number of the first)` finds the words.

    Sentences keep every line, so that a file is written back byte for byte.
    """
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if "\r" in line.rstrip("\r"):
            raise bad(path, number, "a carriage return inside the line; lines end with a newline, or both")
    sentences: list[Sentence] = []
    pending: list[str] = []
    for first, end, after in _blocks(lines):
        found = parse(lines[first:end], first + 1)
        block, start = pending + lines[first:after], first - len(pending)
        if not found:  # comments alone: they go with the sentence that follows
            pending = block
            continue
        at, words, tags = zip(*found, strict=True)
        at = tuple(index + len(pending) for index in at)
        sentences.append(Sentence(words, tags, tuple(block), at, path, start + 1, column))
        pending = []
    if not sentences:
        raise UserError(f"{path}: no words in it; expected one word and its tag a line")
    if pending:  # comments after the last sentence
        sentences[-1] = replace(sentences[-1], raw=(*sentences[-1].raw, *pending))
    return sentences


def _blocks(lines: list[str]) -> Iterator[tuple[int, int, int]]:
    """(first line, line after the last, line after the blank ones that follow) of every run of non-blank lines."""
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
    """Words in the first column, tags in the last; columns are separated by tabs, or by spaces where the first line has none.

    All lines have `width` columns (0: as many as the first). One exception: with two columns and spaces, a number may have
    spaces in it, as in treebanks ("10 000 NUM"). `check(tag)` says what is wrong with a tag, or ''.
    """
    tabs: bool | None = None

    def parse(lines: list[str], number: int) -> Found:
        nonlocal width, tabs
        found: Found = []
        for index, line in enumerate(lines):
            body = line.rstrip("\r")
            if body.split(maxsplit=1)[0] == "-DOCSTART-":  # CoNLL marks documents so
                continue
            tabs = "\t" in body if tabs is None else tabs
            columns = body.split("\t") if tabs else [column for column in body.split(" ") if column]
            width = width or max(2, len(columns))
            if not tabs and width == 2 and len(columns) > 2 and all(NUMBER.fullmatch(part) for part in columns[:-1]):
                columns = [" ".join(columns[:-1]), columns[-1]]
            if len(columns) != width or not columns[0]:
                message = f"{len(columns)} columns, expected {width} (a word, ..., its tag) separated by {'a tab' if tabs else 'spaces'}"
                if len(columns) == 10:
                    message += "; CoNLL-U is read from files that end in .conllu"
                raise bad(path, number + index, message if columns[0] else "the word is missing before its tag")
            tag = columns[-1].strip()
            if why := check(tag):
                raise bad(path, number + index, why)
            found.append((index, columns[0], tag))
        return found

    return read_blocks(path, parse, -1)


def written(sentences: Sequence[Sentence], tags: Predictions) -> str:
    """A file of these sentences with these tags."""
    return "\n".join(line for sentence, new in zip(sentences, tags, strict=True) for line in sentence.retagged(new))


def made(words: Sequence[str], tags: Sequence[str], path: Path, first_line: int) -> Sentence:
    """A sentence that comes from no file, as lines of one."""
    raw = (*(f"{word}\t{tag}" for word, tag in zip(words, tags, strict=True)), "")
    return Sentence(tuple(words), tuple(tags), raw, tuple(range(len(words))), path, first_line)


def write(sentences: Sequence[Sentence], tags: Predictions, path: Path) -> None:
    write_text(path, written(sentences, tags))


# --- rows and predictions ------------------------------------------------------------------------------------------
def rows(
    sentences: Sequence[Sentence], gold: Predictions, tokenizer: Tokenizer, labels: Sequence[str], limits: Limits
) -> tuple[list[Row], list[str]]:
    """Rows of the sentences, `gold` being their tags in terms of `labels`. `Row.detail` numbers the words predicted."""
    number = {label: index for index, label in enumerate(labels)}
    room = limits.max_length - 2
    nothing: list[str] = []
    found: list[Row] = []
    windowed = cut = 0
    known: dict[str, list[int]] = {}
    for index, (sentence, tags) in enumerate(zip(sentences, gold, strict=True)):
        pieces = []
        for word_index, word in enumerate(sentence.words):
            if word not in known:
                known[word] = tokenizer.encode(word)
            if not known[word]:
                nothing.append(f"{sentence.place(word_index)}: {word!r}")
            pieces.append((known[word] or [UNK])[:room])
            cut += len(known[word]) > room
        targets = [_number(number, tag, sentence, k) for k, tag in enumerate(tags)]
        spans = list(windows([len(piece) for piece in pieces], room, limits.stride))
        windowed += len(spans) > 1
        found += [_row(index, pieces, targets, span) for span in spans]
    notes = []
    if nothing:
        notes.append(f"{len(nothing)} words tokenise to nothing and stand as <unk>; the first is {nothing[0]}")
    if windowed:
        notes.append(f"{windowed} sentences are longer than {limits.max_length} pieces and were cut into windows")
    if cut:
        notes.append(f"{cut} words are longer than {room} pieces: only their first pieces are read")
    return found, notes


def _number(number: dict[str, int], tag: str, sentence: Sentence, word: int) -> int:
    if tag not in number:
        known = ", ".join(number)
        raise UserError(f"{sentence.place(word)}: tag {tag!r} does not occur in the training set, which has {known}")
    return number[tag]


def windows(sizes: Sequence[int], room: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first word read, first word predicted, word after the last): every word is predicted once, none is too long."""
    first = 0
    while first < len(sizes):
        begin, context = first, 0
        while begin > 0 and context + sizes[begin - 1] <= min(stride, room - sizes[first]):
            begin -= 1
            context += sizes[begin]
        used, end = context, first
        while end < len(sizes) and used + sizes[end] <= room:
            used += sizes[end]
            end += 1
        yield begin, first, end
        first = end


def _row(example: int, pieces: list[list[int]], targets: list[int], span: tuple[int, int, int]) -> Row:
    begin, first, end = span
    tokens, positions = [BOS], []
    for word in range(begin, end):
        if word >= first:
            positions.append(len(tokens))
        tokens += pieces[word]
    return Row(example, [*tokens, EOS], positions, targets[first:end], (first, end))


def predict(
    sentences: Sequence[Sentence], found: Sequence[Row], outputs: Sequence[Sequence[int]], labels: Sequence[str]
) -> list[list[str]]:
    """The label of every word of every sentence."""
    tags = [[""] * len(sentence.words) for sentence in sentences]
    for row, classes in zip(found, outputs, strict=True):
        first, end = row.detail
        tags[row.example][first:end] = [labels[int(c)] for c in classes[: end - first]]
    return tags


def lexical(train: Sequence[Sentence], gold: Predictions, test: Sequence[Sentence], default: str) -> list[list[str]]:
    """Each word with the tag it had most often in training, unseen ones with `default`."""
    counts: dict[str, Counter[str]] = {}
    for sentence, tags in zip(train, gold, strict=True):
        for word, tag in zip(sentence.words, tags, strict=True):
            counts.setdefault(word, Counter())[tag] += 1
    best = {word: max(sorted(seen), key=seen.__getitem__) for word, seen in counts.items()}
    return [[best.get(word, default) for word in sentence.words] for sentence in test]


def constant(sentences: Sequence[Sentence], tag: str) -> list[list[str]]:
    """Every word with one tag."""
    return [[tag] * len(sentence.words) for sentence in sentences]


WIKIANN = re.compile(r"((?:[a-z]{2,3}(?:-[a-z]+)*|simple):).")  # a wiki's code, and a word


def strip_language_prefix(sentences: list[Sentence]) -> list[Sentence]:
    """WikiAnn as first published writes `en:word`, `zh-yue:word`: read the word, where every word of the file is written so.

    UserError if most are and some are not: such a file is damaged, and means neither.
    """
    matches = (WIKIANN.match(word) for sentence in sentences for word in sentence.words)
    counts = Counter(match.group(1) for match in matches if match)
    prefix, count = counts.most_common(1)[0] if counts else ("", 0)
    if count <= sum(len(sentence.words) for sentence in sentences) / 2:
        return sentences
    for sentence in sentences:
        for index, word in enumerate(sentence.words):
            if word == prefix:
                raise UserError(f"{sentence.place(index)}: no word after the prefix {prefix!r}")
            if not word.startswith(prefix):
                raise UserError(
                    f"{sentence.place(index)}: {word!r} lacks the prefix {prefix!r} that most words here have"
                )
    return [replace(s, words=tuple(word.removeprefix(prefix) for word in s.words)) for s in sentences]
