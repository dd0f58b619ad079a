"""Parts of speech: CoNLL-U treebanks and two-column files (`word tag`), the 17 tags of Universal Dependencies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mlinterf_ds.tasks import columns, metrics
from mlinterf_ds.tasks.columns import Sentence, Tags, Words
from mlinterf_ds.tasks.files import bad
from mlinterf_ds.tasks.tagging import Tagger

UPOS = [
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
    "VERB", "X",
]  # fmt: skip
UPOS_COLUMN, COLUMNS = 3, 10
NO_WORD = re.compile(r"\d+-\d+|\d+\.\d+")  # IDs of multiword tokens (their words follow) and of empty nodes


def check_tag(tag: str) -> str:
    """What is wrong with a tag, or ''."""
    return "" if tag in UPOS else f"tag {tag!r}: expected one of {' '.join(UPOS)}"


def read_conllu(path: Path) -> list[Sentence]:
    """The sentences of a CoNLL-U file, in syntactic words."""

    def parse(lines: list[str], number: int) -> Words:
        words: Words = []
        for index, line in enumerate(lines):
            if line.startswith("#"):
                continue
            fields = line.rstrip("\r").split("\t")
            if len(fields) != COLUMNS:
                message = f"{len(fields)} columns, expected {COLUMNS} separated by tabs (CoNLL-U)"
                raise bad(path, number + index, message)
            if NO_WORD.fullmatch(fields[0]):
                continue
            if fields[0] != str(len(words) + 1):
                raise bad(path, number + index, f"ID {fields[0]!r}: expected {len(words) + 1}, N-M or N.M")
            if not fields[1]:
                raise bad(path, number + index, "FORM is empty")
            if why := check_tag(fields[UPOS_COLUMN]):
                raise bad(path, number + index, why)
            words.append((index, fields[1], fields[UPOS_COLUMN]))
        return words

    return columns.read_blocks(path, parse, UPOS_COLUMN)


class Pos(Tagger):
    """Predictions are UPOS tags. The metric is F1 "as in NER" (paper): seqeval's F1 over runs of equal tags, as in XTREME."""

    name, metric, synthetic_tags = "pos", "f1", "pos"

    def read(self, path: Path, language: str) -> list[Sentence]:
        return read_conllu(path) if path.suffix.lower() == ".conllu" else columns.read_columns(path, check_tag, 2)

    def gold(self, examples: Sequence[Sentence]) -> list[Sequence[str]]:
        return [sentence.tags for sentence in examples]

    def labels(self, train: Sequence[Sentence]) -> list[str]:
        return list(UPOS)

    def score(self, examples: Sequence[Sentence], predictions: Tags) -> dict[str, float]:
        gold = self.gold(examples)
        f1 = metrics.entity_scores(metrics.runs(gold), metrics.runs(predictions))["f1"]
        return {"f1": f1, "accuracy": metrics.tag_accuracy(gold, predictions)}

    def counts(self, examples: Sequence[Sentence], predictions: Tags) -> list[metrics.Counts]:
        return metrics.entity_counts(metrics.runs(self.gold(examples)), metrics.runs(predictions))

    def majority(self, train: Sequence[Sentence]) -> tuple[str, str]:
        """The commonest tag of `train`, twice."""
        commonest = max(UPOS, key=lambda tag: sum(s.tags.count(tag) for s in train))
        return commonest, commonest

    def write(self, examples: Sequence[Sentence], predictions: Tags, path: Path) -> None:
        columns.write(examples, predictions, path)

    def suffix(self, examples: Sequence[Sentence]) -> str:
        return ".conllu" if examples[0].column == UPOS_COLUMN else ".txt"

    def report(self, examples: Sequence[Sentence], predictions: Tags) -> str:
        return metrics.confusion(self.gold(examples), predictions, str)
