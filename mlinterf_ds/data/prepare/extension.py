"""Pieces of new scripts behind those of another model's vocabulary, in each kind of model of the library `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mlinterf_ds.data.tokenizer import SPACE_PIECE, Tokenizer
from mlinterf_ds.errors import UserError

# Pieces as SentencePiece spells them and their log probabilities, single characters first.
Pieces = Sequence[tuple[str, float]]


def appended(old: Tokenizer, learned: Pieces, size: int) -> bytes:
    """The file of a vocabulary of `size` pieces: those of `old`, ids and all, and then learned ones.

    Raises UserError if `learned` has too few, if there is no room for its single characters, or if `old` is of a kind to which
    nothing can be appended.
    """
    stored = json.loads(old.content)
    library: dict[str, Any] = stored["tokenizer"]
    kind = library["model"]["type"]
    if kind not in ("Unigram", "WordPiece"):
        raise UserError(f"--extend {old.path}: nothing can be appended to a vocabulary of type {kind}: use --tokenizer")
    if kind == "WordPiece":
        learned = _as_words(learned, library["model"]["continuing_subword_prefix"])
    known = set(old.pieces)
    learned = [piece for piece in learned if piece[0] not in known]
    wanted, single = size - old.size, sum(len(piece.removeprefix("##")) == 1 for piece, _ in learned)
    if len(learned) < wanted or single > wanted:
        problem, amount = (
            ("", "fewer") if len(learned) < wanted else (f", {single} of them for single characters", "more")
        )
        limit = old.size + (len(learned) if amount == "fewer" else single)
        raise UserError(
            f"--vocab-size {size}: the new text has {len(learned)} pieces that {old.path} lacks{problem}; ask for {limit} or {amount}"
        )
    _append(library, old.pieces, learned[:wanted])
    return json.dumps(stored, ensure_ascii=False).encode()


def _as_words(learned: Pieces, prefix: str) -> list[tuple[str, float]]:
    """The pieces as WordPiece spells them: those inside a word with `prefix`, and single characters both ways."""
    both = [(form, score) for piece, score in learned if len(piece) == 1 for form in (piece, prefix + piece)]
    longer = [
        (piece[1:] if piece.startswith(SPACE_PIECE) else prefix + piece, score)
        for piece, score in learned
        if len(piece) > 1
    ]
    return [*both, *(piece for piece in longer if piece not in both)]


def _append(tokenizer: dict[str, Any], pieces: Sequence[str], new: Pieces) -> None:
    """Appends new pieces to a tokenizer.json, after entering the pieces that it lists only as added ones at their ids."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary |= {piece: number for number, piece in enumerate([*pieces, *(piece for piece, _ in new)])}
    else:
        vocabulary += [[piece, 0.0] for piece in pieces[len(vocabulary) :]] + [[piece, score] for piece, score in new]
