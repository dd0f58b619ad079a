"""Contexts as pieces: the windows that rows read, and the best span of a window."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mlinterf_ds.data.tokenizer import Vocabulary
from mlinterf_ds.errors import UserError
from mlinterf_ds.tasks.base import Limits, Row

FEWEST_PIECES = 8  # pieces of context that a window must have room for

Offsets = list[tuple[int, int]]  # (start, end) of each piece in the context, in characters


def cover(offsets: Offsets, answer: tuple[str, int]) -> tuple[int, int] | None:
    """(first, last) piece of the smallest span that covers the answer (text, start); None if it has no piece."""
    text, start = answer
    inside = [k for k, (low, high) in enumerate(offsets) if high > start and low < start + len(text)]
    return (inside[0], inside[-1]) if inside else None


def windows(
    example: int,
    question: list[int],
    ids: list[int],
    offsets: Offsets,
    span: tuple[int, int] | None,
    limits: Limits,
    special: Vocabulary,
) -> Iterator[Row]:
    """Rows `<s> question </s> part of the context </s>`; their targets are the span where a window holds it whole.

    UserError if the question leaves too little room for the context.
    """
    start = [special.bos, *question, *special.separator]
    room = limits.max_length - len(start) - 1
    if room < FEWEST_PIECES:
        raise UserError(
            f"finetune.max_length={limits.max_length} leaves {room} pieces of context beside a question of "
            f"{len(question)}: lower finetune.max_question or raise finetune.max_length"
        )
    first = 0
    while True:
        end = min(first + room, len(ids))
        tokens = [*start, *ids[first:end], special.eos]
        shift = len(start) - first
        positions = [0, *range(first + shift, end + shift)]
        targets = [0, 0]
        if span and first <= span[0] and span[1] < end:
            targets = [span[0] - first + 1, span[1] - first + 1]
        yield Row(example, tokens, positions, targets, offsets[first:end])
        if end == len(ids):
            return
        first += min(limits.stride, room)


def span_scores(start: np.ndarray, end: np.ndarray, longest: int) -> np.ndarray:
    """The scores of all spans of at most `longest` pieces, in no useful order; start, end: scores (pieces,)."""
    return np.concatenate([start[: len(start) - more] + end[more:] for more in range(min(longest, len(start)))])


def best_span(start: np.ndarray, end: np.ndarray, longest: int) -> tuple[float, int, int]:
    """(score, first, last) of the best span of at most `longest` pieces; start, end: scores (pieces,)."""
    best = (-np.inf, 0, 0)
    for more in range(min(longest, len(start))):
        sums = start[: len(start) - more] + end[more:]
        first = int(sums.argmax())
        if sums[first] > best[0]:
            best = (float(sums[first]), first, first + more)
    return best
