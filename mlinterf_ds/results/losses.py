"""train.csv of a run: the training loss of every step, for figures that are drawn later.

    step,language,loss,lr,tokens

`loss` is the mean loss of the step's predictions in that language, in nats (a line for each of its languages); `tokens` is
what training had seen of all languages after the step.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from mlinterf_ds.errors import refusing
from mlinterf_ds.files import read_csv, replacing

FIELDS = ["step", "language", "loss", "lr", "tokens"]

Points = list[tuple[int, float]]


class LossTable:
    """Writes train.csv: one rank's only. Lines reach the disk at `flush`, which a run calls before it saves."""

    def __init__(self, path: Path, step: int):
        """Go on at `step`: lines of later steps, which a resumed run repeats, and half a line of a killed one go."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as target:
            text = io.TextIOWrapper(target, encoding="utf-8", newline="", write_through=True)
            table = csv.writer(text, lineterminator="\n")
            table.writerow(FIELDS)
            if path.is_file() and step:
                with path.open(newline="", encoding="utf-8", errors="replace") as file:
                    table.writerows(row for row in csv.reader(file) if _sound(row) and int(row[0]) <= step)
            text.detach()
        self._file = path.open("a", newline="", encoding="utf-8")
        self._table = csv.writer(self._file, lineterminator="\n")

    def add(self, step: int, losses: dict[str, float], lr: float, tokens: int) -> None:
        """A step's losses by language."""
        self._table.writerows([step, language, f"{loss:.6g}", f"{lr:.6g}", tokens] for language, loss in losses.items())

    def flush(self) -> None:
        """What was added is in the file, also after a kill."""
        self._file.flush()

    def close(self) -> None:
        """The end."""
        self._file.close()


def _sound(row: list[str]) -> bool:
    return len(row) == len(FIELDS) and row[0].isdecimal() and row[4].isdecimal()


def read_losses(path: Path) -> dict[str, Points]:
    """language -> (step, loss) in the order of the steps. UserError if the file is missing or no such table."""
    found: dict[str, Points] = {}
    for row in read_csv(path, FIELDS, "pretraining writes it into the run's output folder"):
        with refusing(f"{path}: not a table of {','.join(FIELDS)}"):
            found.setdefault(row["language"], []).append((int(row["step"]), float(row["loss"])))
    return {language: sorted(points) for language, points in found.items()}
