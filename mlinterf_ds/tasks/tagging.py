"""Word tagging (entities, parts of speech): rows of the encoder, predictions, baselines.

A word's tag is predicted from its first piece (paper, section 3.2). A word that tokenises to nothing (control characters
alone) becomes `<unk>`, so that every word has a prediction. A sentence too long for the encoder is cut into windows at
word boundaries: each word is predicted in one window, which begins with up to `stride` pieces of the words before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from mlinterf_ds.data.tokenizer import BOS, EOS, UNK, Tokenizer
from mlinterf_ds.errors import UserError
from mlinterf_ds.tasks.base import Limits, Row
from mlinterf_ds.tasks.columns import Sentence, Tags


def rows(
    sentences: Sequence[Sentence], gold: Tags, tokenizer: Tokenizer, labels: Sequence[str], limits: Limits
) -> tuple[list[Row], list[str]]:
    """The rows of the sentences, and notes on what was cut; gold: the sentences' tags in terms of `labels`.

    `Row.detail` is (first, end): the words that the row predicts.
    """
    classes = {label: index for index, label in enumerate(labels)}
    room = limits.max_length - 2
    made: list[Row] = []
    nothing: list[str] = []  # words that tokenise to nothing
    windowed = cut = 0
    cache: dict[str, list[int]] = {}  # each word's pieces
    for index, (sentence, tags) in enumerate(zip(sentences, gold, strict=True)):
        pieces = []
        for k, word in enumerate(sentence.words):
            if word not in cache:
                cache[word] = tokenizer.encode(word)
            if not cache[word]:
                nothing.append(f"{sentence.location(k)}: {word!r}")
            pieces.append((cache[word] or [UNK])[:room])
            cut += len(cache[word]) > room
        targets = [_class_of(classes, tag, sentence, k) for k, tag in enumerate(tags)]
        spans = list(windows([len(piece) for piece in pieces], room, limits.stride))
        windowed += len(spans) > 1
        made += [_row(index, pieces, targets, span) for span in spans]
    notes = []
    if nothing:
        notes.append(f"{len(nothing)} words tokenise to nothing and are read as <unk>; the first is {nothing[0]}")
    if windowed:
        notes.append(f"{windowed} sentences are longer than {limits.max_length} pieces and were cut into windows")
    if cut:
        notes.append(f"{cut} words are longer than {room} pieces: only their first pieces are read")
    return made, notes


def _class_of(classes: dict[str, int], tag: str, sentence: Sentence, word: int) -> int:
    if tag not in classes:
        known = ", ".join(classes)
        raise UserError(f"{sentence.location(word)}: tag {tag!r} does not occur in the training set, which has {known}")
    return classes[tag]


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


def _row(example: int, pieces: list[list[int]], targets: list[int], span: tuple[int, int, int]) -> Row:
    begin, first, end = span
    tokens, positions = [BOS], []
    for word in range(begin, end):
        if word >= first:
            positions.append(len(tokens))
        tokens += pieces[word]
    return Row(example, [*tokens, EOS], positions, targets[first:end], (first, end))


def predict(
    sentences: Sequence[Sentence], rows: Sequence[Row], outputs: Sequence[Sequence[int]], labels: Sequence[str]
) -> list[list[str]]:
    """The label of every word of every sentence; outputs: the class at each position of each row."""
    tags = [[""] * len(sentence.words) for sentence in sentences]
    for row, classes in zip(rows, outputs, strict=True):
        first, end = row.detail
        tags[row.example][first:end] = [labels[int(c)] for c in classes[: end - first]]
    return tags


def lexical(train: Sequence[Sentence], gold: Tags, test: Sequence[Sentence], default: str) -> list[list[str]]:
    """A baseline: each word gets the tag it had most often in training, and `default` if training did not have it."""
    counts: dict[str, Counter[str]] = {}
    for sentence, tags in zip(train, gold, strict=True):
        for word, tag in zip(sentence.words, tags, strict=True):
            counts.setdefault(word, Counter())[tag] += 1
    best = {word: max(sorted(times), key=times.__getitem__) for word, times in counts.items()}
    return [[best.get(word, default) for word in sentence.words] for sentence in test]


def constant(sentences: Sequence[Sentence], tag: str) -> list[list[str]]:
    """A baseline: every word gets the same tag."""
    return [[tag] * len(sentence.words) for sentence in sentences]
