"""What the four tasks have in common: the row a model reads, the limits on its length, and the interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from mlinterf_ds.data.tokenizer import Tokenizer

Kind = Literal["labels", "span"]


@dataclass(frozen=True)
class Limits:
    """How long rows may be, in pieces; `<s>` and `</s>` included."""

    max_length: int
    stride: int  # pieces by which a question's window moves on; pieces of context that a cut sentence keeps on its left
    max_question: int
    max_answer: int


@dataclass(frozen=True)
class Row:
    """One input of the encoder and what is to be predicted from it.

    Labels: `targets[k]` is the class at column `positions[k]`. Span: `targets` is (start, end), two indices into
    `positions`, whose first entry is column 0 (`<s>`: "no answer in this window").
    """

    example: int  # which example of the set it belongs to
    tokens: list[int]
    positions: list[int]
    targets: list[int]  # -1: not known, not trained on
    detail: Any = field(default=None, compare=False)  # the task's own: what the positions stand for


class Task(Protocol):
    """One downstream task. Examples and predictions are the task's own types."""

    name: str
    metric: str  # of `score`'s result: selects models and fills the tables
    kind: Kind

    def read(self, path: Path, language: str) -> list[Any]:
        """The examples of a file. UserError names the file and line of what is wrong."""
        ...

    def synthetic(self, language: str, count: int, seed: int, split: str) -> list[Any]:
        """Gold examples of a synthetic language."""
        ...

    def group(self, example: Any) -> str:
        """Examples of one group stay together when a set is split."""
        ...

    def labelled(self, example: Any) -> bool:
        """Whether the file gives this example's answer (some published test sets withhold them)."""
        ...

    def labels(self, train: Sequence[Any]) -> list[str]:
        """The classes, by number, that a training set defines."""
        ...

    def rows(
        self, examples: Sequence[Any], tokenizer: Tokenizer, labels: Sequence[str], limits: Limits
    ) -> tuple[list[Row], list[str]]:
        """The rows of these examples, and notes in plain words on what did not fit. UserError for an unknown label."""
        ...

    def predict(
        self,
        examples: Sequence[Any],
        rows: Sequence[Row],
        outputs: Sequence[Any],
        labels: Sequence[str],
        limits: Limits,
    ) -> list[Any]:
        """One prediction for each example from one output for each row.

        Outputs of kind "labels": (positions,) classes. "span": (2, positions) start and end scores.
        """
        ...

    def score(self, examples: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """Metrics in percent over the labelled examples; empty if there are none."""
        ...

    def counts(self, examples: Sequence[Any], predictions: Sequence[Any]) -> list[tuple[float, float, float]]:
        """(right, predicted, gold) of each labelled example: 200 right / (predicted + gold) of their sums is the metric."""
        ...

    def baselines(self, train: Sequence[Any], test: Sequence[Any]) -> dict[str, dict[str, float]]:
        """Metrics on `test` of predictions that look at no input ("majority") or hardly any ("lexical"), from `train`."""
        ...

    def write(self, examples: Sequence[Any], predictions: Sequence[Any], path: Path) -> None:
        """Predictions in the task's own file format."""
        ...

    def suffix(self, examples: Sequence[Any]) -> str:
        """Ending of the name of a file that `write` makes."""
        ...

    def report(self, examples: Sequence[Any], predictions: Sequence[Any]) -> str:
        """Where the errors are, as Markdown."""
        ...
