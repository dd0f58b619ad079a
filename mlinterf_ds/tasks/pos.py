"""Parts of speech: CoNLL-U treebanks and two-column files (`word tag`), the 17 tags of Universal Dependencies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.tasks import metrics, tagging
from mlinterf_ds.tasks.base import Kind, Limits, Row
from mlinterf_ds.tasks.files import bad
from mlinterf_ds.tasks.tagging import Found, Predictions, Sentence

UPOS = [
    "ADJ",
    "ADP",
    "ADV",
    "AUX",
    "CCONJ",
    "DET",
    "INTJ",
    "NOUN",
    "NUM",
    "PART",
    "PRON",
    "PROPN",
    "PUNCT",
    "SCONJ",
    "SYM",
    "VERB",
    "X",
]
UPOS_COLUMN, COLUMNS = 3, 10
NO_WORD = re.compile(r"\d+-\d+|\d+\.\d+")  # multiword tokens (their words follow) and empty nodes have no tag to learn


def check_tag(tag: str) -> str:
    return "" if tag in UPOS else f"tag {tag!r}: expected one of {' '.join(UPOS)}"


def read_conllu(path: Path) -> list[Sentence]:
    """The syntactic words of a CoNLL-U file."""

    def parse(lines: list[str], number: int) -> Found:
        found: Found = []
        for index, line in enumerate(lines):
            columns = line.rstrip("\r").split("\t")
            if line.startswith("#"):
                continue
            if len(columns) != COLUMNS:
                raise bad(
                    path, number + index, f"{len(columns)} columns, expected {COLUMNS} separated by tabs (CoNLL-U)"
                )
            if NO_WORD.fullmatch(columns[0]):
                continue
            if columns[0] != str(len(found) + 1):
                raise bad(path, number + index, f"ID {columns[0]!r}: expected {len(found) + 1}, N-M or N.M")
            if not columns[1]:
                raise bad(path, number + index, "FORM is empty")
            if why := check_tag(columns[UPOS_COLUMN]):
                raise bad(path, number + index, why)
            found.append((index, columns[1], columns[UPOS_COLUMN]))
        return found

    return tagging.read_blocks(path, parse, UPOS_COLUMN)


class Pos:
    """Predictions are UPOS tags. The metric is F1 "as in NER" (paper): seqeval's over runs of equal tags, as XTREME's."""

    name, metric = "pos", "f1"
    kind: Kind = "labels"

    def read(self, path: Path, language: str) -> list[Sentence]:
        return read_conllu(path) if path.suffix.lower() == ".conllu" else tagging.read_columns(path, check_tag, 2)

    def synthetic(self, language: str, count: int, seed: int, split: str) -> list[Sentence]:
        from mlinterf_ds.data.synthetic import annotated

        path, line, found = Path(f"synthetic-{language}-{split}"), 1, []
        for example in annotated(language, count, seed, split):
            found.append(tagging.made(example.tokens, example.pos, path, line))
            line += len(example.tokens) + 1
        return found

    def group(self, example: Sentence) -> str:
        return " ".join(example.words)

    def labelled(self, example: Sentence) -> bool:
        return True

    def labels(self, train: Sequence[Sentence]) -> list[str]:
        return list(UPOS)

    def rows(
        self, examples: Sequence[Sentence], tokenizer: Tokenizer, labels: Sequence[str], limits: Limits
    ) -> tuple[list[Row], list[str]]:
        return tagging.rows(examples, [s.tags for s in examples], tokenizer, labels, limits)

    def predict(
        self,
        examples: Sequence[Sentence],
        rows: Sequence[Row],
        outputs: Sequence[Sequence[int]],
        labels: Sequence[str],
        limits: Limits,
    ) -> list[list[str]]:
        return tagging.predict(examples, rows, outputs, labels)

    def score(self, examples: Sequence[Sentence], predictions: Predictions) -> dict[str, float]:
        gold = [s.tags for s in examples]
        return {"f1": metrics.run_f1(gold, predictions), "accuracy": metrics.tag_accuracy(gold, predictions)}

    def counts(self, examples: Sequence[Sentence], predictions: Predictions) -> list[metrics.Counts]:
        return metrics.run_counts([s.tags for s in examples], predictions)

    def baselines(self, train: Sequence[Sentence], test: Sequence[Sentence]) -> dict[str, dict[str, float]]:
        """majority: the commonest tag of `train` on every word."""
        counts = {tag: sum(s.tags.count(tag) for s in train) for tag in UPOS}
        commonest = max(UPOS, key=counts.__getitem__)
        guesses = {
            "majority": tagging.constant(test, commonest),
            "lexical": tagging.lexical(train, [s.tags for s in train], test, commonest),
        }
        return {name: self.score(test, tags) for name, tags in guesses.items()}

    def write(self, examples: Sequence[Sentence], predictions: Predictions, path: Path) -> None:
        tagging.write(examples, predictions, path)

    def suffix(self, examples: Sequence[Sentence]) -> str:
        return ".conllu" if examples[0].column == UPOS_COLUMN else ".txt"

    def report(self, examples: Sequence[Sentence], predictions: Predictions) -> str:
        return metrics.confusion([s.tags for s in examples], predictions, str)
