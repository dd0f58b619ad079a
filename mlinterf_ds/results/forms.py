"""A table of numbers over seeds beside the paper's, and how it is written as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

LATEX = str.maketrans(
    {char: f"\\{char}" for char in "&%_#{}$"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": "$<$", ">": "$>$"}
    | {"±": r"$\pm$", "†": r"$^\dagger$", "↓": r"$\downarrow$", "✓": r"$\checkmark$"}
)


@dataclass(frozen=True)
class Cell:
    """A number of ours over seeds, and the paper's."""

    values: tuple[float, ...] = ()
    paper: float | None = None
    best: bool = False
    mark: str = ""  # † where it differs significantly
    text: str = ""  # shown instead of numbers

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def ours(self) -> str:
        """Our mean with its spread and mark as text, for example `86.1 ± 0.4†`."""
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        return self.text or ("" if self.mean is None else f"{self.mean:.1f}{spread}{self.mark}")

    def shown(self, bold: Callable[[str], str], escaped: Callable[[str], str] = str) -> str:
        """The whole cell as text, for example `86.1 ± 0.4† [88.9]`, our number in bold if it is the best."""
        ours = escaped(self.ours)
        ours = bold(ours) if self.best and ours else ours
        return f"{ours} [{self.paper:.1f}]".strip() if self.paper is not None else ours


Rows = list[tuple[str, list[Cell]]]


@dataclass
class Table:
    """Blocks of named rows under one head."""

    number: int
    title: str
    head: list[str]
    blocks: list[tuple[str, Rows]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"table{self.number}"

    @property
    def empty(self) -> bool:
        return not any(cell.values or cell.text for _, rows in self.blocks for _, cells in rows for cell in cells)


def markdown(table: Table) -> str:
    lines = [f"## Table {table.number}. {table.title}", "", f"| | {' | '.join(table.head)} |"]
    lines.append("|---" * (len(table.head) + 1) + "|")
    for block, rows in table.blocks:
        if block:
            lines.append(f"| *{block}* |{' |' * len(table.head)}")
        for name, cells in rows:
            lines.append(f"| {name} | {' | '.join(cell.shown('**{}**'.format) for cell in cells)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes)]) + "\n"


def comma_separated(table: Table) -> str:
    """CSV with a row for each cell of the table."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["block", "row", "column", "mean", "std", "seeds", "paper", "best", "mark"])
    for block, rows in table.blocks:
        for name, cells in rows:
            for column, cell in zip(table.head, cells, strict=True):
                mean, std = ("" if value is None else f"{value:.4f}" for value in (cell.mean, cell.std))
                numbers = [cell.text or mean, std, len(cell.values), cell.paper, int(cell.best), cell.mark]
                writer.writerow([block, name, column, *numbers])
    return out.getvalue()


def latex(table: Table) -> str:
    """A `table` environment (packages booktabs and amssymb)."""

    def escaped(text: str) -> str:
        return text.translate(LATEX)

    lines = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(table.title)}}}", rf"\label{{tab:{table.name}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(table.head)}}}", r"\toprule"]
    lines.append(" & ".join(["", *map(escaped, table.head)]) + r" \\")
    for block, rows in table.blocks:
        lines.append(r"\midrule")
        if block:
            lines.append(rf"\multicolumn{{{len(table.head) + 1}}}{{l}}{{\emph{{{escaped(block)}}}}} \\")
        for name, cells in rows:
            shown = [cell.shown(r"\textbf{{{}}}".format, escaped) for cell in cells]
            lines.append(" & ".join([escaped(name), *shown]) + r" \\")
    notes = [rf"\par\footnotesize {escaped(note)}" for note in table.notes]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *notes, r"\end{table}"]) + "\n"
