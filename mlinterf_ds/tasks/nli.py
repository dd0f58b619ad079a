"""Natural language inference: XNLI and MNLI as TSV (with or without a header), JSONL and JSON arrays.

A row is `<s> premise </s> hypothesis </s>`. A pair too long for a row loses pieces from the end of the longer sentence, one
by one. Pairs with the label `-` (the annotators did not agree) are neither trained on nor scored.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import write_text
from mlinterf_ds.tasks import metrics
from mlinterf_ds.tasks.base import Kind, Limits, Row, Task
from mlinterf_ds.tasks.files import bad, read_text, typed

LABELS = ["entailment", "neutral", "contradiction"]
ALIASES = {"contradictory": "contradiction"}  # the machine-translated MNLI spells it so
NO_LABEL = "-"
ARRAY = "["  # the beginning of a JSON array
# The names of premise and hypothesis in XNLI and MNLI, in the machine-translated MNLI, in others; and of the label
TEXTS = (("sentence1", "sentence2"), ("premise", "hypo"), ("premise", "hypothesis"))
GOLD = ("gold_label", "label")
FIELDS = f"{', or '.join(' and '.join(names) for names in TEXTS)}, with {' or '.join(GOLD)}"


@dataclass(frozen=True)
class Pair:
    """A premise, a hypothesis, one of LABELS or NO_LABEL, and the line of the file that they came from."""

    premise: str
    hypothesis: str
    label: str
    raw: str = ""  # the line, or the item of a JSON array; "" if the pair comes from no file
    spelt: Any = ""  # the label as the file spells it: text, in JSON also a number
    column: int | str | None = 2  # the label's column, or its name in JSON; None: the file has no column of labels
    header: str = ""  # the header of the TSV file, if it has one; ARRAY

    def relabelled(self, label: Any) -> str:
        """The pair's line with another label."""
        if self.raw and label == self.spelt:
            return self.raw
        body = self.raw.rstrip("\r")
        end = self.raw[len(body) :]
        if isinstance(self.column, str):
            return json.dumps(json.loads(body) | {self.column: label}, ensure_ascii=False) + end
        columns = (body or f"{self.premise}\t{self.hypothesis}\t").split("\t")
        if self.column is None:
            columns.append(label)
        else:
            columns[self.column] = label
        return "\t".join(columns) + end


