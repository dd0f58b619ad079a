"""The shared vocabulary: special ids, exactness of word-by-word encoding, sizes that the text doesn't allow."""

import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mlinterf_ds.data.prepare.cleaning import hashes
from mlinterf_ds.data.tokenizer import BOS, EOS, MASK, PAD, UNK, Tokenizer, normalise
from mlinterf_ds.errors import UserError
from tests.vocabulary import learned

SYLLABLES = ["ba", "ko", "mi", "tu", "la", "ne", "да", "ли", "मे", "की", "सा", "的", "是"]


def some_text(sentences: int = 400, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(200)]
    return [" ".join(draw.choices(words, k=draw.randint(2, 9))) for _ in range(sentences)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return learned(some_text(), 120, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def test_special_pieces_have_the_ids_of_xlm_r(tokenizer: Tokenizer) -> None:
    assert (BOS, PAD, EOS, UNK, MASK) == (0, 1, 2, 3, 4)
    assert tokenizer.pieces[:5] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tokenizer.size == len(tokenizer.pieces) == 120


def test_special_pieces_in_a_text_are_plain_text(tokenizer: Tokenizer) -> None:
    assert not {BOS, PAD, EOS, MASK} & set(tokenizer.encode("<s> ba <mask> ko </s> <pad>"))


def test_decode_gives_the_text_back(tokenizer: Tokenizer) -> None:
    for sentence in some_text(20, seed=1):
        assert tokenizer.decode(tokenizer.encode(sentence)) == sentence


def test_an_unseen_character_is_unknown_and_bytes_are_not_used(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("☃☃").count(UNK) >= 1
    assert not any(piece.startswith("<0x") for piece in tokenizer.pieces)


@cache
def plain_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_words_encoded_one_by_one_are_the_sentence(tokenizer: Tokenizer, text: str) -> None:
    sentence = normalise(text)
    words = sentence.split(" ") if sentence else []
    ids, counts = tokenizer.encode_words(words)
    reference = plain_sentencepiece(tokenizer.path).encode(sentence)
    assert ids.tolist() == reference == tokenizer.encode(text)
    assert counts.sum() == len(ids) and len(counts) == len(words)


def test_words_of_real_text_encoded_one_by_one_are_the_sentence(tmp_path: Path, shared_data: Path) -> None:
    for language in ("th", "ko", "hi"):
        lines = (shared_data / "text" / f"{language}.txt").read_text().split("\n")[:500]
        sentences = [normalise(line) for line in lines if line]
        tokenizer = learned(sentences, 1000, tmp_path / f"{language}.model")
        for sentence in sentences:
            assert tokenizer.encode_words(sentence.split(" "))[0].tolist() == tokenizer.encode(sentence)


def test_learning_depends_on_the_sentences_alone(tmp_path: Path) -> None:
    text = some_text()
    models = [learned(text, 120, tmp_path / "a"), learned(reversed(text), 120, tmp_path / "b")]
    assert models[0].path.read_bytes() == models[1].path.read_bytes()


def test_pieces_equal_those_that_sentencepiece_learns_from_the_sentences(tmp_path: Path) -> None:
    text = some_text()
    prefix = str(tmp_path / "plain")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=prefix,
        model_type="bpe",
        vocab_size=120,
        character_coverage=0.99995,
        normalization_rule_name="identity",
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        control_symbols=["<mask>"],
        minloglevel=2,
    )
    plain = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    expected = [plain.id_to_piece(i) for i in range(120)]
    assert learned(text, 120, tmp_path / "ours").pieces == expected


def test_too_large_a_vocabulary_names_the_largest_which_then_works(tmp_path: Path) -> None:
    text = some_text(60)
    with pytest.raises(UserError, match=r"vocabulary size 50000: larger than the text allows, at most (\d+)") as caught:
        learned(text, 50_000, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert learned(text, largest, tmp_path / "model").size == largest
    with pytest.raises(UserError, match=f"at most {largest} "):
        learned(text, largest + 1, tmp_path / "model")


@pytest.mark.parametrize("size", [-1, 0, 5, 8])
def test_too_small_a_vocabulary_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(UserError, match=f"vocabulary size {size}: .*special pieces"):
        learned(some_text(60), size, tmp_path / "model")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer(tmp_path / "missing.model")
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "junk.model")


def test_ids_are_16_bit_while_they_fit(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_words(["ba"])[0].dtype == np.uint16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a \t b\u00a0c\u2003d\r\n", "a b c d"),
        ("e\u0301", "\u00e9"),
        ("a\u200bb\ufeff\u00adc\x07", "abc"),
        ("e\u200b\u0301", "\u00e9"),  # what is removed doesn't keep letters from composing
        ("می\u200cخواهم", "می\u200cخواهم"),  # the joiner is spelling
        ("a\u2581b", "a b"),
        ("\ud800x", "x"),
        ("\x00\x01", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(st.text())
def test_normalise_is_idempotent(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


def test_hashes_are_the_same_in_every_process() -> None:
    assert hashes(["a", "é", ""]).tolist() == [3405396810240292928, 3394012004367669963, 13020603013274838756]
    assert len(set(hashes(["a", "b", "é", ""]).tolist())) == 4
