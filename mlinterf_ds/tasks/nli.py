"""Natural language inference: XNLI and MNLI as TSV (with or without a header) and JSONL.

A row is `<s> premise </s> hypothesis </s>`. A pair too long for a row loses pieces from the end of the longer sentence, one
by one. Pairs with the label `-` (the annotators did not agree) are neither trained on nor scored.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlinterf_ds.data.tokenizer import BOS, EOS, Tokenizer
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import write_text
from mlinterf_ds.tasks import metrics
from mlinterf_ds.tasks.base import Kind, Limits, Row, Task
from mlinterf_ds.tasks.files import bad, read_text, typed

LABELS = ["entailment", "neutral", "contradiction"]
ALIASES = {"contradictory": "contradiction"}  # the machine-translated MNLI spells it so
NO_LABEL = "-"
FIELDS = ("sentence1", "sentence2", "gold_label")
HEADERS = (FIELDS, ("premise", "hypo", "label"), ("premise", "hypothesis", "label"))  # XNLI, MNLI; XNLI-MT; others


@dataclass(frozen=True)
class Pair:
    """A premise, a hypothesis, one of LABELS or NO_LABEL, and the line of the file that they came from."""

    premise: str
    hypothesis: str
    label: str
    raw: str = ""  # the line; "" if the pair comes from no file
    spelt: str = ""  # the label as the line spells it
    column: int | None = 2  # the label's column in a TSV file; None: the file is JSONL
    header: str = ""  # the header of the TSV file, if it has one

    def relabelled(self, label: str) -> str:
        """The pair's line with another label."""
        if self.raw and label == self.spelt:
            return self.raw
        body = self.raw.rstrip("\r")
        end = self.raw[len(body) :]
        if self.column is None:
            return json.dumps(json.loads(body) | {"gold_label": label}, ensure_ascii=False) + end
        columns = (body or f"{self.premise}\t{self.hypothesis}\t").split("\t")
        columns[self.column] = label
        return "\t".join(columns) + end


class Nli(Task):
    """Predictions are labels; the metric is accuracy."""

    name, metric = "nli", "accuracy"
    kind: Kind = "labels"

    def read(self, path: Path, language: str) -> list[Pair]:
        text, skipped = read_text(path), set[str]()
        parse = _json_pairs if text.lstrip().startswith("{") else _tsv_pairs
        pairs = list(parse(path, text.split("\n"), language, skipped))
        if not pairs:
            languages = ", ".join(sorted(skipped)) or "none"
            raise UserError(
                f"{path}: no pairs in language {language!r}: its 'language' column has {languages}; "
                "name one of these, or leave the column out"
            )
        return pairs

    def synthetic(self, language: str, count: int, seed: int, split: str) -> list[Pair]:
        from mlinterf_ds.data.synthetic import entailments

        return [Pair(e.premise, e.hypothesis, e.label) for e in entailments(language, count, seed, split)]

    def group(self, example: Pair) -> str:
        return example.premise

    def labelled(self, example: Pair) -> bool:
        return example.label != NO_LABEL

    def labels(self, train: Sequence[Pair]) -> list[str]:
        return list(LABELS)

    def rows(
        self, examples: Sequence[Pair], tokenizer: Tokenizer, labels: Sequence[str], limits: Limits
    ) -> tuple[list[Row], list[str]]:
        rows: list[Row] = []
        cut = 0
        for index, pair in enumerate(examples):
            first, second = tokenizer.encode(pair.premise), tokenizer.encode(pair.hypothesis)
            cut += len(first) + len(second) > limits.max_length - 3
            first, second = shortened(first, second, limits.max_length - 3)
            target = labels.index(pair.label) if pair.label in labels else -1
            rows.append(Row(index, [BOS, *first, EOS, *second, EOS], [0], [target]))
        return rows, [f"{cut} pairs are longer than {limits.max_length} pieces and were cut"] if cut else []

    def predict(
        self, examples: Sequence[Pair], rows: list[Row], outputs: list[Any], labels: list[str], limits: Limits
    ) -> list[str]:
        return [labels[int(classes[0])] for classes in outputs]

    def score(self, examples: Sequence[Pair], predictions: Sequence[str]) -> dict[str, float]:
        right = [right for right, _, _ in self.counts(examples, predictions)]
        return {"accuracy": 100 * sum(right) / len(right)} if right else {}

    def counts(self, examples: Sequence[Pair], predictions: Sequence[str]) -> list[metrics.Counts]:
        pairs = zip(examples, predictions, strict=True)
        return [(float(e.label == p), 1.0, 1.0) for e, p in pairs if self.labelled(e)]

    def baselines(self, train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, dict[str, float]]:
        """majority: every pair gets the commonest label of `train`."""
        counts = Counter(pair.label for pair in train if self.labelled(pair))
        return {"majority": self.score(test, [max(LABELS, key=counts.__getitem__)] * len(test))}

    def write(self, examples: Sequence[Pair], predictions: Sequence[str], path: Path) -> None:
        # All predictions of a label are spelt as the file spells it: the spelling must not show which are right.
        spelling = {ALIASES[pair.spelt]: pair.spelt for pair in examples if pair.spelt in ALIASES}
        pairs = zip(examples, predictions, strict=True)
        lines = [pair.relabelled(spelling.get(label, label)) for pair, label in pairs]
        write_text(path, "\n".join([examples[0].header, *lines] if examples[0].header else lines) + "\n")

    def suffix(self, examples: Sequence[Pair]) -> str:
        return ".jsonl" if examples[0].column is None else ".tsv"

    def report(self, examples: Sequence[Pair], predictions: Sequence[str]) -> str:
        pairs = [(e.label, p) for e, p in zip(examples, predictions, strict=True) if self.labelled(e)]
        return metrics.confusion([[gold for gold, _ in pairs]], [[label for _, label in pairs]], str)


