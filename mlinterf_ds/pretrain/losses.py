"""Writes train.csv of a pretraining run: the training loss of every step, from which figures are drawn later.

    step,language,loss,lr,tokens

`loss` is the mean loss of the step's predictions in that language, in nats; a step has a row for each of its languages.
`tokens` counts the tokens of all languages that training had seen after the step.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from mlinterf_ds.files import replacing

COLUMNS = ["step", "language", "loss", "lr", "tokens"]


class LossTable:
    """Appends to train.csv, on one rank only. Rows reach the disk at `flush`, which a run calls before each checkpoint."""

    def __init__(self, path: Path, step: int):
        """Opens the table at `step`. A resumed run repeats later steps, so their rows go, and so does a row cut short by a kill."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as target:
            text = io.TextIOWrapper(target, encoding="utf-8", newline="", write_through=True)
            table = csv.writer(text, lineterminator="\n")
            table.writerow(COLUMNS)
            if path.is_file() and step:
                with path.open(newline="", encoding="utf-8", errors="replace") as file:
                    table.writerows(row for row in csv.reader(file) if _is_whole(row) and int(row[0]) <= step)
            text.detach()
        self._file = path.open("a", newline="", encoding="utf-8")
        self._table = csv.writer(self._file, lineterminator="\n")

    def add(self, step: int, losses: dict[str, float], lr: float, tokens: int) -> None:
        """Adds the rows of a step from its losses by language."""
        self._table.writerows([step, language, f"{loss:.6g}", f"{lr:.6g}", tokens] for language, loss in losses.items())

    def flush(self) -> None:
        """Writes all added rows to the file, so that they survive a kill."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()


def _is_whole(row: list[str]) -> bool:
    return len(row) == len(COLUMNS) and row[0].isdecimal() and row[4].isdecimal()
