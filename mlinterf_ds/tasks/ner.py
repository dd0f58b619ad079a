"""Named entities: WikiAnn/PAN-X and CoNLL columns in IOB1, IOB2, IOBES, BILOU or BMES. The model learns and predicts IOB2."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlinterf_ds.errors import UserError
from mlinterf_ds.tasks import columns, metrics
from mlinterf_ds.tasks.columns import Sentence, Tags
from mlinterf_ds.tasks.tagging import Tagger, constant

TAG = re.compile(r"O|[BIMESLU]-\S+")
WIKI_PREFIX = re.compile(r"((?:[a-z]{2,3}(?:-[a-z]+)*|simple):).")  # a wiki's code and a colon, before a word
Span = tuple[str, int, int]  # (type, first word, word after the last)


def check_tag(tag: str) -> str:
    """What is wrong with a tag, or ''."""
    return "" if TAG.fullmatch(tag) else f"tag {tag!r}: expected O or B-, I-, E-, S- and a type, such as B-PER"


class Ner(Tagger):
    """Predictions are IOB2 tags, one for each word; the metric is seqeval's entity F1."""

    name, metric, synthetic_tags, blank = "ner", "f1", "entities", "O"

    def read(self, path: Path, language: str) -> list[Sentence]:
        blank = self.blank if self.unlabelled else ""
        return strip_wiki_prefix(columns.read_columns(path, check_tag, "NER", rename=self._renamed, blank=blank))

    def _renamed(self, tag: str) -> str:
        """The tag with the type that `finetune.labels` puts in its type's place; O for the type O."""
        prefix, dash, kind = tag.partition("-")
        renamed = self.rename(kind)
        return tag if not dash else "O" if renamed == "O" != kind else f"{prefix}-{renamed}"

    def gold(self, examples: Sequence[Sentence]) -> list[Sequence[str]]:
        return _scored(examples, [in_scheme(sentence.tags, "IOB2") for sentence in examples])

    def labels(self, train: Sequence[Sentence]) -> list[str]:
        types = sorted({kind for sentence in train for kind, _, _ in spans(sentence.tags)})
        return ["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]

    def score(self, examples: Sequence[Sentence], predictions: Tags) -> dict[str, float]:
        return metrics.entity_scores(self.gold(examples), _scored(examples, predictions))

    def counts(self, examples: Sequence[Sentence], predictions: Tags) -> list[metrics.Counts]:
        return metrics.entity_counts(self.gold(examples), _scored(examples, predictions))

    def majority(self, train: Sequence[Sentence]) -> tuple[str, str]:
        """The tag that scores best on `train`, and O."""
        return max(self.labels(train), key=lambda tag: self.score(train, constant(train, tag))[self.metric]), "O"

    def write(self, examples: Sequence[Sentence], predictions: Tags, path: Path) -> None:
        scheme = scheme_of([s.tags for s in examples])
        columns.write(examples, [in_scheme(tags, scheme) for tags in predictions], path)

    def suffix(self, examples: Sequence[Sentence]) -> str:
        return ".tsv"

    def report(self, examples: Sequence[Sentence], predictions: Tags) -> str:
        gold, predictions = self.gold(examples), _scored(examples, predictions)
        by_type = metrics.confusion(gold, predictions, lambda tag: tag[2:] or "O")
        return metrics.entity_report(gold, predictions) + "\n" + by_type


def _scored(examples: Sequence[Sentence], tags: Tags) -> list[Sequence[str]]:
    """The tags with O for words that are not scored."""
    pairs = zip(examples, tags, strict=True)
    return [["O" if k in s.ignored else tag for k, tag in enumerate(row)] if s.ignored else row for s, row in pairs]


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities of a tagged sentence, by the rule of the CoNLL scorer, which reads IOB1, IOB2 and IOBES alike.

    B, S and U open an entity; E, S, L and U close it; I, M and E open one if the word before is in no entity or in another.
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


def scheme_of(sentences: Sequence[Sequence[str]]) -> str:
    """The scheme of a file's tags: 'IOBES', 'BILOU', 'BMES' (as Chinese sets have it), 'IOB1' or 'IOB2'."""
    prefixes = {tag[0] for tags in sentences for tag in tags}
    if prefixes & set("LU"):
        return "BILOU"
    if "M" in prefixes:
        return "BMES"
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
    first_tag, last_tag, single_tag = tuple({"IOBES": "BES", "BMES": "BES", "BILOU": "BLU"}.get(scheme, "BIB"))
    result = ["O"] * len(tags)
    before: Span = ("", 0, 0)
    for kind, first, end in spans(tags):
        result[first:end] = [f"{'M' if scheme == 'BMES' else 'I'}-{kind}"] * (end - first)
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
            if not word.startswith(prefix):
                raise UserError(
                    f"{sentence.location(index)}: {word!r} lacks the prefix {prefix!r} that most words here have"
                )
    return [replace(s, words=tuple(word.removeprefix(prefix) for word in s.words)) for s in sentences]
