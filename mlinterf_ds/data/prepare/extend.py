"""A vocabulary that extends another: its pieces keep their ids, new ones follow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from mlinterf_ds.data.tokenizer import Tokenizer
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_bytes


def extend(old: Tokenizer, counts: Mapping[str, int], size: int, out: Path) -> Tokenizer:
    """`old` and after it the pieces learned from words (and how often each occurs) that it lacks, `size` in all: their
    characters, then what joins them.

    SentencePiece joins first what scores best, and scores fall with the ids: text is cut by the old pieces as before, and
    what is left joined further by the new ones. So old text may be cut differently where a new piece spans several old
    ones. UserError if `size` is not larger than the old vocabulary, by all new characters, or larger than the text allows.
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
    # SentencePiece lists single characters last: cut off, their words would be unknown
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
    """The pieces of a vocabulary learned from these words alone, the best first; fewer than `size` if they allow no more."""
    temporary = out.with_name(out.name + ".new")
    try:
        try:
            return Tokenizer.learn_from_counts(counts, size, temporary).pieces
        except UserError as error:
            if not (most := re.search(r"at most (\d+)", str(error))):
                raise
            return Tokenizer.learn_from_counts(counts, int(most[1]), temporary).pieces
    finally:
        temporary.unlink(missing_ok=True)
