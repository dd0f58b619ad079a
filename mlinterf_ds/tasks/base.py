"""The interface of a task, and the rows that it makes for the model."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.errors import UserError

Kind = Literal["labels", "span"]


@dataclass(frozen=True)
class Limits:
    """How long rows may be, in pieces. `<s>` and `</s>` count."""

    max_length: int
    stride: int  # pieces by which a question's window moves on; pieces of context that a cut sentence keeps on its left
    max_question: int
    max_answer: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], positions: int) -> Limits:
        """The limits that the keys max_length, stride, max_question and max_answer set (None: by default), in a model that
        reads `positions` pieces at once."""
        length = settings["max_length"] or positions
        stride, question = settings["stride"] or length // 2, settings["max_question"] or length // 4
        return cls(length, stride, question, settings["max_answer"])


@dataclass(frozen=True)
class Row:
    """One input of the encoder and what the model should predict from it.

    Kind "labels": `targets[k]` is the class at column `positions[k]`. Kind "span": `targets` is (start, end), two indices
    into `positions`, whose first entry is column 0 (`<s>`, which stands for "no answer in this window").
    """

    example: int  # index of the example that the row belongs to
    tokens: list[int]
    positions: list[int]
    targets: list[int]  # -1: the file does not give the answer; it is not trained on
    detail: Any = field(default=None, compare=False)  # what the task's `predict` needs to read the outputs
    ends: list[int] | None = None  # of tagged words, which begin at `positions`: the column after each one's last piece


class Task(ABC):
    """A downstream task. Each task chooses the types of its examples and of its predictions.

    `examples`, `rows`, `outputs` and `predictions` are aligned: one prediction for each example, one output for each row.
    """

    name: str
    metric: str  # the key of `score`'s result that selects models and fills the tables
    mapped: set[str]  # the keys of `label_map` that occurred in files
    kind: Kind  # the classifier: a class at each position of a row, or the start and end of a span

    # What `configured` sets; the defaults are those of the configuration's keys.
    label_map: Mapping[str, str] = {}
    unknown_labels: Literal["error", "miss", "ignore"] = "error"
    unfound_answers: Literal["skip", "error"] = "skip"
    unlabelled: bool = False  # the files are new text: answers that they have are not read

    def configured(self, **settings: Any) -> Self:
        """A copy of this task with these settings in place of the defaults."""
        task = copy.copy(self)
        vars(task).update(settings, mapped=set())
        return task

    def rename(self, label: str) -> str:
        """The label that `finetune.labels` puts in this one's place; `mapped` collects those that have one."""
        if label in self.label_map:
            self.mapped.add(label)
        return self.label_map.get(label, label)

    @abstractmethod
    def read(self, path: Path, language: str) -> list[Any]:
        """Reads the examples of a file. UserError names the file and the line of a mistake."""

    def synthetic(self, language: str, count: int, seed: int, split: str) -> list[Any]:
        """Makes labelled examples in a synthetic language. UserError if the task has none."""
        raise UserError(f"task {self.name} has no synthetic examples: give {language}=FILE")

    @abstractmethod
    def group(self, example: Any) -> str:
        """A key of the example: LANG=split puts examples with equal keys into the same set."""

    def labelled(self, example: Any) -> bool:
        """Whether the file gives this example's answer. Some published test sets withhold answers."""
        return True

    def unfit(self, example: Any) -> tuple[str, str] | None:
        """The example's id, and why its answer cannot be used; the example then counts as unlabelled. None where it can."""
        return None

    def settle(self, examples: list[Any], labels: Sequence[str]) -> tuple[list[Any], str]:
        """The examples as `unknown_labels` wants them, and a note on answers that are not among `labels`."""
        return examples, ""

    @abstractmethod
    def labels(self, train: Sequence[Any]) -> list[str]:
        """The names of the classes, in the order of the classifier's outputs."""

    @abstractmethod
    def rows(
        self, examples: Sequence[Any], tokenizer: Tokenizer, labels: Sequence[str], limits: Limits
    ) -> tuple[list[Row], list[str]]:
        """The rows of the examples, and notes for the user on what was cut. UserError for a label not in `labels`."""

    @abstractmethod
    def predict(
        self, examples: Sequence[Any], rows: list[Row], outputs: list[Any], labels: list[str], limits: Limits
    ) -> list[Any]:
        """The predictions that follow from the model's outputs.

        An output of kind "labels" is (positions,) classes, one of kind "span" (2, positions) scores of start and end.
        """

    @abstractmethod
    def score(self, examples: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """Metrics in percent over the labelled examples; empty if there are none."""

    @abstractmethod
    def counts(self, examples: Sequence[Any], predictions: Sequence[Any]) -> list[tuple[float, float, float]]:
        """(right, predicted, gold) of each labelled example: the metric is 200 right / (predicted + gold) of their sums."""

    @abstractmethod
    def baselines(self, train: Sequence[Any], test: Sequence[Any]) -> dict[str, dict[str, float]]:
        """Scores on `test` without a model: "majority" ignores the input, "lexical" (optional) looks words up in `train`."""

    @abstractmethod
    def write(self, examples: Sequence[Any], predictions: Sequence[Any], path: Path) -> None:
        """Writes the predictions in the task's file format."""

    @abstractmethod
    def suffix(self, examples: Sequence[Any]) -> str:
        """The ending of the name of a file that `write` makes, such as `.tsv`."""

    @abstractmethod
    def report(self, examples: Sequence[Any], predictions: Sequence[Any]) -> str:
        """Markdown that shows which errors the predictions make."""
