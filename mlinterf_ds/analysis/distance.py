"""How far apart two languages are, measured on their training text.

Every distance is symmetric and runs from 0 (a language and itself) to 1. Shared words and letters say nothing about word order:
among the synthetic languages they separate `far` from the others, but not `mid` from `close`, which share as many word forms.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mlinterf_ds.data import synthetic
from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.data.evaluation import piece_counts
from mlinterf_ds.errors import UserError

SENTENCES = 5000  # sentences of each language whose characters are counted
ORDERS = (1, 2, 3)  # lengths of the sequences of characters that are counted


def distances(corpus: Corpus, languages: Sequence[str]) -> dict[str, np.ndarray]:
    """Name -> (languages, languages) distances: by vocabulary, by characters, and planted between synthetic languages."""
    pieces = {code: unigrams(corpus, code) for code in languages}
    grams = {code: ngrams(sentences(corpus, code, SENTENCES)) for code in languages}
    matrices = {
        "vocabulary": _matrix(languages, lambda a, b: vocabulary_distance(pieces[a], pieces[b])),
        "characters": _matrix(languages, lambda a, b: character_distance(grams[a], grams[b])),
    }
    with contextlib.suppress(UserError):  # raised for a language that people speak
        matrices["planted"] = _matrix(languages, synthetic.distance)
    return matrices


def _matrix(languages: Sequence[str], distance: Callable[[str, str], float]) -> np.ndarray:
    matrix = np.zeros((len(languages), len(languages)))
    for row, left in enumerate(languages):
        for column in range(row):
            matrix[row, column] = matrix[column, row] = distance(left, languages[column])
    return matrix


# --- vocabulary ------------------------------------------------------------------------------------------------------
def unigrams(corpus: Corpus, language: str) -> np.ndarray:
    """(vocabulary,) share of each piece in the language's training text, special pieces left out."""
    shares, ordinary = np.zeros(corpus.vocabulary_size), corpus.vocabulary.ordinary
    shares[ordinary] = piece_counts(corpus, language)[ordinary]
    return shares / max(1, shares.sum())


def vocabulary_distance(left: np.ndarray, right: np.ndarray) -> float:
    """1 minus the overlap of two distributions over the shared vocabulary (their total variation)."""
    return float(max(0.0, 1 - np.minimum(left, right).sum()))


# --- characters ------------------------------------------------------------------------------------------------------
def sentences(corpus: Corpus, language: str, most: int) -> list[str]:
    """The first `most` training sentences as the vocabulary spells them."""
    tokens = corpus.tokens(language, "train")
    ends: list[int] = []
    for first in range(0, len(tokens), 1 << 20):
        ends += (first + np.flatnonzero(tokens[first : first + (1 << 20)] == corpus.vocabulary.eos)).tolist()
        if len(ends) >= most:
            break
    starts = [0, *(end + 1 for end in ends)]
    return [corpus.tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends[:most], strict=False)]


def ngrams(texts: Sequence[str]) -> list[Counter[str]]:
    """Counts of the sequences of 1, 2 and 3 characters, spaces included."""
    return [Counter(text[i : i + n] for text in texts for i in range(len(text) - n + 1)) for n in ORDERS]


def jensen_shannon(left: Mapping[str, float], right: Mapping[str, float]) -> float:
    """Jensen-Shannon distance of two distributions given as counts: the square root of the divergence in bits.

    Endres and Schindelin (2003): a metric, at most 1.
    """
    from scipy.spatial.distance import jensenshannon

    keys = sorted(left.keys() | right.keys())  # sorted, because the order of a set changes and with it the round-off
    counts = [[side.get(key, 0) for key in keys] for side in (left, right)]
    return float(np.nan_to_num(jensenshannon(*counts, base=2)))  # NaN where round-off makes the divergence negative


def character_distance(left: Sequence[Mapping[str, float]], right: Sequence[Mapping[str, float]]) -> float:
    """Mean Jensen-Shannon distance over sequences of 1, 2 and 3 characters."""
    return sum(jensen_shannon(a, b) for a, b in zip(left, right, strict=True)) / len(left)
