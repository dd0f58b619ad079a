"""Natural language inference: XNLI and MNLI as TSV (with or without a header) and JSONL.

A row is `<s> premise </s> hypothesis </s>`; a pair too long for it loses pieces from the end of the longer sentence, one
by one. The label `-` (annotators did not agree) is no label: such pairs are neither trained on nor scored.
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
from mlinterf_ds.tasks.base import Kind, Limits, Row
from mlinterf_ds.tasks.files import bad, read_text, typed

LABELS = ["entailment", "neutral", "contradiction"]
ALIASES = {"contradictory": "contradiction"}  # in machine-translated MNLI
NO_LABEL = "-"
FIELDS = ("sentence1", "sentence2", "gold_label")
HEADERS = (FIELDS, ("premise", "hypo", "label"), ("premise", "hypothesis", "label"))  # XNLI, MNLI; XNLI-MT; others


@dataclass(frozen=True)
class Pair:
    """A premise, a hypothesis and one of LABELS or NO_LABEL; and the line of the file they came from."""

    premise: str
    hypothesis: str
    label: str
    raw: str = ""
    column: int | None = 2  # of the label in a TSV; None: JSON
    header: str = ""  # the file's, if it has one

    @property
    def spelt(self) -> str:
        """The label as the file has it."""
        if not self.raw:
            return self.label
        body = self.raw.rstrip("\r")
        return str(json.loads(body)["gold_label"]) if self.column is None else body.split("\t")[self.column]

    def relabelled(self, label: str) -> str:
        """The line of the file with another label."""
        if self.raw and label == self.spelt:
            return self.raw
        body = self.raw.rstrip("\r")
        end = self.raw[len(body) :]
        if self.column is None:
            return json.dumps(json.loads(body) | {"gold_label": label}, ensure_ascii=False) + end
        columns = (body or f"{self.premise}\t{self.hypothesis}\t").split("\t")
        columns[self.column] = label
        return "\t".join(columns) + end


class Nli:
    """Predictions are labels; the metric is accuracy."""

    name, metric = "nli", "accuracy"
    kind: Kind = "labels"

    def read(self, path: Path, language: str) -> list[Pair]:
        text, others = read_text(path), set[str]()
        pairs = _json_pairs if text.lstrip().startswith("{") else _tsv_pairs
        found = list(pairs(path, text.split("\n"), language, others))
        if not found:
            raise UserError(
                f"{path}: no pairs in language {language!r}: its 'language' column has {', '.join(sorted(others)) or 'none'}; "
                "name one of these, or leave the column out"
            )
        return found

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
        found: list[Row] = []
        cut = 0
        for index, pair in enumerate(examples):
            first, second = tokenizer.encode(pair.premise), tokenizer.encode(pair.hypothesis)
            cut += len(first) + len(second) > limits.max_length - 3
            first, second = shortened(first, second, limits.max_length - 3)
            target = labels.index(pair.label) if pair.label in labels else -1
            found.append(Row(index, [BOS, *first, EOS, *second, EOS], [0], [target]))
        return found, [f"{cut} pairs are longer than {limits.max_length} pieces and were cut"] if cut else []

    def predict(
        self,
        examples: Sequence[Pair],
        rows: Sequence[Row],
        outputs: Sequence[Any],
        labels: Sequence[str],
        limits: Limits,
    ) -> list[str]:
        return [labels[int(classes[0])] for classes in outputs]

    def score(self, examples: Sequence[Pair], predictions: Sequence[str]) -> dict[str, float]:
        right = [e.label == p for e, p in zip(examples, predictions, strict=True) if self.labelled(e)]
        return {"accuracy": 100 * sum(right) / len(right)} if right else {}

    def counts(self, examples: Sequence[Pair], predictions: Sequence[str]) -> list[metrics.Counts]:
        pairs = zip(examples, predictions, strict=True)
        return [(float(e.label == p), 1.0, 1.0) for e, p in pairs if self.labelled(e)]

    def baselines(self, train: Sequence[Pair], test: Sequence[Pair]) -> dict[str, dict[str, float]]:
        """majority: the commonest label of `train`."""
        counts = Counter(pair.label for pair in train if self.labelled(pair))
        return {"majority": self.score(test, [max(LABELS, key=counts.__getitem__)] * len(test))}

    def write(self, examples: Sequence[Pair], predictions: Sequence[str], path: Path) -> None:
        lines = [examples[0].header] if examples[0].header else []
        spelt = {
            ALIASES[pair.spelt]: pair.spelt for pair in examples if pair.spelt in ALIASES
        }  # no label shows its gold
        lines += [pair.relabelled(spelt.get(label, label)) for pair, label in zip(examples, predictions, strict=True)]
        write_text(path, "\n".join(lines) + "\n")

    def suffix(self, examples: Sequence[Pair]) -> str:
        return ".jsonl" if examples[0].column is None else ".tsv"

    def report(self, examples: Sequence[Pair], predictions: Sequence[str]) -> str:
        gold = [[pair.label for pair in examples if self.labelled(pair)]]
        return metrics.confusion(
            gold, [[p for e, p in zip(examples, predictions, strict=True) if self.labelled(e)]], str
        )


def shortened(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Both sequences within `room` together: the longer one loses its end, piece by piece."""
    a, b = len(first), len(second)
    while a + b > room:
        a, b = (a - 1, b) if a >= b else (a, b - 1)
    return first[:a], second[:b]


def _label(path: Path, line: int, label: str) -> str:
    label = ALIASES.get(label, label)
    if label not in (*LABELS, NO_LABEL):
        raise bad(path, line, f"label {label!r}: expected one of {', '.join(LABELS)} or {NO_LABEL}")
    return label


def _tsv_pairs(path: Path, lines: list[str], language: str, others: set[str]) -> Iterator[Pair]:
    """Columns by the header's names (as HEADERS has them), or premise, hypothesis, label. `others`: languages passed over."""
    first = next(number for number, line in enumerate(lines) if line.strip())
    head = lines[first].rstrip("\r").split("\t")
    fields = next((names for names in HEADERS if set(names) <= set(head)), None)
    named = fields is not None
    at = [head.index(field) for field in fields] if fields else [0, 1, 2]
    code = head.index("language") if named and "language" in head else None
    for number, line in enumerate(lines[first + named :], first + named + 1):
        if not line.strip():
            continue
        columns = line.rstrip("\r").split("\t")
        if len(columns) != (len(head) if named else 3):
            wanted = f"{len(head)} as in the header" if named else "3: premise, hypothesis, label"
            raise bad(path, number, f"{len(columns)} columns separated by tabs, expected {wanted}")
        if code is not None and columns[code] != language:
            others.add(columns[code])
            continue
        premise, hypothesis, label = (columns[index] for index in at)
        yield Pair(premise, hypothesis, _label(path, number, label), line, at[2], lines[first] if named else "")


def _json_pairs(path: Path, lines: list[str], language: str, others: set[str]) -> Iterator[Pair]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with refusing(f"{path}, line {number}: expected a JSON object with {', '.join(FIELDS)}"):
            found = json.loads(line)
            premise, hypothesis, label = (typed(found[field], str, field) for field in FIELDS)
            of = typed(found.get("language", language), str, "language")
            json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair could not be written back
        if of != language:
            others.add(of)
        else:
            yield Pair(premise, hypothesis, _label(path, number, label), line, None)
