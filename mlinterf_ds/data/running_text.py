"""Tells running text from what only looks like it: programs' own formats, markup, subtitles, tables with columns, tagged words."""

import csv
import io
import re
from collections import Counter

from mlinterf_ds.data.tokenizer import other_format
from mlinterf_ds.errors import UserError, warn

START = 1 << 16  # bytes of a file that are looked at
FEWEST_ROWS = 20  # so many lines tell a table from running text
FEWEST_UNDER_HEADER = 3  # so many do under a header
TABLE = 0.6  # the share of the rows with which a file is a table
DAMAGED = 0.05  # the share of the lines from which damaged characters are worth a warning
MARKUP = re.compile(rb"(?i)<!doctype|<(?:html|tmx|tei|xliff)\b|\{\s*\"|\[\s*(?:\{|\"(?:[^\"\\]|\\.)*\"\s*[],])")
OTHER_MARKUP = {
    "subtitles with their times": re.compile(rb"WEBVTT\b|\d+\s*\d\d:\d\d:\d\d[,.]\d{3} --> "),
    "LaTeX": re.compile(rb"\\(?:documentclass|usepackage|begin)\b"),
    "a catalogue of translations (PO)": re.compile(rb"(?:#[^\n]*\n)*msgid \""),
}
TAGGED = re.compile(rb"</?[A-Za-z][^<>]*>(?:.*>)?")  # and not the name of a speaker, <ann>, before what is said
TAGGED_WORD = re.compile(rb"\S+(?: \S+){0,2} (?:O|[BIESLU]-[A-Za-z]+|[A-Z]{1,5})")  # a word, ..., its tag
COLUMNS = {b"\t": ("tabs", "\t"), b" ||| ": ("' ||| '", " ||| ")}
DELIMITERS = {",": "commas", ";": "semicolons", "|": "vertical bars"}
HEADER = re.compile(r"\w[\w.#-]*(?: \w+){0,2}")  # a column's name
# The replacement character, and what UTF-8 becomes where it is taken for Windows-1252 or Latin-1 and encoded again.
LOST, TWICE = re.compile("\ufffd"), re.compile("â€|[ÂÃ][\x80-\xbf]")
NOT_TEXT = "and not running text; take the text out first, one sentence a line"


def check_running_text(name: str, start: bytes) -> None:
    """Refuses a file of another kind, by its first bytes, without byte-order mark; warns of damaged text. Raises UserError."""
    if kind := other_format(start):
        raise UserError(f"{name}: {kind} and not plain text (or .gz, .bz2, .xz of it); take the text out first")
    if markup := MARKUP.match(start):
        raise UserError(f"{name}: begins with {markup[0].decode()!r}, so it is markup (HTML, XML or JSON) {NOT_TEXT}")
    for kind, pattern in OTHER_MARKUP.items():
        if pattern.match(start):
            raise UserError(f"{name}, line 1: {kind} {NOT_TEXT}")
    text = start[:START].decode(errors="ignore")
    _check_delimited(name, text)
    lines = [line.strip() for line in re.split(rb"[\r\n]+", start)[:-1] if line.strip()]
    if len(lines) < FEWEST_ROWS:
        return
    _check_columns(name, lines)
    for pattern, part, what in (
        (TAGGED, 0.5, "begin and end with a tag, so it is markup (HTML or XML)"),
        (TAGGED_WORD, 0.9, "are a word and its tag, so it is a task's file"),
    ):
        count = sum(bool(pattern.fullmatch(line)) for line in lines)
        if count > part * len(lines):
            raise UserError(f"{name}: {count} of its first {len(lines)} lines {what} {NOT_TEXT}")
    _warn_of_damage(name, text.splitlines())


def _check_columns(name: str, lines: list[bytes]) -> None:
    """Refuses tables whose columns are separated by tabs or by what translators' tools put between two languages."""
    for separator, (words, cut_at) in COLUMNS.items():
        between, rows = Counter(line.count(separator) for line in lines).most_common(1)[0]
        if between and rows > len(lines) / 2:
            column = min(between + 1, 2)
            command = (
                f"cut -f{column}" if cut_at == "\t" else f"awk -F '{re.escape(cut_at.strip())}' '{{print ${column}}}'"
            )
            raise UserError(
                f"{name}: {rows} of its first {len(lines)} lines have {between + 1} columns separated by {words}, so it is a "
                f"table and not running text; take the column of the sentences, for example with {command}"
            )


def _check_delimited(name: str, text: str) -> None:
    """Refuses tables whose columns are separated by commas, semicolons or bars (CSV).

    In prose a space follows a comma, and the number of commas differs from line to line.
    """
    for delimiter, separator in DELIMITERS.items():
        # the last row may be cut off
        table = list(csv.reader(io.StringIO(text.replace("\0", ""), newline=""), delimiter=delimiter))[:-1]
        rows = [_without_empty_end(row) for row in table if any(row)]
        widths = Counter(len(row) if not any(cell[:1].isspace() for cell in row[1:]) else 1 for row in rows)
        width, fitting = widths.most_common(1)[0] if widths else (1, 0)
        if width < 2 or fitting <= TABLE * len(rows):
            continue
        named = len(rows[0]) == width and all(map(HEADER.fullmatch, rows[0])) and fitting == len(rows)
        if fitting < (FEWEST_UNDER_HEADER if named else FEWEST_ROWS):
            continue
        lengths = [sum(len(row[k]) for row in rows[named:] if len(row) == width) for k in range(width)]
        column = lengths.index(max(lengths))
        option = "" if delimiter == "," else f", delimiter={delimiter!r}"
        raise UserError(
            f"{name}, line {1 + named}: {fitting} of the first {len(rows)} rows have {width} columns separated by {separator}, so it "
            f"is a table (CSV) and not running text; take column {column + 1} out first, for example with python -c "
            f"\"import csv, sys; [print(' '.join(row[{column}].split())) for row in csv.reader(sys.stdin{option})]\" < TABLE > TEXT"
        )


def _without_empty_end(row: list[str]) -> list[str]:
    """The cells up to the last one that is not empty: a line of prose may end in the mark that could separate cells."""
    return row[: max(number for number, cell in enumerate(row, 1) if cell)]


def _warn_of_damage(name: str, lines: list[str]) -> None:
    for pattern, what in (
        (LOST, "U+FFFD in place of characters that an earlier conversion lost: convert the original again"),
        (TWICE, "characters that were encoded twice: try `iconv -f utf-8 -t windows-1252`, or the tool ftfy"),
    ):
        damaged = [number for number, line in enumerate(lines, 1) if pattern.search(line)]
        if len(damaged) > DAMAGED * len(lines):
            warn(f"{name}: {len(damaged)} of its first {len(lines)} lines, the first line {damaged[0]}, have {what}")
