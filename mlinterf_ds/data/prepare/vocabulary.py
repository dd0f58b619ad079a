"""The vocabulary that a corpus's languages share: learned on their training splits, or extending another corpus's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from mlinterf_ds.data.prepare.blocks import BlockTask, count_words
from mlinterf_ds.data.prepare.stages import Language, bar
from mlinterf_ds.data.prepare.workers import Workers
from mlinterf_ds.data.tokenizer import Tokenizer, distinct_characters
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_bytes

# The vocabulary is learned from this many characters of running text for each character of distinct words it uses.
SAMPLE_RATIO = 20


def learn(
    languages: list[Language],
    size: int,
    temperature: float,
    out: Path,
    workers: Workers,
    show: bool,
    extends: Tokenizer | None = None,
) -> Tokenizer:
    """Learns the shared vocabulary on the training splits; if it `extends` another vocabulary, learns only the pieces that are
    missing there.

    A language's words weigh as much as its share of all sentences to the power 1 / temperature, normalised. Of a large
    language only a part is read; a small one counts several times.
    """
    shares = np.array([language.sentences["train"] for language in languages], dtype=np.float64)
    shares = (shares / shares.sum()) ** (1 / temperature)
    shares /= shares.sum()
    tasks: list[BlockTask] = []
    for language, share in zip(languages, shares, strict=True):
        characters = sum(block["characters"] for block in language.blocks)
        characters *= language.sentences["train"] / language.starts[-1]
        fraction = min(1.0, float(share) * (SAMPLE_RATIO * distinct_characters(size)) / characters)
        tasks += [replace(task, fraction=fraction) for task in language.tasks()]
    counts = {language.folder: Counter[str]() for language in languages}
    sampled = dict.fromkeys(counts, 0)
    results = bar(workers.map(count_words, tasks), "count words", len(tasks), show)
    for task, (words, sentences) in zip(tasks, results, strict=True):
        counts[task.folder].update(words)
        sampled[task.folder] += sentences
    weights = shares / np.maximum(1, [sampled[language.folder] for language in languages])
    weights /= weights.min()
    total = Counter[str]()
    for language, weight in zip(languages, weights, strict=True):
        words = counts.pop(language.folder)
        total.update(words if weight == 1 else {word: round(count * float(weight)) for word, count in words.items()})
    return extend(extends, total, size, out) if extends else Tokenizer.learn_from_counts(total, size, out)


def extend(old: Tokenizer, counts: Mapping[str, int], size: int, out: Path) -> Tokenizer:
    """Writes a vocabulary of `size` pieces to `out`: those of `old`, ids and all, and then new ones learned from words.

    New pieces are the characters that `old` lacks, then what joins them; `counts` says how often each word occurs.
    SentencePiece joins first what scores best, and scores fall with the ids: text is cut by the old pieces as before, and
    then joined further by the new ones. So old text may be cut differently where a new piece spans several old ones.
    Raises UserError unless `size` has room for all new characters and the text has enough new pieces.
    """
    if size <= old.size:
        raise UserError(f"--vocab-size {size}: must be more than the {old.size} pieces of {old.path}")
    known = set(old.pieces)
    pieces = [piece for piece in _learned(counts, size, out) if piece not in known]
    if old.size + len(pieces) < size:
        raise UserError(
            f"--vocab-size {size}: the new text has {len(pieces)} pieces that {old.path} lacks; ask for "
            f"{old.size + len(pieces)} or fewer, or give more text"
        )
    # SentencePiece lists single characters last; if they were cut off, words with them would be unknown.
    pieces.sort(key=lambda piece: len(piece) > 1)
    if (characters := sum(len(piece) == 1 for piece in pieces)) > size - old.size:
        raise UserError(
            f"--vocab-size {size}: the new text has {characters} characters that {old.path} lacks; ask for "
            f"{old.size + characters} or more"
        )
    model = ModelProto.FromString(old.path.read_bytes())
    score = min(piece.score for piece in model.pieces)
    for number, piece in enumerate(pieces[: size - old.size], 1):
        model.pieces.add(piece=piece, score=score - number)
    model.trainer_spec.vocab_size = size
    write_bytes(out, model.SerializeToString(deterministic=True))
    return Tokenizer(out)


def _learned(counts: Mapping[str, int], size: int, out: Path) -> list[str]:
    """Returns the pieces of a vocabulary learned from these words alone, the best first: `size`, or as many as they allow."""
    temporary = out.with_name(out.name + ".new")
    try:
        try:
            return Tokenizer.learn_from_counts(counts, size, temporary).pieces
        except UserError as error:
            if not (largest := re.search(r"at most (\d+)", str(error))):
                raise
            return Tokenizer.learn_from_counts(counts, int(largest[1]), temporary).pieces
    finally:
        temporary.unlink(missing_ok=True)
