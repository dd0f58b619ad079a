"""Vocabularies of other models' folders: ids, the way back and offsets are those of the folder's own tokenizer in transformers."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from mlinterf_ds.data.foreign import vocabulary_file
from mlinterf_ds.data.prepare.main import prepare, vocabulary_of
from mlinterf_ds.data.prepare.vocabulary import with_new_scripts
from mlinterf_ds.data.tokenizer import SPACE_PIECE, Tokenizer
from mlinterf_ds.errors import UserError
from mlinterf_ds.evaluate import masked_ids
from mlinterf_ds.export import tokenizer as exported
from mlinterf_ds.tasks import TASKS, Limits
from mlinterf_ds.tasks.squad import Question
from tests.unit.test_tokenizer import some_text

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

KINDS = ["xlm-roberta", "camembert", "unigram", "wordpiece", "bytes"]
LINES = 40  # of each language, for learning


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    """Real text of 49 languages by code where it is at hand, else a few lines of several scripts."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "text"
    files = sorted(folder.glob("*.txt"))
    read = {file.stem: [line for line in file.read_text().split("\n") if line.strip()] for file in files}
    return read or {"xx": [*some_text()]}


def learned_lines(texts: dict[str, list[str]]) -> Iterator[str]:
    return (line for lines in texts.values() for line in lines[:LINES])


def sentencepiece_file(lines: Iterator[str], file: Path, size: int) -> None:
    """A unigram model with fairseq's special pieces, as XLM-R's and CamemBERT's files have them, and XLM-R's normalisation."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(file.with_suffix("")), vocab_size=size, model_type="unigram",
        hard_vocab_limit=False, character_coverage=0.9995, minloglevel=2, num_threads=1,
        normalization_rule_name="nmt_nfkc", max_sentence_length=100_000,
    )  # fmt: skip
    file.with_suffix(".model").rename(file)
    file.with_suffix(".vocab").unlink(missing_ok=True)
    Path(str(file.with_suffix("")) + ".vocab").unlink(missing_ok=True)


def make(kind: str, folder: Path, lines: Iterator[str], size: int = 6000) -> Any:
    """Trains a small tokenizer, saves it as models' folders have it, and returns what transformers loads from there."""
    folder.mkdir()
    if kind in ("xlm-roberta", "camembert"):
        sentencepiece_file(lines, folder / "sentencepiece.bpe.model", size)
        name = {"xlm-roberta": "XLMRobertaTokenizer", "camembert": "CamembertTokenizer"}[kind]
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        return getattr(transformers, name).from_pretrained(folder)
    if kind == "wordpiece":
        backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        backend.train_from_iterator(
            lines, tokenizers.trainers.WordPieceTrainer(vocab_size=size, special_tokens=special)
        )
        vocabulary = backend.get_vocab()
        theirs = transformers.BertTokenizer(vocab=vocabulary, do_lower_case=False)
    elif kind == "bytes":
        backend = tokenizers.ByteLevelBPETokenizer()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        backend.train_from_iterator(lines, vocab_size=size, special_tokens=special)
        backend.save_model(str(folder))
        vocabulary = json.loads((folder / "vocab.json").read_text())
        rules = (folder / "merges.txt").read_text().split("\n")[1:]
        merges = [tuple(rule.split(" ")) for rule in rules if rule]
        theirs = transformers.RobertaTokenizer(vocab=vocabulary, merges=merges)
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
    else:  # unigram, its special pieces added behind all others
        backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
        backend.normalizer = tokenizers.normalizers.NFKC()
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        backend.decoder = tokenizers.decoders.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(vocab_size=size, unk_token="<unk>", special_tokens=["<unk>"])
        backend.train_from_iterator(lines, trainer)
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend,
            unk_token="<unk>",
            cls_token="<s>",
            sep_token="</s>",
            pad_token="<pad>",
            mask_token="<mask>",
        )
    theirs.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, texts, tmp_path_factory) -> tuple[str, Tokenizer, Any, Path]:
    """A kind of vocabulary: ours, the folder's own in transformers, and the folder."""
    folder = tmp_path_factory.mktemp("foreign") / request.param
    theirs = make(request.param, folder, learned_lines(texts))
    file = folder.parent / "tokenizer.model"
    file.write_bytes(vocabulary_file(folder))
    return request.param, Tokenizer(file), theirs, folder


def plain(theirs: Any, text: str) -> list[int]:
    return theirs(text, add_special_tokens=False)["input_ids"]


