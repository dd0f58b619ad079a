"""Parts of speech: CoNLL-U treebanks and two-column files (`word tag`), the 17 tags of Universal Dependencies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlinterf_ds.tasks import columns, metrics
from mlinterf_ds.tasks.columns import Sentence, Tags
from mlinterf_ds.tasks.tagging import Tagger

UPOS = [
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
    "VERB", "X",
]  # fmt: skip


def check_tag(tag: str) -> str:
    """What is wrong with a tag, or ''."""
    return "" if tag in UPOS else f"tag {tag!r}: expected one of {' '.join(UPOS)}; --labels OLD=NEW,... renames tags"


class Pos(Tagger):
    """Predictions are UPOS tags. The metric is F1 "as in NER" (paper): seqeval's F1 over runs of equal tags, as in XTREME."""

    name, metric, synthetic_tags, blank = "pos", "f1", "pos", "X"

    def read(self, path: Path, language: str) -> list[Sentence]:
        layout = columns.CONLLU if path.suffix.lower() == ".conllu" else None
        blank = self.blank if self.unlabelled else ""
        return columns.read_columns(path, check_tag, "UPOS", width=2, layout=layout, rename=self.rename, blank=blank)

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
        return ".conllu" if examples[0].column == columns.CONLLU.tag else ".txt"

    def report(self, examples: Sequence[Sentence], predictions: Tags) -> str:
        return metrics.confusion(self.gold(examples), predictions, str)