class Nli(Task):
    """Predictions are labels; the metric is accuracy."""

    name, metric = "nli", "accuracy"
    kind: Kind = "labels"

    def read(self, path: Path, language: str) -> list[Pair]:
        text, skipped = read_text(path), set[str]()
        parse = self._json_pairs if re.match(r"\s*(\[\s*)?{", text) else self._tsv_pairs
        pairs = list(parse(path, text, language, skipped))
        if not pairs:
            languages = ", ".join(sorted(skipped)) or "none"
            raise UserError(
                f"{path}: no pairs in language {language!r}: its 'language' column has {languages}; "
                "name one of these, or leave the column out"
            )
        return pairs

    def _label(self, file_and_line: str, label: Any) -> str:
        """The label that the file's label stands for."""
        renamed = self.rename(str(label))
        renamed = ALIASES.get(renamed, renamed)
        if renamed not in (*LABELS, NO_LABEL):
            if self.unlabelled:
                return NO_LABEL
            expected = f"{', '.join(LABELS)} or {NO_LABEL}; --labels OLD=NEW,... renames labels"
            raise UserError(f"{file_and_line}: label {label!r}: expected one of {expected}")
        return renamed

    def _tsv_pairs(self, path: Path, text: str, language: str, skipped: set[str]) -> Iterator[Pair]:
        """Pairs of a TSV file. A header with one of TEXTS names the columns; without one they are in this order.

        Pairs in other languages are left out, and their languages added to `skipped`.
        """
        lines = text.split("\n")
        first = next(number for number, line in enumerate(lines) if line.strip())
        header = lines[first].rstrip("\r").lower().split("\t")
        names = _names(header, self.unlabelled)
        indices = [header.index(name) for name in names] if names else list(range(min(3, len(header))))
        width = len(header) if names else 2 if self.unlabelled and len(header) == 2 else 3
        code = header.index("language") if names and "language" in header else None
        for number, line in enumerate(lines[first + bool(names) :], first + bool(names) + 1):
            if not line.strip():
                continue
            columns = line.rstrip("\r").split("\t")
            if len(columns) != width:
                expected = f"{width} as in the header" if names else f"{width}: premise, hypothesis, label"
                raise bad(path, number, f"{len(columns)} columns separated by tabs, expected {expected}")
            if code is not None and columns[code] != language:
                skipped.add(columns[code])
                continue
            premise, hypothesis, *given = (columns[index] for index in indices)
            label, column = (given[0], indices[2]) if given else (NO_LABEL, None)
            top = lines[first] if names else ""
            hint = "" if names or number > first + 1 else f" (a header names {FIELDS})"
            yield Pair(
                premise, hypothesis, self._label(f"{path}, line {number}{hint}", label), line, label, column, top
            )

    def _json_pairs(self, path: Path, text: str, language: str, skipped: set[str]) -> Iterator[Pair]:
        """Pairs of a file with one JSON object a line, or with an array of objects."""
        items: list[tuple[int, str]] = [
            (number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
        header = ""
        if text.lstrip()[0] == ARRAY:
            header = ARRAY
            with refusing(f"{path}: not a JSON array"):
                items = [
                    (number, json.dumps(item, ensure_ascii=False)) for number, item in enumerate(json.loads(text), 1)
                ]
        kind = "item" if header else "line"
        for number, line in items:
            with refusing(f"{path}, {kind} {number}: expected a JSON object with {FIELDS}"):
                fields = json.loads(line)
                names = _names(fields, self.unlabelled) or (*TEXTS[0], GOLD[0])
                premise, hypothesis = (typed(fields[name], str, name) for name in names[:2])
                label = fields[names[2]] if len(names) == 3 else NO_LABEL
                label = label if type(label) is int else typed(label, str, names[-1])
                code = typed(fields.get("language", language), str, "language")
                json.dumps(fields, ensure_ascii=False).encode()  # fails on half a surrogate pair
            if code != language:
                skipped.add(code)
                continue
            column = names[2] if len(names) == 3 else "label"
            yield Pair(premise, hypothesis, self._label(f"{path}, {kind} {number}", label), line, label, column, header)

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
        cut = empty = 0
        special = tokenizer.vocabulary
        room = limits.max_length - 2 - len(special.separator)
        for index, pair in enumerate(examples):
            first, second = tokenizer.encode(pair.premise), tokenizer.encode(pair.hypothesis)
            empty += not first or not second
            cut += len(first) + len(second) > room
            first, second = shortened(first, second, room)
            target = labels.index(pair.label) if pair.label in labels else -1
            rows.append(Row(index, [special.bos, *first, *special.separator, *second, special.eos], [0], [target]))
        notes = [f"{cut} pairs are longer than {limits.max_length} pieces and were cut"] if cut else []
        return rows, notes + ([f"{empty} pairs have an empty premise or hypothesis"] if empty else [])

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
        """majority: the commonest label of `train`; lexical: the words of the hypothesis vote for the labels they had there."""
        known = [(pair.hypothesis, pair.label) for pair in train if self.labelled(pair)]
        counts = Counter(label for _, label in known)
        lexical = metrics.voted(known, [pair.hypothesis for pair in test])
        majority = [max(LABELS, key=counts.__getitem__)] * len(test)
        return {"majority": self.score(test, majority), "lexical": self.score(test, lexical)}

    def write(self, examples: Sequence[Pair], predictions: Sequence[str], path: Path) -> None:
        # All predictions of a label are spelt as the file spells it: the spelling must not show which are right.
        spelling = {pair.label: pair.spelt for pair in examples if pair.spelt not in ("", pair.label)}
        pairs = zip(examples, predictions, strict=True)
        lines = [pair.relabelled(spelling.get(label, label)) for pair, label in pairs]
        if examples[0].header == ARRAY:
            write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
            return
        header = examples[0].header
        if header and examples[0].column is None:
            names = header.rstrip("\r")
            header = f"{names}\tlabel{header[len(names) :]}"
        write_text(path, "\n".join([header, *lines] if header else lines) + "\n")

    def suffix(self, examples: Sequence[Pair]) -> str:
        return ".json" if examples[0].header == ARRAY else ".jsonl" if isinstance(examples[0].column, str) else ".tsv"

    def report(self, examples: Sequence[Pair], predictions: Sequence[str]) -> str:
        pairs = [(e.label, p) for e, p in zip(examples, predictions, strict=True) if self.labelled(e)]
        return metrics.confusion([[gold for gold, _ in pairs]], [[label for _, label in pairs]], str)


def shortened(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """Cuts both sequences to `room` pieces together: the longer one loses its last piece, again and again."""
    kept = max(room // 2, room - len(second))  # pieces that the first sequence keeps
    return first[:kept], second[: room - min(kept, len(first))]


def _names(known: Collection[str], unlabelled: bool) -> tuple[str, ...] | None:
    """The names of premise, hypothesis and label that are among these; of new text also without the label."""
    for names in TEXTS:
        label = [name for name in GOLD if name in known][:1]
        if set(names) <= set(known) and (label or unlabelled):
            return (*names, *label)
    return None
