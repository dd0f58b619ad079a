"""What a vocabulary is learned from: each language's share of the text, in every script, and what is said of unknown text."""

import io
import random
import sys
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from mlinterf_ds.data.corpus import Corpus, open_corpus
from mlinterf_ds.data.prepare import vocabulary
from mlinterf_ds.data.prepare.main import prepare
from mlinterf_ds.data.prepare.vocabulary import sampled_units
from mlinterf_ds.data.tokenizer import UNK
from mlinterf_ds.errors import UserError
from tests.unit.test_corpus import build, some_lines, written
from tests.vocabulary import learned

# The first letter of each script and how many there are; the unspaced ones are written without spaces.
SPACED = {
    "latin": (0x61, 26),
    "greek": (0x3B1, 24),
    "cyrillic": (0x430, 32),
    "hebrew": (0x5D0, 27),
    "arabic": (0x627, 36),
}
SPACED |= {"devanagari": (0x905, 50), "bengali": (0x995, 20), "tamil": (0xBAE, 12), "telugu": (0xC15, 20)}
SPACED |= {"georgian": (0x10D0, 33), "armenian": (0x561, 38), "ethiopic": (0x1208, 60), "hangul": (0xAC00, 900)}
UNSPACED = {
    "han": (0x4E00, 1500),
    "hiragana": (0x3042, 80),
    "thai": (0xE01, 46),
    "khmer": (0x1780, 33),
    "lao": (0xE94, 4),
}
UNSPACED |= {"myanmar": (0x1000, 33), "tibetan": (0xF40, 8)}


NAMES = {"xx": "hangul", "zh": "han", "ja": "hiragana", "th": "thai"}


def made_up(script: str, sentences: int) -> list[str]:
    """Distinct sentences over the script's letters, with the frequencies that letters have in a text."""
    draw = random.Random(script)
    first, count = (SPACED | UNSPACED)[script]
    letters = [chr(first + n) for n in range(count)]
    weights = [*accumulate(1 / (n + 3) for n in range(count))]
    words = ["".join(draw.choices(letters, cum_weights=weights, k=draw.randint(1, 5))) for _ in range(10 * count + 500)]
    space = " " if script in SPACED else ""
    return list(dict.fromkeys(space.join(draw.choices(words, k=draw.randint(6, 12))) for _ in range(sentences)))


@pytest.mark.parametrize("script", [*SPACED, *UNSPACED])
def test_every_script_alone_is_known_and_cut_as_finely_as_sentencepiece_cuts_it(tmp_path: Path, script: str) -> None:
    text = made_up(script, 1000)
    size = 2 * (SPACED | UNSPACED)[script][1] + 30
    tokenizer = learned(text[:900], size, tmp_path / "model")
    pieces = [piece for sentence in text[900:] for piece in tokenizer.encode(sentence)]
    assert pieces.count(UNK) <= 0.01 * len(pieces)
    plain = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[:900]),
        model_writer=plain,
        model_type="bpe",
        vocab_size=size,
        character_coverage=1.0,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=plain.getvalue())
    expected = sum(len(theirs.encode(sentence)) for sentence in text[900:])
    assert len(pieces) == pytest.approx(expected, rel=0.05)


