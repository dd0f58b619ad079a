"""The exported tokenizer against SentencePiece's own ids: any text, real text of many scripts, special pieces."""

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlinterf_ds.data.tokenizer import SPECIAL_PIECES, Tokenizer
from mlinterf_ds.errors import UserError
from mlinterf_ds.evaluate import masked_ids
from mlinterf_ds.export import tokenizer as exported
from mlinterf_ds.export.folder import stored_pieces
from tests.unit.test_tokenizer import some_text
from tests.vocabulary import learned

transformers = pytest.importorskip("transformers")


def both(text: list[str], size: int, folder: Path) -> tuple[Tokenizer, Any]:
    """A vocabulary learnt from text: ours, and what transformers loads of it."""
    ours = learned(text, size, folder / "sentencepiece.model")
    exported.write(ours, folder, 64)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    return both([*some_text(), "aa aaa ab aba bab abab"] * 3, 160, tmp_path_factory.mktemp("tokenizer"))


def plain(theirs: Any, text: str) -> list[int]:
    return theirs(text, add_special_tokens=False)["input_ids"]


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=40))
def test_ids_of_any_text(pair: tuple[Tokenizer, Any], text: str) -> None:
    assume(not any(piece in text for piece in SPECIAL_PIECES))
    assert plain(pair[1], text) == pair[0].encode(text)


@settings(deadline=None, max_examples=300)
@given(st.text(st.sampled_from("ababab  ko\u0301да☃\u200b\u200d\t\x85\x1f\u3000\u2581"), max_size=40))
def test_ids_of_spaces_marks_and_repeated_letters(pair: tuple[Tokenizer, Any], text: str) -> None:
    assert plain(pair[1], text) == pair[0].encode(text)


def test_ids_of_real_text_in_many_scripts(tmp_path: Path, shared_data: Path) -> None:
    text = {path.stem: path.read_text().split("\n") for path in sorted((shared_data / "text").glob("*.txt"))}
    ours, theirs = both([line for lines in text.values() for line in lines[:100]], 6000, tmp_path)
    draw = random.Random(0)
    for language, lines in text.items():
        for line in draw.sample(lines, 60):
            assert plain(theirs, line) == ours.encode(line), language


def test_special_pieces_rows_and_the_way_back(pair: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    ours, theirs = pair
    assert [theirs.bos_token_id, theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id] == [0, 1, 2, 3]
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id) == (0, 2, 4)
    assert len(theirs) == ours.size and theirs.model_max_length == 64
    assert theirs.convert_ids_to_tokens(list(range(ours.size))) == ours.pieces
    first, second = ours.encode("ba ko"), ours.encode("mi")
    assert theirs("ba ko", "mi")["input_ids"] == [0, *first, 2, *second, 2]
    padded = theirs(["ba ko", "mi"], padding=True)
    assert padded["input_ids"][1] == [0, *second, 2] + [1] * (len(first) - len(second)) and len(padded) == 2
    assert theirs.decode(theirs("ba ko mi")["input_ids"], skip_special_tokens=True) == "ba ko mi"
    theirs.save_pretrained(tmp_path)
    assert stored_pieces(tmp_path) == ours.pieces


@pytest.mark.parametrize(
    "text, words",
    [
        (" ba  <mask>ko<mask>", 1),
        ("<mask> ko", 1),
        ("\u200fba<mask>.", 1),
        ("<mask><mask>ko ba <mask>", 1),
        ("<mask>", 0),
    ],
)
def test_what_follows_a_mask_goes_on_the_word_unless_a_space_stands_between(
    pair: tuple[Tokenizer, Any], text: str, words: int
) -> None:
    """As in training, and in `evaluate.py --fill`: text without spaces, and the full stop behind the last word."""
    ours, theirs = pair
    ids = masked_ids(ours, text)
    assert theirs(text)["input_ids"] == ids
    assert "".join(ours.pieces[i] for i in ids).count("\u2581") == words


def test_a_vocabulary_of_another_kind_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(some_text()),
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=60,
        control_symbols=SPECIAL_PIECES[4:],
        **{"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3},
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"UNIGRAM with normalisation 'nmt_nfkc'.*prepare_corpus"):
        exported.write(Tokenizer(tmp_path / "unigram.model"), tmp_path, 64)
    with pytest.raises(UserError, match=r"tokenizer.json is missing"):
        stored_pieces(tmp_path)
