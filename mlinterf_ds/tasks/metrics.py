"""Scores, in percent: entity F1 by seqeval, SQuAD's EM and F1, accuracies, intervals; and tables of the errors."""

from __future__ import annotations

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlinterf_ds.tasks.columns import Tags

Counts = tuple[float, float, float]  # right, predicted, gold; a share of right answers is (right, 1, 1)


# --- tags ------------------------------------------------------------------------------------------------------------
def entity_scores(gold: Tags, predicted: Tags) -> dict[str, float]:
    """Micro-averaged F1, precision and recall by seqeval: an entity is right if its type and both ends are."""
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    lists = [list(tags) for tags in gold], [list(tags) for tags in predicted]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval warns that it sets a metric without predictions to 0, which is wanted
        scores = precision_recall_fscore_support(*lists, average="micro", zero_division=0)
    return {name: 100 * float(score) for name, score in zip(("precision", "recall", "f1"), scores, strict=False)}


def entity_counts(gold: Tags, predicted: Tags) -> list[Counts]:
    """(right, predicted, gold) entities of each sentence, from which `entity_scores` of any sample of them follow."""
    from seqeval.metrics.sequence_labeling import get_entities

    counts = []
    for pair in zip(gold, predicted, strict=True):
        right, guessed = (set(get_entities(list(tags))) for tags in pair)
        counts.append((float(len(right & guessed)), float(len(guessed)), float(len(right))))
    return counts


def runs(sentences: Tags) -> Tags:
    """Part-of-speech tags as entities, one for each run of equal tags: so seqeval scores them, as XTREME reports.

    One difference: seqeval takes bare SCONJ and SYM for one-word entities (S), and loses X at a sentence's end.
    """
    return [[f"I-{tag}" for tag in tags] for tags in sentences]


def tag_accuracy(gold: Tags, predicted: Tags) -> float:
    """Percentage of words with the right tag."""
    pairs = [pair for sentence in zip(gold, predicted, strict=True) for pair in zip(*sentence, strict=True)]
    return 100 * sum(a == b for a, b in pairs) / len(pairs)


def entity_report(gold: Tags, predicted: Tags) -> str:
    """Precision, recall and F1 of every type of entity, as a Markdown table."""
    from seqeval.metrics import classification_report

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report: Any = classification_report(
            [list(tags) for tags in gold], [list(tags) for tags in predicted], output_dict=True, zero_division=0
        )
    lines = ["| type | precision | recall | F1 | entities |", "|---|---|---|---|---|"]
    for kind, facts in report.items():
        if kind not in ("macro avg", "weighted avg"):
            numbers = " | ".join(f"{100 * facts[key]:.1f}" for key in ("precision", "recall", "f1-score"))
            lines.append(f"| {_cell(kind.removesuffix(' avg'))} | {numbers} | {int(facts['support'])} |")
    return "\n".join(lines) + "\n"


def confusion(gold: Tags, predicted: Tags, name: Callable[[str], str]) -> str:
    """Confusion matrix over words, as a Markdown table: gold classes in rows, predicted ones in columns.

    name: the class that a tag counts under.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for sentence in zip(gold, predicted, strict=True):
        counts.update((name(right), name(guess)) for right, guess in zip(*sentence, strict=True))
    classes = sorted({name for pair in counts for name in pair})
    lines = [f"| gold \\ predicted | {' | '.join(map(_cell, classes))} |", "|---" * (len(classes) + 1) + "|"]
    for row in classes:
        lines.append(f"| {_cell(row)} | {' | '.join(str(counts[row, column]) for column in classes)} |")
    return "\n".join(lines) + "\n"


def _cell(name: str) -> str:
    """A label as the cell of a Markdown table."""
    return name.replace("|", "\\|")


# --- answers ---------------------------------------------------------------------------------------------------------
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """SQuAD's normal form: lower case, without ASCII punctuation, English articles and extra spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def normalised_answers(answers: Sequence[str]) -> list[str]:
    """The normalised answers that are not empty ("the" becomes empty), or else one empty answer: the rule of SQuAD 2.0."""
    return [normal for answer in answers if (normal := normalise_answer(answer))] or [""]


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers after normalisation, else 0."""
    return float(normalise_answer(prediction) in normalised_answers(answers))


def answer_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best word overlap (F1, 0 to 1) with any of the answers; it is 1 if both sides are empty and 0 if one is."""
    words = normalise_answer(prediction).split()
    return max(_overlap(words, answer.split()) for answer in normalised_answers(answers))


def _overlap(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer))


# --- texts -----------------------------------------------------------------------------------------------------------
def voted(train: Sequence[tuple[str, str]], texts: Sequence[str]) -> list[str]:
    """The label for which the words of each text vote; train: (text, label) pairs.

    A word's votes, one in all, go to the labels that it had in `train`. Where no word is known, the commonest label wins.
    """
    votes: dict[str, Counter[str]] = {}
    for text, label in train:
        for word in text.split():
            votes.setdefault(word, Counter())[label] += 1
    shares = {word: {label: n / counts.total() for label, n in counts.items()} for word, counts in votes.items()}
    labels = [label for label, _ in Counter(label for _, label in train).most_common()]

    def support(text: str, label: str) -> float:
        return sum(shares[word].get(label, 0.0) for word in text.split() if word in shares)

    return [max(labels, key=lambda label: support(text, label)) for text in texts]


# --- uncertainty -----------------------------------------------------------------------------------------------------
def wilson(right: float, total: int) -> tuple[float, float]:
    """95% interval in percent of a share of `right` out of `total` (Wilson, 1927).

    scipy's interval takes whole numbers only, but here `right` is a mean over seeds.
    """
    z = 1.959964  # the normal distribution's 97.5% point
    share, spread = right / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def mean_std(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation; the latter is 0 for a single value."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def rank_correlation(x: Any, y: Any) -> np.ndarray:
    """(...) Spearman correlations of x (n,) with each row of y (..., n); NaN where either is constant.

    Many rows at once are what a bootstrap needs; scipy's `spearmanr` takes milliseconds for each.
    """
    from scipy.stats import rankdata  # it takes seconds to load, and few need it

    a, b = (rankdata(side, axis=-1) - (len(x) + 1) / 2 for side in (x, y))
    size = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), size, where=size > 0, out=np.full_like(size, np.nan))


def transfer_correlation(
    closeness: dict[str, float], scores: dict[str, Sequence[float]], resamples: int = 2000
) -> dict[str, float]:
    """Rank correlation of score with closeness over (language, seed), and its 95% bootstrap interval over seeds.

    closeness: by language. scores: by language one a seed, in the same order of seeds for every language.
    """
    languages = sorted(scores)
    table = np.array([scores[language] for language in languages])  # (languages, seeds)
    seeds = table.shape[1]
    draw = np.random.default_rng(0)
    drawn = [draw.integers(seeds, size=seeds) for _ in range(resamples if seeds > 1 else 0)]
    samples = np.moveaxis(table[:, np.array([np.arange(seeds), *drawn])], 1, 0)  # (1 + resamples, languages, seeds)
    near = np.repeat([closeness[language] for language in languages], seeds)
    rho, *resampled = rank_correlation(near, samples.reshape(len(samples), -1)).tolist()
    known = [value for value in resampled if not math.isnan(value)]
    low, high = np.quantile(known, [0.025, 0.975]) if known else (math.nan, math.nan)
    return {"rho": rho, "low": float(low), "high": float(high)}