def test_languages_without_spaces_keep_their_characters_beside_a_large_vocabulary_of_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words of the spaced language alone would fill the characters that are read."""
    monkeypatch.setattr(vocabulary, "FEWEST_CHARACTERS", 60_000)
    monkeypatch.setattr(vocabulary, "CHARACTERS_PER_PIECE", 1)
    files = {code: written(tmp_path / code, made_up(script, 1500)) for code, script in NAMES.items()}
    corpus = build(tmp_path / "out", 4000, **files)
    for code in NAMES:
        assert corpus.unknown(code) < 0.002


def test_a_large_alphabet_takes_no_letters_from_small_ones() -> None:
    """Where characters are left out, all 26 of a small alphabet cost a large one hardly anything."""
    words = [Counter("".join(made_up(script, 1500)).replace(" ", "")) for script in ("latin", "han")]
    for size in (1400, 1600, 1750):
        covered, others = vocabulary._characters(words, size)
        assert set(words[0]) <= covered and len(covered) <= 0.75 * size
        lacking = sum(words[1][character] for character in others)
        assert 0.01 < lacking / words[1].total() < 0.06


def test_a_language_gets_its_share_of_what_is_read_and_what_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "FEWEST_CHARACTERS", 10_000)
    monkeypatch.setattr(vocabulary, "CHARACTERS_PER_PIECE", 0)
    words = [
        Counter({f"{letter}{n}": 1 for n in range(count)})
        for letter, count in (("a", 100), ("b", 20_000), ("c", 20_000))
    ]
    used = sampled_units(words, np.array([0.5, 0.4, 0.1]), np.ones(3), 100)
    characters = Counter[str]()
    for unit in used:
        characters[unit[1:2]] += len(unit)
    small = sum(len(word) + 1 for word in words[0])
    assert characters["a"] == small
    # Each word occurs once: four times as many characters are read as of words that come again.
    assert characters["b"] == pytest.approx(0.8 * (40_000 - small), rel=0.1)
    assert characters["c"] == pytest.approx(0.2 * (40_000 - small), rel=0.2)


def test_frequencies_are_kept_on_average_and_common_words_exactly() -> None:
    draw = np.random.default_rng(0)
    counts = Counter({f"w{n:05}": int(count) for n, count in enumerate(np.ceil(5000 / (1 + np.arange(30_000))))})
    kept = vocabulary._thinned(counts, 30_000)
    assert sum(map(len, kept)) == pytest.approx(30_000, rel=0.05)
    assert sum(kept.values()) == pytest.approx(sum(counts.values()), rel=0.02)
    assert all(kept[word] == count for word, count in counts.most_common(500))
    sentences = Counter({"".join(map(chr, row)): 1 for row in draw.integers(0x4E00, 0x4F00, (20_000, 20))})
    kept = vocabulary._thinned(sentences, 40_000)
    assert len(set(kept.values())) == 1 and sum(kept.values()) == pytest.approx(20_000, rel=0.1)
    firsts = np.array([ord(sentence[0]) for sentence in kept])
    assert firsts.mean() == pytest.approx(0x4E80, abs=6)  # not the alphabet's beginning


def test_rare_characters_leave_room_for_pieces_and_are_said_to_be_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "zh", made_up("han", 1500))
    corpus = build(tmp_path / "out", 1400, zh=file)  # of 1,500 characters
    assert sum(len(piece) == 1 for piece in corpus.tokenizer.pieces) <= 0.75 * 1400
    assert 0.01 < corpus.unknown("zh") < 0.1
    assert (
        f"warning: {tmp_path}/out: the vocabulary lacks {corpus.unknown('zh'):.1%} of the text of zh"
        in capsys.readouterr().err
    )


def mixed_files(folder: Path, foreign: int) -> dict[str, Any]:
    lines = some_lines(400)
    return {"en": [written(folder / "en", lines)], "xx": [written(folder / "xx", [*lines, *made_up("thai", foreign)])]}


def test_unknown_text_is_warned_of_at_preparing_and_at_every_start_and_refused_where_it_is_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    known = build(tmp_path / "known", en=written(tmp_path / "text", some_lines(400))).tokenizer.path
    capsys.readouterr()
    files = mixed_files(tmp_path, 20)
    prepare(files, tmp_path / "few", tokenizer=known, workers=1)
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "% of the text of xx, which is <unk> to a model; prepare" in said
    open_corpus(str(tmp_path / "few"), None, 0)
    assert capsys.readouterr().err == said
    prepare(files, tmp_path / "few", tokenizer=known, workers=1)  # finished already
    assert capsys.readouterr().err == said
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)
        open_corpus(str(tmp_path / "few"), None, 0)
    assert capsys.readouterr().err == f"\033[31m{said.strip()}\033[0m\n"
    open_corpus(str(tmp_path / "few"), ["en"], 0)
    assert capsys.readouterr().err == ""
    with pytest.raises(
        UserError, match=r"many: the vocabulary lacks \d\d% of the text of xx, at most 20% .*--vocab-size"
    ):
        prepare(mixed_files(tmp_path, 400), tmp_path / "many", tokenizer=known, workers=1)
    assert not (tmp_path / "many" / "manifest.json").exists()
    mended = prepare(mixed_files(tmp_path, 400), tmp_path / "many", vocabulary_size=400, workers=1)  # as it says
    assert mended.unknown("xx") < 0.2 and mended.tokenizer.path.read_bytes() != known.read_bytes()
    monkeypatch.setattr("mlinterf_ds.data.corpus.TOO_MANY_UNKNOWN", 0.011)  # as if a version before had let it pass
    with pytest.raises(UserError, match="few: the vocabulary lacks"):
        open_corpus(str(tmp_path / "few"), None, 0)
    assert Corpus.open(tmp_path / "few").unknown("en") == 0
