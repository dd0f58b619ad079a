"""Normalisation of text: applied to corpora, and to every text that a tokenizer later reads."""

import re
import unicodedata
from hashlib import blake2b

import numpy as np

# Control and invisible formatting characters: C0 and C1 controls, soft hyphen, zero-width space, directional marks,
# byte-order mark, lone surrogates, noncharacters. Joiners (U+200C, U+200D) stay: Persian, Hindi and other languages spell
# with them. Whatever `str.split` takes for whitespace stays too, and is folded later.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\ufdd0-\ufdef\ufff9-\ufffb\ufffe\uffff]"
)
# SentencePiece writes a space as this character, so that this character in a text could only be read back as a space.
SPACE_PIECE = "\u2581"


def strip_invisible(text: str) -> str:
    """Returns `text` in NFC without control characters. Newlines and other whitespace stay: it may be many lines."""
    if text.isascii() and text.isprintable():
        return text
    return unicodedata.normalize("NFC", INVISIBLE.sub("", text)).replace(SPACE_PIECE, " ")


def normalise(text: str) -> str:
    """Returns the text as models see it: NFC, no control characters, each run of whitespace one space. Idempotent."""
    return " ".join(strip_invisible(text).split())


def hashes(texts: list[str]) -> np.ndarray:
    """Returns a 64-bit hash of each text, the same on every machine and in every process.  # (texts,) uint64

    Two different texts have the same hash with probability 2^-64: of 23,000 corpora of 40 million lines each, one is
    expected to lose a line that is no duplicate.
    """
    digests = b"".join([blake2b(text.encode(), digest_size=8).digest() for text in texts])
    return np.frombuffer(digests, dtype="<u8")
