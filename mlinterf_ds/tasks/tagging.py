"""Word tagging (entities, parts of speech): rows of the encoder, predictions, baselines.

A word's tag is predicted from its first piece (paper, section 3.2), or with `finetune.word=mean` from all its pieces. A word that tokenises to nothing (control characters
alone) becomes `<unk>`, so that every word has a prediction. A sentence too long for the encoder is cut into windows at
word boundaries: each word is predicted in one window, which begins with up to `stride` pieces of the words before.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlinterf_ds.data.tokenizer import Tokenizer, Vocabulary
from mlinterf_ds.errors import UserError
from mlinterf_ds.tasks.base import Kind, Limits, Row, Task
from mlinterf_ds.tasks.columns import Sentence, Tags, in_memory


class Tagger(Task):
    """A task whose examples are sentences and whose predictions are a label for each word."""

    kind: Kind = "labels"
    blank: str  # the tag of words of new text
    synthetic_tags: str  # the attribute of a synthetic sentence that holds its tags

    @abstractmethod
    def gold(self, examples: Sequence[Sentence]) -> list[Sequence[str]]:
        """The sentences' tags in terms of the task's labels."""

    def settle(self, examples: list[Sentence], labels: Sequence[str]) -> tuple[list[Sentence], str]:
        gold = self.gold(examples)
        unknown = Counter(tag for tags in gold for tag in tags if tag not in labels)
        if not unknown or self.unknown_labels == "error":
            return examples, ""
        names = ", ".join(f"{tag} {count}" for tag, count in sorted(unknown.items()))
        note = f"{unknown.total()} words have tags that training never had ({names})"
        if self.unknown_labels == "miss":
            return examples, f"{note}: they count as missed"
        settled = [
            replace(sentence, ignored=frozenset(k for k, tag in enumerate(tags) if tag not in labels))
            for sentence, tags in zip(examples, gold, strict=True)
        ]
        return settled, f"{note}: these words are not scored"

    @abstractmethod
    def majority(self, train: Sequence[Sentence]) -> tuple[str, str]:
        """The one tag that the majority baseline gives every word, and the tag that "lexical" gives unknown words."""

    def synthetic(self, language: str, count: int, seed: int, split: str) -> list[Sentence]:
        from mlinterf_ds.data.synthetic import annotated

        examples = annotated(language, count, seed, split)
        pairs = [(example.tokens, getattr(example, self.synthetic_tags)) for example in examples]
        return in_memory(pairs, Path(f"synthetic-{language}-{split}"))

    def group(self, example: Sentence) -> str:
        return " ".join(example.words)

    def rows(
        self, examples: Sequence[Sentence], tokenizer: Tokenizer, labels: Sequence[str], limits: Limits
    ) -> tuple[list[Row], list[str]]:
        """`Row.detail` is (first, end): the words that the row predicts."""
        room = limits.max_length - 2
        rows: list[Row] = []
        nothing: list[str] = []  # words that tokenise to nothing
        windowed = cut = 0
        special = tokenizer.vocabulary
        for index, (sentence, tags) in enumerate(zip(examples, self.gold(examples), strict=True)):
            pieces = []
            for k, (word, of_word) in enumerate(
                zip(sentence.words, tokenizer.encode_sentence(sentence.words), strict=True)
            ):
                if not of_word:
                    nothing.append(f"{sentence.location(k)}: {word!r}")
                pieces.append((of_word or [special.unk])[:room])
                cut += len(of_word) > room
            targets = [self._class_of(labels, tag, sentence, k) for k, tag in enumerate(tags)]
            spans = list(windows([len(piece) for piece in pieces], room, limits.stride))
            windowed += len(spans) > 1
            rows += [_row(index, pieces, targets, span, special) for span in spans]
        notes = list(dict.fromkeys(sentence.remark for sentence in examples if sentence.remark))
        if nothing:
            notes.append(f"{len(nothing)} words tokenise to nothing and are read as <unk>; the first is {nothing[0]}")
        if windowed:
            notes.append(f"{windowed} sentences are longer than {limits.max_length} pieces and were cut into windows")
        if cut:
            notes.append(f"{cut} words are longer than {room} pieces: only their first pieces are read")
        return rows, notes

    def _class_of(self, labels: Sequence[str], tag: str, sentence: Sentence, word: int) -> int:
        """The class of a word's tag, -1 if no prediction can be right or the word is not scored."""
        if tag in labels:
            return labels.index(tag)
        if self.unknown_labels == "error" and not self.unlabelled:
            raise UserError(
                f"{sentence.location(word)}: tag {tag!r} does not occur in the training set, which has "
                f"{', '.join(labels)}; --labels OLD=NEW,... renames labels, and finetune.unknown_labels=miss or ignore "
                "tests without it"
            )
        return -1

    def predict(
        self, examples: Sequence[Sentence], rows: list[Row], outputs: list[Any], labels: list[str], limits: Limits
    ) -> list[list[str]]:
        tags = [[""] * len(sentence.words) for sentence in examples]
        for row, classes in zip(rows, outputs, strict=True):
            first, end = row.detail
            tags[row.example][first:end] = [labels[int(c)] for c in classes[: end - first]]
        return tags

    def baselines(self, train: Sequence[Sentence], test: Sequence[Sentence]) -> dict[str, dict[str, float]]:
        """majority: every word gets one tag; lexical: each word gets the tag that it had most often in `train`."""
        tag, default = self.majority(train)
        counts: dict[str, Counter[str]] = {}
        for sentence, tags in zip(train, self.gold(train), strict=True):
            for word, right in zip(sentence.words, tags, strict=True):
                counts.setdefault(word, Counter())[right] += 1
        best = {word: max(sorted(times), key=times.__getitem__) for word, times in counts.items()}
        lexical = [[best.get(word, default) for word in sentence.words] for sentence in test]
        return {"majority": self.score(test, constant(test, tag)), "lexical": self.score(test, lexical)}


def constant(sentences: Sequence[Sentence], tag: str) -> Tags:
    """Predictions that give every word the same tag."""
    return [[tag] * len(sentence.words) for sentence in sentences]


def windows(sizes: Sequence[int], room: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first word read, first word predicted, word after the last) of each window: every word is predicted once.

    sizes: pieces of each word; a window has at most `room` pieces, of which at most `stride` are read and not predicted.
    """
    first = 0
    while first < len(sizes):
        begin, context = first, 0
        while begin > 0 and context + sizes[begin - 1] <= min(stride, room - sizes[first]):
            begin -= 1
            context += sizes[begin]
        used, end = context, first
        while end < len(sizes) and used + sizes[end] <= room:
            used += sizes[end]
            end += 1
        yield begin, first, end
        first = end


def _row(
    example: int, pieces: list[list[int]], targets: list[int], span: tuple[int, int, int], special: Vocabulary
) -> Row:
    begin, first, end = span
    tokens, positions, ends = [special.bos], [], []
    for word in range(begin, end):
        if word >= first:
            positions.append(len(tokens))
            ends.append(len(tokens) + len(pieces[word]))
        tokens += pieces[word]
    return Row(example, [*tokens, special.eos], positions, targets[first:end], (first, end), ends)
