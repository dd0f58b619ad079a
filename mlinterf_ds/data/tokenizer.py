"""The normalisation of text, and a SentencePiece BPE vocabulary shared by all languages of a corpus."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece

from mlinterf_ds.errors import UserError

BOS, PAD, EOS, UNK, MASK = range(5)  # <s> <pad> </s> <unk> as in XLM-R, then <mask>
MANY_UNKNOWN, TOO_MANY_UNKNOWN = 0.01, 0.2  # a larger unknown share of a text is worth a warning, or no use
SPECIAL_PIECES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

# Control and invisible formatting characters: C0 and C1 controls, soft hyphen, zero-width space, directional marks,
# byte-order mark, lone surrogates, noncharacters. Joiners (U+200C, U+200D) stay: Persian, Hindi and other languages spell
# with them. Whatever `str.split` takes for whitespace stays too, and is folded later.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\ufdd0-\ufdef\ufff9-\ufffb\ufffe\uffff]"
)
# SentencePiece writes a space as this character, so that this character in a text could only be read back as a space.
SPACE_PIECE = "\u2581"


def line_end(start: bytes) -> bytes:
    """Returns what ends the lines of a text that starts so: a newline, or where it has none the commonest of the others."""
    others = [end.encode() for end in ("\r", "\x85", "\u2028", "\u2029")]
    return b"\n" if b"\n" in start else max((b"\n", *others), key=start.count)


def lines_of(text: str) -> list[str]:
    return text.split(line_end(text.encode()).decode())


def strip_invisible(text: str) -> str:
    """Returns `text` in NFC without control characters. Newlines and other whitespace stay: it may be many lines."""
    if text.isascii() and text.isprintable():
        return text
    return unicodedata.normalize("NFC", INVISIBLE.sub("", text)).replace(SPACE_PIECE, " ")


def normalise(text: str) -> str:
    """Returns the text as models see it: NFC, no control characters, each run of whitespace one space. Idempotent."""
    return " ".join(strip_invisible(text).split())


class Tokenizer:
    """Turns text into piece ids and back. Ids: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` 4, then the learned pieces.

    Every text is normalised as in a corpus (`normalise`). No special piece is added.
    """

    def __init__(self, path: str | Path) -> None:
        """Loads a model file. Raises UserError if it is missing, is not a SentencePiece model, or has other special ids."""
        self.path = Path(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.path.read_bytes())
            self.size = len(self._model)
            self.pieces = [self._model.id_to_piece(i) for i in range(self.size)]  # by id
        except OSError as error:
            raise UserError(f"{path}: the tokenizer cannot be read: {error.strerror}") from None
        except (RuntimeError, UnicodeDecodeError):
            raise UserError(f"{path}: not a SentencePiece model, or damaged; prepare the corpus again") from None
        special = self._model.bos_id(), self._model.pad_id(), self._model.eos_id(), self._model.unk_id()
        if self.pieces[:5] != SPECIAL_PIECES or special != (BOS, PAD, EOS, UNK):
            raise UserError(f"{path}: pieces 0 to 4 must be {' '.join(SPECIAL_PIECES)}; prepare the corpus again")
        self.characters = {piece for piece in self.pieces if len(piece) == 1}  # those that no text has unknown
        self.dtype = np.uint16 if self.size < 65_500 else np.int32  # megatron's choice for an indexed dataset

    def encode(self, text: str) -> list[int]:
        return self._model.encode(normalise(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`. Special pieces give no text, except `<unk>`, which gives " \u2047 "."""
        return self._model.decode([int(i) for i in ids])

    def encode_words(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes normalised words: returns all their ids end to end, and how many ids each word has.

        No piece spans a space, so that a sentence's ids are its words' ids end to end: encoding the distinct words of a
        text once is several times as fast as encoding the text.  # ids (pieces,) uint16 or int32, counts (words,) int64
        """
        rows = self._model.encode(list(words), num_threads=1)
        counts = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return np.fromiter(chain.from_iterable(rows), dtype=self.dtype, count=int(counts.sum())), counts
