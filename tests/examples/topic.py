"""Sentence classification: TSV files of `text<TAB>label` lines without a header. The training set defines the labels.

A row is `<s> text </s>`, and the label is predicted at `<s>`. A text too long for a row loses its last pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.files import write_text
from mlinterf_ds.tasks import metrics
from mlinterf_ds.tasks.base import Kind, Limits, Row, Task
from mlinterf_ds.tasks.files import bad, read_text


@dataclass(frozen=True)
class LabelledText:
    """A text, its label, and the file and the line that they came from."""

    text: str
    label: str
    path: Path
    line: int


class Topic(Task):
    """Predictions are labels; the metric is accuracy."""

    name, metric = "topic", "accuracy"
    kind: Kind = "labels"

    def read(self, path: Path, language: str) -> list[LabelledText]:
        examples = []
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                text, _, label = line.rstrip("\r").partition("\t")
                if not text or "\t" in label or not (label or self.unlabelled):
                    raise bad(path, number, "expected 2 columns separated by a tab: text, label")
                examples.append(LabelledText(text, self.rename(label), path, number))
        return examples

    def group(self, example: LabelledText) -> str:
        return example.text

    def labels(self, train: Sequence[LabelledText]) -> list[str]:
        return sorted({example.label for example in train})

    def rows(
        self, examples: Sequence[LabelledText], tokenizer: Tokenizer, labels: Sequence[str], limits: Limits
    ) -> tuple[list[Row], list[str]]:
        rows: list[Row] = []
        special, room, cut = tokenizer.vocabulary, limits.max_length - 2, 0
        for index, example in enumerate(examples):
            if example.label not in labels and not self.unlabelled:
                message = f"label {example.label!r} does not occur in the training set, which has {', '.join(labels)}"
                raise bad(example.path, example.line, message)
            pieces = tokenizer.encode(example.text)
            cut += len(pieces) > room
            target = labels.index(example.label) if example.label in labels else -1
            rows.append(Row(index, [special.bos, *pieces[:room], special.eos], [0], [target]))
        return rows, [f"{cut} texts are longer than {limits.max_length} pieces and were cut"] if cut else []

    def predict(
        self,
        examples: Sequence[LabelledText],
        rows: Sequence[Row],
        outputs: Sequence[Any],
        labels: Sequence[str],
        limits: Limits,
    ) -> list[str]:
        return [labels[int(classes[0])] for classes in outputs]

    def score(self, examples: Sequence[LabelledText], predictions: Sequence[str]) -> dict[str, float]:
        right = [right for right, _, _ in self.counts(examples, predictions)]
        return {"accuracy": 100 * sum(right) / len(right)}

    def counts(self, examples: Sequence[LabelledText], predictions: Sequence[str]) -> list[metrics.Counts]:
        return [(float(e.label == label), 1.0, 1.0) for e, label in zip(examples, predictions, strict=True)]

    def baselines(self, train: Sequence[LabelledText], test: Sequence[LabelledText]) -> dict[str, dict[str, float]]:
        """majority: the commonest label of `train`; lexical: each word votes for the labels that it had in `train`."""
        ((commonest, _),) = Counter(example.label for example in train).most_common(1)
        voted = metrics.voted([(e.text, e.label) for e in train], [e.text for e in test])
        return {"majority": self.score(test, [commonest] * len(test)), "lexical": self.score(test, voted)}

    def write(self, examples: Sequence[LabelledText], predictions: Sequence[str], path: Path) -> None:
        write_text(path, "".join(f"{e.text}\t{label}\n" for e, label in zip(examples, predictions, strict=True)))

    def suffix(self, examples: Sequence[LabelledText]) -> str:
        return ".tsv"

    def report(self, examples: Sequence[LabelledText], predictions: Sequence[str]) -> str:
        return metrics.confusion([[example.label for example in examples]], [predictions], str)
