"""Named entities: WikiAnn/PAN-X and CoNLL columns in IOB1, IOB2 or IOBES (BILOU), learnt and predicted in IOB2."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.tasks import metrics, tagging
from mlinterf_ds.tasks.base import Kind, Limits, Row
from mlinterf_ds.tasks.tagging import Predictions, Sentence

TAG = re.compile(r"O|[BIESLU]-\S+")
Span = tuple[str, int, int]  # (type, first word, word after the last)


def check_tag(tag: str) -> str:
    return "" if TAG.fullmatch(tag) else f"tag {tag!r}: expected O or B-, I-, E-, S- and a type, such as B-PER"


class Ner:
    """Predictions are IOB2 tags, one a word; the metric is seqeval's entity F1."""

    name, metric = "ner", "f1"
    kind: Kind = "labels"

    def read(self, path: Path, language: str) -> list[Sentence]:
        return tagging.strip_language_prefix(tagging.read_columns(path, check_tag))

    def synthetic(self, language: str, count: int, seed: int, split: str) -> list[Sentence]:
        from mlinterf_ds.data.synthetic import annotated

        path, line, found = Path(f"synthetic-{language}-{split}"), 1, []
        for example in annotated(language, count, seed, split):
            found.append(tagging.made(example.tokens, example.entities, path, line))
            line += len(example.tokens) + 1
        return found

    def group(self, example: Sentence) -> str:
        return " ".join(example.words)

    def labelled(self, example: Sentence) -> bool:
        return True

    def labels(self, train: Sequence[Sentence]) -> list[str]:
        types = sorted({kind for sentence in train for kind, _, _ in spans(sentence.tags)})
        return ["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]

    def rows(
        self, examples: Sequence[Sentence], tokenizer: Tokenizer, labels: Sequence[str], limits: Limits
    ) -> tuple[list[Row], list[str]]:
        return tagging.rows(examples, [iob2(s.tags) for s in examples], tokenizer, labels, limits)

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
        return metrics.entity_scores([iob2(s.tags) for s in examples], predictions)

    def counts(self, examples: Sequence[Sentence], predictions: Predictions) -> list[metrics.Counts]:
        return metrics.entity_counts([iob2(s.tags) for s in examples], predictions)

    def baselines(self, train: Sequence[Sentence], test: Sequence[Sentence]) -> dict[str, dict[str, float]]:
        """majority: the one tag for every word that scores best on `train` (all O scores 0, every word a place does not)."""
        gold = [iob2(s.tags) for s in train]
        best = max(
            self.labels(train), key=lambda tag: metrics.entity_scores(gold, tagging.constant(train, tag))[self.metric]
        )
        guesses = {
            "majority": tagging.constant(test, best),
            "lexical": tagging.lexical(train, gold, test, "O"),
        }
        return {name: self.score(test, tags) for name, tags in guesses.items()}

    def write(self, examples: Sequence[Sentence], predictions: Predictions, path: Path) -> None:
        scheme = scheme_of([s.tags for s in examples])
        tagging.write(examples, [in_scheme(tags, scheme) for tags in predictions], path)

    def suffix(self, examples: Sequence[Sentence]) -> str:
        return ".tsv"

    def report(self, examples: Sequence[Sentence], predictions: Predictions) -> str:
        gold = [iob2(s.tags) for s in examples]
        return metrics.entity_report(gold, predictions) + "\n" + metrics.confusion(gold, predictions, _type)


def _type(tag: str) -> str:
    return tag if tag == "O" else tag[2:]


def spans(tags: Sequence[str]) -> list[Span]:
    """Entities of a tagged sentence by the rule of the CoNLL scorer, which reads IOB1, IOB2 and IOBES alike.

    B, S and U open an entity; E, S, L and U close it; I and E open one where the word before is of no or another entity.
    """
    found: list[Span] = []
    open_type, first = "", 0
    for index, tag in enumerate([*tags, "O"]):
        prefix, kind = tag[0], tag[2:]
        if open_type and (prefix in "OBSU" or kind != open_type):
            found.append((open_type, first, index))
            open_type = ""
        if prefix != "O" and not open_type:
            open_type, first = kind, index
        if prefix in "ESLU" and open_type:
            found.append((open_type, first, index + 1))
            open_type = ""
    return found


def iob2(tags: Sequence[str]) -> list[str]:
    """The same entities in IOB2."""
    return in_scheme(tags, "IOB2")


def scheme_of(sentences: Sequence[Sequence[str]]) -> str:
    """'IOBES', 'BILOU', 'IOB1' or 'IOB2': which scheme a file's tags are in."""
    prefixes = {tag[0] for tags in sentences for tag in tags}
    if prefixes & set("LU"):
        return "BILOU"
    if prefixes & set("ES"):
        return "IOBES"
    opening = {tags[first][0] for tags in sentences for _, first, _ in spans(tags)}
    after_own = any(
        tags[first][0] == "B" and not (first and tags[first - 1][0] != "O" and tags[first - 1][2:] == kind)
        for tags in sentences
        for kind, first, _ in spans(tags)
    )
    return "IOB1" if "I" in opening and not after_own else "IOB2"


def in_scheme(tags: Sequence[str], scheme: str) -> list[str]:
    """The entities of a tagged sentence, tagged by another scheme."""
    first_tag, last_tag, single_tag = tuple({"IOBES": "BES", "BILOU": "BLU"}.get(scheme, "BIB"))
    result = ["O"] * len(tags)
    before: Span = ("", 0, 0)
    for kind, first, end in spans(tags):
        result[first:end] = [f"I-{kind}"] * (end - first)
        result[end - 1] = f"{last_tag}-{kind}"
        opens = first_tag if end - first > 1 else single_tag
        if scheme == "IOB1" and not (before[0] == kind and before[2] == first):
            opens = "I"
        result[first] = f"{opens}-{kind}"
        before = (kind, first, end)
    return result
