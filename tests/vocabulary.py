"""Vocabularies learned from a handful of sentences."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mlinterf_ds.data.prepare.vocabulary import sampled_units, trained
from mlinterf_ds.data.tokenizer import Tokenizer, normalise
from mlinterf_ds.files import write_bytes


def learned(sentences: Iterable[str], size: int, out: Path) -> Tokenizer:
    """A vocabulary of `size` pieces as a corpus of one language gets it, written to `out`."""
    counts = Counter(word for sentence in sentences for word in normalise(sentence).split())
    units = sampled_units([counts], np.ones(1), np.ones(1), size)
    write_bytes(out, trained(units, size).SerializeToString(deterministic=True))
    return Tokenizer(out)
