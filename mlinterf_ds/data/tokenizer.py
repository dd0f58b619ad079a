"""The normalisation of text, and the vocabulary that all languages of a corpus share: a learned one, or another model's."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from pathlib import Path

import numpy as np
import sentencepiece

from mlinterf_ds.errors import UserError, refusing

BOS, PAD, EOS, UNK, MASK = range(5)  # of a learned vocabulary: <s> <pad> </s> <unk> as in XLM-R, then <mask>
MANY_UNKNOWN, TOO_MANY_UNKNOWN = 0.01, 0.2  # a larger unknown share of a text is worth a warning, or no use
SPECIAL_PIECES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

# Control and invisible formatting characters: C0 and C1 controls, soft hyphen, zero-width space, directional marks,
# byte-order mark, lone surrogates, noncharacters. Joiners (U+200C, U+200D) stay: Persian, Hindi and other languages spell
# with them. Whatever `str.split` takes for whitespace stays too, and is folded later.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\ufdd0-\ufdef\ufff9-\ufffb\ufffe\uffff]"
)
# SentencePiece writes a space as this character, so that this character in a text could only be read back as a space.
SPACE_PIECE = "\u2581"
# How files begin that are often taken for text, and what they are.
OTHER_FORMATS = {
    b"\x1f\x8b": "a file compressed with gzip",
    b"BZh": "a file compressed with bzip2",
    b"\xfd7zXZ": "a file compressed with xz",
    b"\x28\xb5\x2f\xfd": "a file compressed with zstd",
    b"]\x00\x00": "a file compressed with lzma",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"PK\x03\x04": "a ZIP archive or an office document",
    b"PAR1": "a Parquet table",
    b"ARROW1": "an Arrow table",
    b"SQLite format 3": "a database of SQLite",
    b"%PDF": "a PDF document",
    b"{\\rtf": "an RTF document",
}


def other_format(start: bytes) -> str:
    """What a file is that starts so, or "" if it may be text."""
    return next((name for magic, name in OTHER_FORMATS.items() if start.startswith(magic)), "")


def line_end(start: bytes) -> bytes:
    """Returns what ends the lines of a text that starts so, beside carriage returns and newlines, which always do: of the
    others that Unicode knows the commonest if the text has no other; else a newline."""
    others = [end.encode() for end in ("\x0b", "\x0c", "\x1e", "\x85", "\u2028", "\u2029")]
    return b"\n" if re.search(rb"[\r\n]", start) else max((b"\n", *others), key=start.count)


def lines_of(text: str) -> list[str]:
    return re.split("\r\n?|" + line_end(text.encode()).decode(), text)


def strip_invisible(text: str) -> str:
    """Returns `text` in NFC without control characters. Newlines and other whitespace stay: it may be many lines."""
    if text.isascii() and text.isprintable():
        return text
    return unicodedata.normalize("NFC", INVISIBLE.sub("", text)).replace(SPACE_PIECE, " ")


def normalise(text: str) -> str:
    """Returns the text as models see it: NFC, no control characters, each run of whitespace one space. Idempotent."""
    return " ".join(strip_invisible(text).split())


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a vocabulary: their number, the special ones, and those of text. The defaults are a learned vocabulary's."""

    size: int
    bos: int = BOS  # begins a row, and stands for a whole text
    pad: int = PAD
    eos: int = EOS  # ends a sentence
    unk: int = UNK
    mask: int = MASK
    others: tuple[int, ...] = ()  # further pieces that no text has
    doubled: bool = False  # whether two `eos` stand between the texts of a pair, as in RoBERTa's kin

    @cached_property
    def ordinary(self) -> np.ndarray:
        """The ids of the pieces that are text, ascending.  # (pieces,) int64"""
        special = [self.bos, self.pad, self.eos, self.unk, self.mask, *self.others]
        return np.setdiff1d(np.arange(self.size), special)

    @property
    def separator(self) -> list[int]:
        """The ids between the two texts of a pair."""
        return [self.eos] * (2 if self.doubled else 1)


