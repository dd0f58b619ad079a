"""What a sentence looks like once it is clean. Used on corpora, and on everything a tokenizer is later given."""

import re
import unicodedata
from hashlib import blake2b

import numpy as np

# Control and invisible formatting characters that carry no letter: C0 and C1 controls, soft hyphen, zero-width space,
# directional marks, byte-order mark, lone surrogates, noncharacters. Joiners (U+200C, U+200D) stay: Persian, Hindi and
# others spell with them. Characters that `str.split` takes for whitespace are left to be folded.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\ufdd0-\ufdef\ufff9-\ufffb\ufffe\uffff]"
)
# SentencePiece writes a space as this character, so that a literal one reads back as a space whatever is done.
SPACE_PIECE = "\u2581"


def strip_invisible(text: str) -> str:
    """`text` without control characters, in NFC. Newlines and other whitespace stay; may hold many lines at once."""
    if text.isascii() and text.isprintable():
        return text
    return unicodedata.normalize("NFC", INVISIBLE.sub("", text)).replace(SPACE_PIECE, " ")


def normalise(text: str) -> str:
    """The sentence every model sees: NFC, control characters removed, each run of whitespace one space. Idempotent."""
    return " ".join(strip_invisible(text).split())


def hashes(texts: list[str]) -> np.ndarray:
    """A 64-bit hash of each text, the same on every machine and in every process.  # (texts,) uint64

    Two different lines share one with probability 2^-64: among 40 million lines, one false duplicate is expected in
    23,000 corpora.
    """
    digests = b"".join([blake2b(text.encode(), digest_size=8).digest() for text in texts])
    return np.frombuffer(digests, dtype="<u8")