def test_ids_and_the_way_back_in_all_languages(pair, texts) -> None:
    _kind, ours, theirs, _ = pair
    assert ours.size == len(theirs) and ours.pieces == theirs.convert_ids_to_tokens(list(range(ours.size)))
    draw = random.Random(0)
    for language, lines in texts.items():
        for line in draw.sample(lines, min(40, len(lines))):
            ids = plain(theirs, line)
            assert ours.encode(line) == ids, (language, line)
            if ours.vocabulary.unk not in ids:
                assert ours.decode(ids) == theirs.decode(ids), (language, line)


def test_characters_are_unknown_only_where_their_word_is(pair) -> None:
    kind, ours, _, _ = pair
    words = ["ba", "中文", "ꙮꙮba", "！", "한국어", "abc😀"]
    found = ours.unknown_characters(words)
    for word, count in zip(words, found, strict=True):
        ids = ours.encode(word)
        assert 0 <= count <= len(word) and (not count or ours.vocabulary.unk in ids), (word, count)
    assert not any(found) if kind == "bytes" else found[2] == 2
    assert ours.unknown_characters(words) == found  # whatever was asked before


def test_a_character_that_only_goes_on_words_is_known_inside_of_them(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##z"]
    theirs = transformers.BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})
    theirs.save_pretrained(tmp_path / "model")
    (tmp_path / "tokenizer.model").write_bytes(vocabulary_file(tmp_path / "model"))
    ours = Tokenizer(tmp_path / "tokenizer.model")
    assert ours.unknown_characters(["az", "z", "a", "azq"]) == [0, 1, 0, 2]


def test_no_piece_stands_between_a_word_and_the_mask_behind_it(pair) -> None:
    """A byte-level vocabulary would have one for the space alone, which no training row has there."""
    _, ours, _, _ = pair
    special = ours.vocabulary
    row = masked_ids(ours, "ba <mask> <mask> ko.")
    first = ours.encode("ba")
    assert row[: len(first) + 3] == [special.bos, *first, special.mask, special.mask]
    assert row[-1] == special.eos and ours.decode(row[len(first) + 3 : -1]).strip() == ours.decode(ours.encode("ko."))


def test_special_pieces_and_pairs(pair) -> None:
    _, ours, theirs, _ = pair
    special = ours.vocabulary
    ids = theirs.cls_token_id, theirs.pad_token_id, theirs.sep_token_id, theirs.unk_token_id, theirs.mask_token_id
    assert (special.bos, special.pad, special.eos, special.unk, special.mask) == ids
    assert not set(special.ordinary) & set(ids) and not set(special.ordinary) & set(theirs.all_special_ids)
    first, second = ours.encode("ba ko"), ours.encode("mi")
    if theirs("a", "b")["input_ids"] != plain(theirs, "a") + plain(theirs, "b"):  # it has a template
        wanted = theirs("ba ko", "mi")["input_ids"]
        assert [special.bos, *first, *special.separator, *second, special.eos] == wanted


def test_special_pieces_in_a_text_are_text(pair) -> None:
    _, ours, _, _ = pair
    special = ours.vocabulary
    for piece in (special.bos, special.eos, special.mask, special.pad):
        text = f"ba {ours.pieces[piece]} ko{ours.pieces[piece]}"
        assert not {special.bos, special.pad, special.eos, special.mask} & set(ours.encode(text))


def test_words_and_offsets(pair, texts) -> None:
    _kind, ours, theirs, _ = pair
    draw = random.Random(1)
    for lines in texts.values():
        for line in draw.sample(lines, min(8, len(lines))):
            words = line.split()
            rows = ours.encode_sentence(words)
            assert len(rows) == len(words) and [i for row in rows for i in row] == plain(theirs, " ".join(words))
            ids, offsets = ours.locate(line)
            assert ids == plain(theirs, line)
            assert all(0 <= start < end <= len(line) for start, end in offsets)
            assert all(a <= b for a, b in itertools.pairwise(offsets))


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_keeps_the_ids(kind: str, texts, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path / "model", learned_lines(texts), 3000)
    for code, lines in list(texts.items())[:3]:
        (tmp_path / f"{code}.txt").write_text("\n".join(lines[:120]))
    files = {code: [tmp_path / f"{code}.txt"] for code in list(texts)[:3]}
    corpus = prepare(files, tmp_path / "corpus", tokenizer=tmp_path / "model", workers=1)
    assert corpus.vocabulary == vocabulary_of(tmp_path / "model").vocabulary
    for code in files:
        tokens, eos = corpus.tokens(code, "train").tolist(), corpus.vocabulary.eos
        sentences = corpus.sentences(code, "train")
        assert tokens.count(eos) == sentences and tokens[-1] == eos
        for _ in range(5):
            sentence = tokens[: tokens.index(eos)]
            tokens = tokens[len(sentence) + 1 :]
            if corpus.vocabulary.unk not in sentence:
                assert plain(theirs, theirs.decode(sentence)) == sentence
    again = prepare(files, tmp_path / "corpus", tokenizer=tmp_path / "model", workers=1)
    assert again.manifest_hash == corpus.manifest_hash


