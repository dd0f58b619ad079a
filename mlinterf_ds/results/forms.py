"""Writes tables as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from mlinterf_ds.results.tables import Cell, Table

LATEX = str.maketrans(
    {char: f"\\{char}" for char in "&%_#{}$"}
    | {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": "$<$", ">": "$>$"}
    | {"±": r"$\pm$", "†": r"$^\dagger$", "✓": r"$\checkmark$"}
)


def markdown(table: Table) -> str:
    lines = [
        f"## Table {table.number}. {table.title}",
        "",
        f"| | {' | '.join(table.head)} |",
        "|---" * (len(table.head) + 1) + "|",
    ]
    for block, rows in table.blocks:
        if block:
            lines.append(f"| *{block}* |{' |' * len(table.head)}")
        for name, cells in rows:
            shown = [cell.shown(lambda text: f"**{text}**") for cell in cells]
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes)]) + "\n"


def comma_separated(table: Table) -> str:
    """CSV with a row for each cell of the table."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["block", "row", "column", "mean", "std", "seeds", "paper", "best", "mark"])
    for block, name, column, cell in _cells(table):
        mean, std = ("" if x is None else f"{x:.4f}" for x in (cell.mean, cell.std))
        row = [block, name, column, cell.text or mean, std, len(cell.values), cell.paper, int(cell.best), cell.mark]
        writer.writerow(row)
    return out.getvalue()


def _cells(table: Table) -> Iterable[tuple[str, str, str, Cell]]:
    for block, rows in table.blocks:
        for name, cells in rows:
            yield from ((block, name, column, cell) for column, cell in zip(table.head, cells, strict=True))


def latex(table: Table) -> str:
    """A `table` environment (packages booktabs and amssymb)."""

    def escaped(text: str) -> str:
        return text.translate(LATEX)

    lines = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(table.title)}}}", rf"\label{{tab:{table.name}}}"]
    lines += [
        rf"\begin{{tabular}}{{l{'r' * len(table.head)}}}",
        r"\toprule",
        " & ".join(["", *map(escaped, table.head)]) + r" \\",
    ]
    for block, rows in table.blocks:
        lines.append(r"\midrule")
        if block:
            lines.append(rf"\multicolumn{{{len(table.head) + 1}}}{{l}}{{\emph{{{escaped(block)}}}}} \\")
        for name, cells in rows:
            shown = [cell.shown(lambda text: rf"\textbf{{{text}}}", escaped) for cell in cells]
            lines.append(" & ".join([escaped(name), *shown]) + r" \\")
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\footnotesize {escaped(note)}" for note in table.notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"