class Tokenizer:
    """Turns text into piece ids and back.

    A learned vocabulary begins with `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` 4. The vocabulary of another model
    (`mlinterf_ds.data.foreign`) keeps that model's ids; `vocabulary` says which are special. Texts are normalised as in a
    corpus (`normalise`), or as that model normalises them. No special piece is added.
    """

    def __init__(self, path: str | Path, content: bytes | None = None) -> None:
        """Loads a vocabulary's file, or its content if that is given. Raises UserError if the file is missing, or is not as
        `prepare_corpus.py` writes it."""
        self.path = Path(path)
        try:
            content = self.path.read_bytes() if content is None else content
        except OSError as error:
            raise UserError(f"{path}: the tokenizer cannot be read: {error.strerror}") from None
        self.content = content
        self._model = Library(self.path, content) if content.startswith(b"{") else SentencePiece(self.path, content)
        self.pieces, self.vocabulary = self._model.pieces, self._model.vocabulary
        self.size = self.vocabulary.size
        self.foreign = self._model.foreign  # whether it is another model's
        self.dtype = np.uint16 if self.size < 65_500 else np.int32  # megatron's choice for an indexed dataset

    def unknown_characters(self, words: Sequence[str]) -> list[int]:
        """Returns how many characters of each normalised word the vocabulary lacks."""
        return self._model.unknown_characters(words)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_on(self, text: str) -> list[int]:
        """Returns the ids of a text that stands behind a mask: unless it begins with a space, it goes on a word."""
        return self._model.encode_on(text) if text and not text[0].isspace() else self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`. Special pieces give no text, except an unknown one, which gives " \u2047 " or its name."""
        return self._model.decode([int(i) for i in ids])

    def encode_sentence(self, words: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each word of a sentence, as they are in the words joined by spaces."""
        return self._model.encode_sentence(words)

    def normalised(self, text: str) -> str:
        """Returns the text after normalisation, in which the vocabulary looks for its pieces."""
        return self._model.normalised(text)

    def locate(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of a text, and the characters (start, end) that each stands for."""
        return self._model.locate(text)

    @property
    def by_word(self) -> bool:
        """Whether the ids of a sentence are those of its words, end to end, whatever stands beside them."""
        return self._model.by_word

    def encode_words(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes normalised words or sentences: returns all their ids end to end, and how many ids each has.

        Of vocabularies that work `by_word`, encoding the distinct words of a text once is several times as fast as encoding
        the text.  # ids (pieces,) uint16 or int32, counts (texts,) int64
        """
        rows = self._model.encode_all(texts)
        counts = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        return np.fromiter(chain.from_iterable(rows), dtype=self.dtype, count=int(counts.sum())), counts


class SentencePiece:
    """A SentencePiece model that was learned here."""

    foreign, by_word = False, True  # no piece spans a space

    def __init__(self, path: Path, content: bytes) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocabulary = Vocabulary(len(self._model))
            self.pieces = [self._model.id_to_piece(i) for i in range(self.vocabulary.size)]  # by id
        except (RuntimeError, UnicodeDecodeError):
            raise UserError(f"{path}: not a SentencePiece model, or damaged; prepare the corpus again") from None
        special = self._model.bos_id(), self._model.pad_id(), self._model.eos_id(), self._model.unk_id()
        if self.pieces[:5] != SPECIAL_PIECES or special != (BOS, PAD, EOS, UNK):
            raise UserError(
                f"{path}: pieces 0 to 4 must be {' '.join(SPECIAL_PIECES)}; prepare the corpus again, with the whole folder of "
                "another model as its --tokenizer"
            )

    @cached_property
    def _known(self) -> dict[int, None]:
        """The characters that are never `<unk>`, as `str.translate` removes them."""
        return dict.fromkeys(ord(piece) for piece in self.pieces if len(piece) == 1)

    def unknown_characters(self, words: Sequence[str]) -> list[int]:
        return [len(word.translate(self._known)) for word in words]

    def encode(self, text: str) -> list[int]:
        return self._model.encode(normalise(text))

    def encode_on(self, text: str) -> list[int]:
        return self._inside.encode(normalise(text))

    @cached_property
    def _inside(self) -> sentencepiece.SentencePieceProcessor:
        """The model without the space that it puts before a text."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        model = ModelProto.FromString(self._model.serialized_model_proto())
        model.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def encode_sentence(self, words: Sequence[str]) -> list[list[int]]:
        return [self.encode(word) for word in words]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), num_threads=1)

    def normalised(self, text: str) -> str:
        return normalise(text)

    def locate(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The offsets count in the text as it is given: a piece also stands for the invisible characters between its own."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for match in re.finditer(r"\S+", text):
            word, start = match.group(), match.start()
            normal = normalise(word)
            of_word = self._model.encode(normal)
            if " " in normal:  # the text has the character that stands for a space
                offsets += [(start, match.end())] * len(of_word)
            else:
                bounds = _origins(word, normal)
                for low, high in self._within(normal, of_word):  # a piece that is a space alone has no character
                    end = bounds[high - 1][1] if high > low else bounds[low][0]
                    offsets.append((start + bounds[low][0], start + end))
            ids += of_word
        return ids, offsets

    def _within(self, word: str, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Where the pieces of a word lie in it. `<unk>` stands for characters that no piece has, up to the next piece."""
        offsets: list[tuple[int, int]] = []
        start = 0
        texts = [None if i == UNK else self.pieces[i].removeprefix(SPACE_PIECE) for i in ids]
        for index, text in enumerate(texts):
            if text is None:
                following = next((t for t in texts[index + 1 :] if t), None)
                end = word.find(following, start + 1) if following else len(word)
            else:
                end = start + len(text)
            offsets.append((start, end))
            start = end
        assert start == len(word), f"{word!r}: pieces {texts} do not spell it"
        return offsets


def _origins(word: str, normal: str) -> list[tuple[int, int]]:
    """The characters of `word` (from, to) that each character of the normalised word comes from. Both are compared decomposed,
    in which the composed and the original spelling are the same letters."""
    if word == normal:
        return [(index, index + 1) for index in range(len(word))]
    visible = [(n, letter) for n, letter in enumerate(word) if not INVISIBLE.match(letter) and letter != SPACE_PIECE]
    origin = [n for n, letter in visible for _ in unicodedata.normalize("NFD", letter)]
    ends = accumulate(len(unicodedata.normalize("NFD", letter)) for letter in normal)
    return [(min(origin[first:end]), max(origin[first:end]) + 1) for first, end in pairwise([0, *ends])]


class Library:
    """A tokenizer of the library `tokenizers` (WordPiece, byte-level BPE, unigram): another model's."""

    foreign = True

    def __init__(self, path: Path, content: bytes) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # many processes prepare a corpus already
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{path}: reading it needs the package tokenizers: pip install 'mlinterf_ds[hf]'") from None
        with refusing(f"{path}: not a vocabulary, or damaged", "; prepare the corpus again"):
            stored = json.loads(content)
            try:
                self._model = tokenizers.Tokenizer.from_str(json.dumps(stored["tokenizer"]))
            except Exception as error:  # the library raises no other class
                raise ValueError(str(error)) from None
            self.pieces = by_id(self._model.get_vocab())
            special = stored["vocabulary"] | {"others": tuple(stored["vocabulary"]["others"])}
            self.vocabulary = Vocabulary(len(self.pieces), **special)
        # These split text into words before pieces are looked for; a Metaspace alone reads a text's first word differently.
        before = stored["tokenizer"]["pre_tokenizer"] or {"type": ""}
        kinds = [part["type"] for part in before.get("pretokenizers", [before])]
        self.by_word = kinds[0] in ("BertPreTokenizer", "WhitespaceSplit") and "ByteLevel" not in kinds
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # "</s>" in a text ends no sentence
        v = self.vocabulary
        self._special = {v.bos, v.pad, v.eos, v.mask, *v.others}

    @cached_property
    def _known(self) -> set[str]:
        """Characters that are never `<unk>`: of those up to U+2FFF, and of those that were asked for since."""
        return self._without_unk(list(map(chr, range(0x20, 0x3000))))

    def _without_unk(self, texts: Sequence[str]) -> set[str]:
        """Those of the texts that are encoded without `<unk>`."""
        return {t for t, ids in zip(texts, self.encode_all(texts), strict=True) if self.vocabulary.unk not in ids}

    def unknown_characters(self, words: Sequence[str]) -> list[int]:
        """A character alone can be `<unk>` where it is a piece inside of words only: words without `<unk>` lack none."""
        asked = {character for word in words for character in word} - self._known
        self._known.update(self._without_unk(sorted(asked)))
        doubtful = [word for word in words if not self._known.issuperset(word)]
        whole = self._without_unk(doubtful)
        lacking = {word: sum(character not in self._known for character in word) for word in doubtful}
        return [0 if word in whole else lacking.get(word, 0) for word in words]

    def _text_ids(self, ids: list[int]) -> list[int]:
        """The ids with `unk` in place of special ones, which a text can spell where the vocabulary lists them as pieces."""
        return (
            [self.vocabulary.unk if i in self._special else i for i in ids] if self._special.intersection(ids) else ids
        )

    def encode(self, text: str) -> list[int]:
        return self._text_ids(self._model.encode(_readable(text), add_special_tokens=False).ids)

    def encode_on(self, text: str) -> list[int]:
        return self.encode(text)  # as that model's own tokenizer does

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if i not in self._special], skip_special_tokens=False)

    def encode_sentence(self, words: Sequence[str]) -> list[list[int]]:
        ids, offsets = self.locate(" ".join(words))
        ends = np.cumsum([len(word) + 1 for word in words])
        rows: list[list[int]] = [[] for _ in words]
        for piece, (_, end) in zip(ids, offsets, strict=True):
            rows[int(np.searchsorted(ends, end - 1, side="right"))].append(piece)
        return rows

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._model.encode_batch_fast([_readable(text) for text in texts], add_special_tokens=False)
        return [self._text_ids(row.ids) for row in encoded]

    def normalised(self, text: str) -> str:
        return self._model.normalizer.normalize_str(text) if self._model.normalizer else text

    def locate(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self._model.encode(_readable(text), add_special_tokens=False)
        return self._text_ids(encoded.ids), [_trimmed(text, *offset) for offset in encoded.offsets]


def by_id(ids: Mapping[str, int]) -> list[str]:
    """The pieces of a vocabulary in the order of their ids. Raises ValueError unless these are 0, 1, 2, ..."""
    pieces = sorted(ids, key=ids.__getitem__)
    if [ids[piece] for piece in pieces] != list(range(len(pieces))):
        raise ValueError("its ids are not 0, 1, 2, ...")
    return pieces


def _readable(text: str) -> str:
    """The text without lone surrogates, which no file can hold and no other program reads."""
    return text if text.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", text)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The stretch without the white space at its beginning, but never empty."""
    while start + 1 < end and text[start].isspace():
        start += 1
    return start, max(end, start + 1)