def test_the_export_gives_the_same_ids(pair, texts, tmp_path: Path) -> None:
    kind, ours, theirs, _ = pair
    exported.write(ours, tmp_path, 64)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.mask_token_id == theirs.mask_token_id and len(again) == len(theirs)
    for lines in texts.values():
        for line in lines[50:52]:
            assert again(line)["input_ids"] == theirs(line)["input_ids"] or kind == "unigram"
            assert plain(again, line) == plain(theirs, line)
    assert vocabulary_of(tmp_path).vocabulary == ours.vocabulary


NEW = "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ᎠᏂᏴᏫᏯ ᎤᎾᏙᏢᏒ"  # Cherokee, which none of the 49 languages is written in


def test_pieces_of_a_new_script_are_appended(pair, texts, tmp_path: Path) -> None:
    kind, ours, _theirs, _folder = pair
    draw = random.Random(2)
    units = {SPACE_PIECE + word: 20 for word in NEW.split()}
    units |= {SPACE_PIECE + "".join(draw.sample(NEW.replace(" ", ""), 5)): 2 for _ in range(300)}
    size = ours.size + 60
    if kind == "bytes":
        with pytest.raises(UserError, match="--tokenizer"):
            with_new_scripts(ours, units, size)
        return
    (tmp_path / "tokenizer.model").write_bytes(with_new_scripts(ours, units, size))
    grown = Tokenizer(tmp_path / "tokenizer.model")
    assert grown.size == size and grown.pieces[: ours.size] == ours.pieces
    new = grown.encode(NEW)
    assert grown.vocabulary.unk not in new and grown.decode(new) == NEW
    assert any(i >= ours.size and len(grown.pieces[i].strip(SPACE_PIECE + "#")) > 1 for i in new)
    assert set(range(ours.size, size)) <= set(grown.vocabulary.ordinary)
    for lines in texts.values():
        for line in lines[:10]:
            assert grown.encode(line) == ours.encode(line)
    with pytest.raises(UserError, match="ask for"):
        with_new_scripts(ours, units, ours.size + 3)
    with pytest.raises(UserError, match="has every character"):
        with_new_scripts(ours, {SPACE_PIECE + "ba": 5}, size)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither tokenizer.json nor sentencepiece.bpe.model"):
        vocabulary_file(tmp_path)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"\x0a\xff")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match=r"'?t5'?.*tokenizer.json"):
        vocabulary_file(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "xmod"}')
    with pytest.raises(UserError, match=r"sentencepiece.bpe.model: not a SentencePiece model"):
        vocabulary_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer"):
        vocabulary_file(tmp_path)
    plain_words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
    plain_words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="has no cls_token"):
        vocabulary_file(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b'{"vocabulary": {}}')
    with pytest.raises(UserError, match="not a vocabulary, or damaged"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_answers_come_back_through_rows(pair, texts) -> None:
    """Gold spans of whole words come back through windows and perfect scores, up to pieces that reach into a neighbour."""
    _kind, ours, _, _ = pair
    task, draw, questions = TASKS["qa"], random.Random(3), []
    for language in ("en", "sw", "fr", "xx"):
        for line in texts.get(language, [])[:15]:
            words = line.split()
            first = draw.randrange(len(words))
            start = len(" ".join(words[:first])) + (first > 0)
            question = Question(f"{language}{len(questions)}", words[0], " ".join(words), ((words[first], start),))
            questions.append(question)
    limits = Limits(max_length=40, stride=9, max_question=4, max_answer=40)
    rows, _ = task.rows(questions, ours, ["start", "end"], limits)
    special = ours.vocabulary
    assert all(row.tokens[0] == special.bos and row.tokens[-1] == special.eos for row in rows)
    outputs = []
    for row in rows:
        scores = np.full((2, len(row.positions)), -9.0)
        scores[[0, 1], row.targets] = 9.0 if row.targets[0] else 0.0
        outputs.append(scores)
    answers = task.predict(questions, rows, outputs, ["start", "end"], limits)
    whole = [
        q.texts[0] == a
        for q, a in zip(questions, answers, strict=True)
        if ours.vocabulary.unk not in ours.encode(q.context)
    ]
    assert len(whole) >= 3 and sum(whole) >= 0.95 * len(whole)
