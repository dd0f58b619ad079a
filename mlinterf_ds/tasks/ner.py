"""Named entities: WikiAnn/PAN-X and CoNLL columns in IOB1, IOB2, IOBES or BILOU. The model learns and predicts IOB2."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.errors import UserError
from mlinterf_ds.tasks import columns, metrics, tagging
from mlinterf_ds.tasks.base import Kind, Limits, Row, Task
from mlinterf_ds.tasks.columns import Sentence, Tags

TAG = re.compile(r"O|[BIESLU]-\S+")
WIKI_PREFIX = re.compile(r"((?:[a-z]{2,3}(?:-[a-z]+)*|simple):).")  # a wiki's code and a colon, before a word
Span = tuple[str, int, int]  # (type, first word, word after the last)


def check_tag(tag: str) -> str:
    """What is wrong with a tag, or ''."""
    return "" if TAG.fullmatch(tag) else f"tag {tag!r}: expected O or B-, I-, E-, S- and a type, such as B-PER"


class Ner(Task):
    """Predictions are IOB2 tags, one for each word; the metric is seqeval's entity F1."""

    name, metric = "ner", "f1"
    kind: Kind = "labels"

    def read(self, path: Path, language: str) -> list[Sentence]:
        return strip_wiki_prefix(columns.read_columns(path, check_tag))

    def synthetic(self, language: str, count: int, seed: int, split: str) -> list[Sentence]:
        from mlinterf_ds.data.synthetic import annotated

        examples = annotated(language, count, seed, split)
        return columns.in_memory([(e.tokens, e.entities) for e in examples], Path(f"synthetic-{language}-{split}"))

    def group(self, example: Sentence) -> str:
        return " ".join(example.words)

    def labels(self, train: Sequence[Sentence]) -> list[str]:
        types = sorted({kind for sentence in train for kind, _, _ in spans(sentence.tags)})
        return ["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]

    def rows(
        self, examples: Sequence[Sentence], tokenizer: Tokenizer, labels: Sequence[str], limits: Limits
    ) -> tuple[list[Row], list[str]]:
        return tagging.rows(examples, [iob2(s.tags) for s in examples], tokenizer, labels, limits)

    def predict(
        self, examples: Sequence[Sentence], rows: list[Row], outputs: list[Any], labels: list[str], limits: Limits
    ) -> list[list[str]]:
        return tagging.predict(examples, rows, outputs, labels)

    def score(self, examples: Sequence[Sentence], predictions: Tags) -> dict[str, float]:
        return metrics.entity_scores([iob2(s.tags) for s in examples], predictions)

    def counts(self, examples: Sequence[Sentence], predictions: Tags) -> list[metrics.Counts]:
        return metrics.entity_counts([iob2(s.tags) for s in examples], predictions)

    def baselines(self, train: Sequence[Sentence], test: Sequence[Sentence]) -> dict[str, dict[str, float]]:
        """majority: every word gets the one tag that scores best on `train`; lexical: each word's commonest tag."""
        best = max(self.labels(train), key=lambda tag: self.score(train, tagging.constant(train, tag))[self.metric])
        lexical = tagging.lexical(train, [iob2(s.tags) for s in train], test, "O")
        return {"majority": self.score(test, tagging.constant(test, best)), "lexical": self.score(test, lexical)}

    def write(self, examples: Sequence[Sentence], predictions: Tags, path: Path) -> None:
        scheme = scheme_of([s.tags for s in examples])
        columns.write(examples, [in_scheme(tags, scheme) for tags in predictions], path)

    def suffix(self, examples: Sequence[Sentence]) -> str:
        return ".tsv"

    def report(self, examples: Sequence[Sentence], predictions: Tags) -> str:
        gold = [iob2(s.tags) for s in examples]
        by_type = metrics.confusion(gold, predictions, lambda tag: tag[2:] or "O")
        return metrics.entity_report(gold, predictions) + "\n" + by_type


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities of a tagged sentence, by the rule of the CoNLL scorer, which reads IOB1, IOB2 and IOBES alike.

    B, S and U open an entity; E, S, L and U close it; I and E open one if the word before is in no entity or in another.
    """
    entities: list[Span] = []
    open_type, first = "", 0
    for index, tag in enumerate([*tags, "O"]):
        prefix, kind = tag[0], tag[2:]
        if open_type and (prefix in "OBSU" or kind != open_type):
            entities.append((open_type, first, index))
            open_type = ""
        if prefix != "O" and not open_type:
            open_type, first = kind, index
        if prefix in "ESLU" and open_type:
            entities.append((open_type, first, index + 1))
            open_type = ""
    return entities


def iob2(tags: Sequence[str]) -> list[str]:
    """The same entities in IOB2."""
    return in_scheme(tags, "IOB2")


def scheme_of(sentences: Sequence[Sequence[str]]) -> str:
    """The scheme of a file's tags: 'IOBES', 'BILOU', 'IOB1' or 'IOB2'."""
    prefixes = {tag[0] for tags in sentences for tag in tags}
    if prefixes & set("LU"):
        return "BILOU"
    if prefixes & set("ES"):
        return "IOBES"
    opening = {tags[first][0] for tags in sentences for _, first, _ in spans(tags)}
    opens_apart = any(  # whether a B tag opens an entity that does not follow one of its type; IOB1 has no such tag
        tags[first][0] == "B" and not (first and tags[first - 1][0] != "O" and tags[first - 1][2:] == kind)
        for tags in sentences
        for kind, first, _ in spans(tags)
    )
    return "IOB1" if "I" in opening and not opens_apart else "IOB2"


def in_scheme(tags: Sequence[str], scheme: str) -> list[str]:
    """The same entities, tagged in another scheme."""
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


def strip_wiki_prefix(sentences: list[Sentence]) -> list[Sentence]:
    """Removes the prefix that WikiAnn's first version has before every word, such as `en:word` or `zh-yue:word`.

    UserError if most words have it and some have not: such a file is damaged.
    """
    matches = (WIKI_PREFIX.match(word) for sentence in sentences for word in sentence.words)
    counts = Counter(match.group(1) for match in matches if match)
    prefix, count = counts.most_common(1)[0] if counts else ("", 0)
    if count <= sum(len(sentence.words) for sentence in sentences) / 2:
        return sentences
    for sentence in sentences:
        for index, word in enumerate(sentence.words):
            if word == prefix:
                raise UserError(f"{sentence.location(index)}: no word after the prefix {prefix!r}")
            if not word.startswith(prefix):
                raise UserError(
                    f"{sentence.location(index)}: {word!r} lacks the prefix {prefix!r} that most words here have"
                )
    return [replace(s, words=tuple(word.removeprefix(prefix) for word in s.words)) for s in sentences]
