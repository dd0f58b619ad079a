"""Which files are running text: tables, subtitles and markup would be trained on with their commas, times and tags."""

from __future__ import annotations

import csv
import io
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlinterf_ds.data.running_text import START, check_running_text
from mlinterf_ds.errors import UserError

PROSE = [
    'He said, "Yes, 1,000 times yes," and left.',
    '"Well," she said, "no; not now."',
    "Short, but true; a|b.",
    "One line without any",
    '"An open quotation, which never ends',
    "word,word and more,",
    "Paris, Rome, Oslo",
    "12,5 kg; 13,75 kg",
]


def table(delimiter: str, columns: int, *, header: bool, quoting: int = csv.QUOTE_MINIMAL, rows: int = 60) -> bytes:
    """A table as Python's csv writes it: numbers, then texts with commas, quotation marks and line ends."""
    buffer, draw = io.StringIO(), random.Random(0)
    writer = csv.writer(buffer, delimiter=delimiter, quoting=quoting)
    if header:
        writer.writerow(["id", "text", "label", "source"][:columns])
    for number in range(rows):
        text = " ".join(draw.sample(PROSE, 2)) + ("\nand a second line" if number % 7 == 0 else "")
        writer.writerow([number, text, draw.randrange(3), "web"][:columns])
    return buffer.getvalue().encode()


@pytest.mark.parametrize("delimiter, word", [(",", "commas"), (";", "semicolons"), ("|", "vertical bars")])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC], ids=["needed", "texts"])
@pytest.mark.parametrize("columns, header", [(2, True), (2, False), (4, True), (4, False)])
def test_tables_are_refused_with_a_command_that_takes_the_text_out(
    delimiter: str, word: str, quoting: int, columns: int, header: bool
) -> None:
    data = table(delimiter, columns, header=header, quoting=quoting)
    with pytest.raises(
        UserError, match=f"^en.csv, line {1 + header}: .* {columns} columns separated by {word}.*column 2 "
    ):
        check_running_text("en.csv", data[:START])


def test_the_command_takes_the_text_out() -> None:
    with pytest.raises(UserError) as refused:
        check_running_text("en.csv", table(";", 3, header=False))
    _, option, program = shlex.split(str(refused.value).partition("for example with ")[2].partition(" < ")[0])
    done = subprocess.run(
        [sys.executable, option, program], input=table(";", 3, header=False), capture_output=True, check=True
    )
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 60 and lines[0].endswith("and a second line") and '"' not in lines[0][:1]


def test_a_few_long_rows_under_a_header_and_subtitles() -> None:
    few = "title,body\n" + "".join(f'{n},"{"A long, long text. " * 500}"\n' for n in range(6))
    with pytest.raises(UserError, match="line 2: 6 of the first 6 rows have 2 columns"):
        check_running_text("a", few.encode()[:START])
    for start, kind in (
        ("WEBVTT\n\n00:01.000 --> 00:02.000\nHi.", "subtitles"),
        ("1\r\n00:00:01,000 --> 00:00:04,000\r\nHi.\r\n", "subtitles"),
        ("\\documentclass{article}\n", "LaTeX"),
        ('# Translators\n#\nmsgid ""\nmsgstr ""\n', "a catalogue of translations"),
    ):
        with pytest.raises(UserError, match=f"line 1: {kind}"):
            check_running_text("a", start.encode())


def test_files_of_tasks_and_of_translators() -> None:
    for tag in ("O", "B-PER", "NOUN"):
        with pytest.raises(UserError, match="are a word and its tag"):
            check_running_text("a", "\n".join(f"word{n} {tag}" + "\n" * (n % 9 == 0) for n in range(99)).encode())
    pairs = "\n".join(f"A sentence {n} ||| Une phrase" for n in range(99)).encode()
    with pytest.raises(UserError, match=r"2 columns separated by ' \|\|\| '.*awk -F '(.*)' '\{print \$2\}'") as refused:
        check_running_text("a", pairs)
    words = shlex.split(str(refused.value).partition("for example with ")[2])
    done = subprocess.run(words, input=pairs, capture_output=True, check=True)
    assert done.stdout.decode().split("\n")[0].strip() == "Une phrase"
    check_running_text(
        "capitals", "\n".join(f"HE SAID {n} THAT IT WAS SO" for n in range(99)).encode() + b"\nIT WENT AWAY\n" * 30
    )


def test_damaged_characters_are_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    good = [f"„{n}“ é – it’s naïve, Ã, MANHÃ" for n in range(99)]
    check_running_text("good", "\n".join(good).encode())
    assert capsys.readouterr().err == ""
    for encoding in ("windows-1252", "latin-1"):
        twice = [line.encode().decode(encoding, "replace") for line in [*good[:10], "plain"]] + good
        check_running_text("twice", "\n".join(twice).encode())
        said = capsys.readouterr().err
        assert "first 110 lines, the first line 1, have characters that were encoded twice" in said.replace(
            "109", "110"
        )
    check_running_text("lost", "\n".join([*good, *["caf\ufffd"] * 9]).encode())
    assert "9 of its first 108 lines, the first line 100, have U+FFFD" in capsys.readouterr().err


def test_prose_with_commas_is_text() -> None:
    draw = random.Random(1)
    check_running_text("prose", "\n".join(draw.choices(PROSE, k=500)).encode())
    check_running_text("pairs", "\n".join(f"Word{n}, and so on" for n in range(99)).encode())
    check_running_text("verse", "\n".join(f"O {n}" for n in range(99)).encode())
    for mark in "|;,":  # a bar in place of the danda, Greek questions, verse
        check_running_text("ends", "\n".join(f"Word{n} and so on {mark}" for n in range(99)).encode())


def test_text_of_many_languages_is_text(shared_data: Path) -> None:
    for path in sorted((shared_data / "text").glob("*.txt")):
        with path.open("rb") as file:
            check_running_text(path.name, file.read(START))