def shortened(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Cuts both sequences to `room` pieces together: the longer one loses its last piece, again and again."""
    kept = max(room // 2, room - len(second))  # of the first
    return first[:kept], second[: room - min(kept, len(first))]


def _label(path: Path, line: int, label: str) -> str:
    label = ALIASES.get(label, label)
    if label not in (*LABELS, NO_LABEL):
        raise bad(path, line, f"label {label!r}: expected one of {', '.join(LABELS)} or {NO_LABEL}")
    return label


def _tsv_pairs(path: Path, lines: list[str], language: str, skipped: set[str]) -> Iterator[Pair]:
    """Pairs of a TSV file. A header in HEADERS names the columns; without one they are premise, hypothesis, label.

    Pairs in other languages are left out, and their languages added to `skipped`.
    """
    first = next(number for number, line in enumerate(lines) if line.strip())
    header = lines[first].rstrip("\r").split("\t")
    fields = next((names for names in HEADERS if set(names) <= set(header)), None)
    named = fields is not None
    indices = [header.index(field) for field in fields] if fields else [0, 1, 2]
    code = header.index("language") if named and "language" in header else None
    for number, line in enumerate(lines[first + named :], first + named + 1):
        if not line.strip():
            continue
        columns = line.rstrip("\r").split("\t")
        if len(columns) != (len(header) if named else 3):
            expected = f"{len(header)} as in the header" if named else "3: premise, hypothesis, label"
            raise bad(path, number, f"{len(columns)} columns separated by tabs, expected {expected}")
        if code is not None and columns[code] != language:
            skipped.add(columns[code])
            continue
        premise, hypothesis, label = (columns[index] for index in indices)
        header_line = lines[first] if named else ""
        yield Pair(premise, hypothesis, _label(path, number, label), line, label, indices[2], header_line)


def _json_pairs(path: Path, lines: list[str], language: str, skipped: set[str]) -> Iterator[Pair]:
    """Reads pairs as `_tsv_pairs` does, from a file with one JSON object a line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with refusing(f"{path}, line {number}: expected a JSON object with {', '.join(FIELDS)}"):
            fields = json.loads(line)
            premise, hypothesis, label = (typed(fields[name], str, name) for name in FIELDS)
            code = typed(fields.get("language", language), str, "language")
            json.dumps(fields, ensure_ascii=False).encode()  # fails on half a surrogate pair, which no file can hold
        if code != language:
            skipped.add(code)
        else:
            yield Pair(premise, hypothesis, _label(path, number, label), line, label, None)
