"""From examples to rows and back: windows, offsets, truncation, batches; the heads by hand."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlinterf_ds.data.tokenizer import BOS, EOS, UNK, Tokenizer, normalise
from mlinterf_ds.errors import UserError
from mlinterf_ds.model.encoder import SHARED
from mlinterf_ds.model.layers import at_positions
from mlinterf_ds.sections import ModelConfig
from mlinterf_ds.tasks import TASKS, Limits, Row, metrics
from mlinterf_ds.tasks.batches import TrainBatches, collate, evaluation_batches
from mlinterf_ds.tasks.columns import Sentence, in_memory
from mlinterf_ds.tasks.heads import CLASSIFIER, TaskModel
from mlinterf_ds.tasks.nli import shortened
from mlinterf_ds.tasks.squad import Question
from mlinterf_ds.tasks.tagging import windows
from tests.vocabulary import learned

LIMITS = Limits(max_length=16, stride=4, max_question=4, max_answer=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 9))) for _ in range(300)]
    text = [" ".join(draw.choice(words) for _ in range(8)) + " ." for _ in range(400)]
    return learned(text, 120, tmp_path_factory.mktemp("vocabulary") / "tokenizer.model")


def texts(count: int, seed: int = 0) -> list[list[str]]:
    draw = random.Random(seed)
    return [
        ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(1, 12))) for _ in range(draw.randint(1, 20))]
        for _ in range(count)
    ]


# --- words -----------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(1, 14), max_size=40), st.integers(0, 20))
def test_every_word_is_predicted_once_and_no_window_is_too_long(sizes: list[int], stride: int) -> None:
    cut = list(windows(sizes, 14, stride))
    assert [k for _, first, end in cut for k in range(first, end)] == list(range(len(sizes)))
    for begin, first, end in cut:
        assert first < end and sum(sizes[begin:end]) <= 14 and sum(sizes[begin:first]) <= stride


def tagged(words: list[str], tags: list[str], file: str = "f", line: int = 1) -> Sentence:
    return in_memory([(words, tags)], Path(file), line)[0]


@pytest.mark.parametrize("name", ["ner", "pos"])
def test_first_pieces_stand_for_their_words(name: str, tokenizer: Tokenizer) -> None:
    task, tag = TASKS[name], {"ner": "O", "pos": "X"}[name]
    sentences = [tagged(words, [tag] * len(words)) for words in texts(30)]
    labels = task.labels(sentences)
    rows, notes = task.rows(sentences, tokenizer, labels, LIMITS)
    assert any("cut into windows" in note for note in notes)
    seen = [0] * len(sentences)
    for row in rows:
        first, end = row.detail
        assert row.tokens[0] == BOS and row.tokens[-1] == EOS and len(row.tokens) <= LIMITS.max_length
        for position, word in zip(row.positions, sentences[row.example].words[first:end], strict=True):
            assert row.tokens[position] == tokenizer.encode(word)[0]
        for start, end_of_word, word in zip(
            row.positions, row.ends or (), sentences[row.example].words[first:end], strict=True
        ):
            assert row.tokens[start:end_of_word] == tokenizer.encode(word)
        seen[row.example] += end - first
    assert seen == [len(s.words) for s in sentences]
    answers = [[labels.index(tag)] * len(row.positions) for row in rows]
    assert task.predict(sentences, rows, answers, labels, LIMITS) == [list(s.tags) for s in sentences]


def test_words_that_tokenise_to_nothing_are_unknown_and_named(tokenizer: Tokenizer) -> None:
    sentence = tagged(["abc", "\u200b", ""], ["O", "B-X", "O"], "some.tsv", 7)
    (row,), (note,) = TASKS["ner"].rows([sentence], tokenizer, ["O", "B-X", "I-X"], LIMITS)
    assert [row.tokens[p] for p in row.positions[1:]] == [UNK, UNK] and row.targets == [0, 1, 0]
    assert note.startswith("2 words tokenise to nothing") and "some.tsv, line 8" in note


def test_a_word_longer_than_a_row_keeps_its_first_pieces(tokenizer: Tokenizer) -> None:
    long = "abcdefgh" * 20
    sentence = tagged(["ab", long, "cd"], ["O"] * 3)
    rows, notes = TASKS["ner"].rows([sentence], tokenizer, ["O"], LIMITS)
    assert max(len(row.tokens) for row in rows) <= 16 and sum(len(row.targets) for row in rows) == 3
    assert any("1 words are longer" in note for note in notes)


def test_a_tag_that_training_never_saw(tokenizer: Tokenizer) -> None:
    sentence = tagged(["ab", "cd"], ["O", "B-MISC"], "dev.tsv", 4)
    with pytest.raises(UserError, match=r"dev.tsv, line 5: tag 'B-MISC'.* O, B-PER"):
        TASKS["ner"].rows([sentence], tokenizer, ["O", "B-PER", "I-PER"], LIMITS)


# --- questions -------------------------------------------------------------------------------------------------------
def test_offsets_tile_every_word(tokenizer: Tokenizer) -> None:
    """Also around characters that no piece has, and words that normalising changes."""
    context = "abc  x\u00fcyz! deZa\u00fc\u00fcb  cafe\u0301 \u200bgh\tend."
    ids, offsets = tokenizer.locate(context)
    assert ids == [piece for word in context.split() for piece in tokenizer.encode(word)]
    covered = {k for low, high in offsets for k in range(low, high)}
    assert covered >= {k for k, letter in enumerate(context) if not letter.isspace() and letter != "\u200b"}
    pieces = tokenizer.pieces
    for piece, (low, high) in zip(ids, offsets, strict=True):
        if piece != UNK and context[low:high].isascii() and "cafe" not in context[low:high]:
            assert context[low:high] == pieces[piece].removeprefix("\u2581")


VISIBLE = ("Một ngày đẹp", "नज़र मिली", "កខគឃ", "\u09ac\u09cb\u09ac\u09be", "가나다 각", "قال محمد")


@pytest.mark.parametrize("text", VISIBLE)
@pytest.mark.parametrize(
    "change", [lambda t: unicodedata.normalize("NFD", t), "\u200b".join, lambda t: f"\u200f{t}\u061c"]
)
def test_offsets_are_exact_in_text_that_normalising_changes(
    text: str, change: Callable[[str], str], tmp_path: Path
) -> None:
    """Decomposed letters, zero-width spaces between letters (as Khmer and Thai have between words), directional marks."""
    line = unicodedata.normalize("NFC", text)
    characters = learned([line] * 3, 6 + len(set(line.replace(" ", ""))), tmp_path / "model")  # a piece a character
    context = change(line)
    ids, offsets = characters.locate(context)
    spelt = [characters.pieces[piece].removeprefix("\u2581") for piece in ids]
    covered = [normalise(context[low:high]) for low, high in offsets]
    assert "".join(covered) == "".join(spelt) == line.replace(" ", "")
    assert covered == spelt


def test_whole_words_are_always_recovered(tokenizer: Tokenizer) -> None:
    """Gold spans of whole words come back exactly through rows, perfect scores and `predict`, windows and all."""
    task, draw = TASKS["qa"], random.Random(3)
    examples = []
    for n, words in enumerate(texts(40, seed=5)):
        first = draw.randrange(len(words))
        context, answer = " ".join(words), " ".join(words[first : first + 2])
        start = len(" ".join(words[:first])) + (first > 0)
        examples.append(Question(str(n), "ab cd ef gh", context, ((answer, start),)))
    wide = Limits(max_length=40, stride=9, max_question=4, max_answer=40)
    rows, notes = task.rows(examples, tokenizer, ["start", "end"], wide)
    (note,) = notes
    assert "no prediction" not in note and "cut to 4 pieces" in note
    assert all(len(row.tokens) <= 40 and row.positions[0] == 0 for row in rows)
    held = {row.example for row in rows if row.targets != [0, 0]}
    answers = task.predict(examples, rows, sure(rows), ["start", "end"], wide)
    assert len(held) >= 38  # an answer longer than a window's overlap may fall between two
    assert [answers[k] for k in held] == [examples[k].answers[0][0] for k in held]
    between = re.findall(r"(\d+) with answers that no window holds", note)
    assert [int(count) for count in between] == [len(examples) - len(held)] * (len(held) < len(examples))


def sure(rows: list[Row]) -> list[np.ndarray]:
    """Scores of a model that is right and sure."""
    outputs = [np.full((2, len(row.positions)), -5.0) for row in rows]
    for row, scores in zip(rows, outputs, strict=True):
        if row.targets != [0, 0]:
            scores[0, row.targets[0]] = scores[1, row.targets[1]] = 5.0
    return outputs


def test_answers_that_cannot_be_found_are_counted(tokenizer: Tokenizer) -> None:
    words = " ".join(["abc def"] * 30)
    examples = [
        Question("a", "ab", words, (("", 0), (words[: 7 * 4 - 1], 0))),
        Question("b", "ab", words, (("abc", 0),)),
    ]
    _, (note,) = TASKS["qa"].rows(examples, tokenizer, ["start", "end"], LIMITS)
    assert note.startswith("of 2 questions: 2 with contexts longer than a row, read in windows of stride 4; ")
    assert (
        "; 1 with answers longer than 8 pieces" in note and "; 1 with answers that no window holds as a whole" in note
    )


@pytest.mark.parametrize("language", ["en", "sw"])
def test_real_answers_come_back_but_those_that_are_counted(language: str, shared_data: Path, tmp_path: Path) -> None:
    task = TASKS["qa"]
    examples = task.read(shared_data / "tasks" / "qa" / "tydiqa_goldp" / language / "train.json", language)[:400]
    learnt = learned([q.context for q in examples], 2000, tmp_path / "tokenizer.model")
    limits = Limits(max_length=128, stride=64, max_question=32, max_answer=30)
    rows, notes = task.rows(examples, learnt, ["start", "end"], limits)
    answers = task.predict(examples, rows, sure(rows), ["start", "end"], limits)
    right = sum(metrics.exact_match(text, q.texts) for text, q in zip(answers, examples, strict=True))
    lost = sum(map(int, re.findall(r"(\d+) with answers (?!found)", " ".join(notes))))
    assert len(examples) - lost <= right and right > 0.9 * len(examples), notes


def test_no_answer_only_where_training_had_some(tokenizer: Tokenizer) -> None:
    task = TASKS["qa"]
    example = Question("a", "ab", "abc def", (), impossible=True)
    rows, _ = task.rows([example], tokenizer, ["start", "end", "none"], LIMITS)
    assert rows[0].targets == [0, 0]
    scores = np.zeros((2, len(rows[0].positions)))
    scores[:, 0] = 1.0
    assert task.predict([example], rows, [scores], ["start", "end", "none"], LIMITS) == [""]
    assert task.predict([example], rows, [scores], ["start", "end"], LIMITS) != [""]


def test_a_question_that_leaves_no_room(tokenizer: Tokenizer) -> None:
    example = Question("a", "ab cd ef gh ab cd ef gh", "abc def", (("abc", 0),))
    with pytest.raises(UserError, match="max_question"):
        TASKS["qa"].rows([example], tokenizer, ["start", "end"], Limits(16, 4, 8, 8))


def test_the_longer_sentence_is_cut() -> None:
    assert shortened([1] * 9, [2] * 3, 8) == ([1] * 5, [2] * 3)
    assert shortened([1] * 9, [2] * 9, 7) == ([1] * 3, [2] * 4)
    assert shortened([1], [2], 7) == ([1], [2])


# --- batches ---------------------------------------------------------------------------------------------------------
def some_rows(count: int) -> list[Row]:
    draw = random.Random(1)
    rows = []
    for index in range(count):
        length = draw.randint(3, 12)
        rows.append(Row(index, [0, *[9 + index] * length, 2], [1, 2], [1, -1 if index % 3 else 0]))
    return rows


def test_an_epoch_has_every_row_once_and_weights_sum_to_one() -> None:
    batches = TrainBatches(some_rows(10), np.arange(10) % 2, 4, seed=3)
    assert batches.epoch_steps == 3
    orders = []
    for epoch in range(2):
        seen: list[int] = []
        for step in range(3 * epoch, 3 * epoch + 3):
            batch = batches.at(step, 0, 4)
            assert float(batch.weights.sum()) == pytest.approx(1)
            real = batch.weights.sum(1) > 0
            assert batches.filled(step) == pytest.approx(real.float().mean().item())
            seen += (batch.tokens[:, 1] - 9)[real].tolist()
            halves = [batches.at(step, 0, 2), batches.at(step, 2, 4)]
            assert halves[0].step_languages == batch.step_languages
            for half, rows in zip(halves, (slice(0, 2), slice(2, 4)), strict=True):
                assert torch.equal(half.weights, batch.weights[rows])
                assert torch.equal(half.tokens, batch.tokens[rows, : half.tokens.shape[1]])
                assert torch.equal(half.languages, batch.languages[rows])
        assert sorted(seen) == list(range(10))
        orders.append(seen)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("count, ranks", [(1, 3), (7, 2), (8, 2), (5, 4)])
def test_evaluation_covers_every_row_in_equally_many_batches(count: int, ranks: int) -> None:
    parts = [list(evaluation_batches(some_rows(count), 1, 2, rank, ranks)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert {number for part in parts for numbers, _ in part for number in numbers} == set(range(count))


# --- heads -----------------------------------------------------------------------------------------------------------
def model(kind: str, classes: int) -> TaskModel:
    shape = ModelConfig(layers=1, heads=2, width=16, ffn=16, dropout=0, attention_dropout=0)  # type: ignore[call-arg]
    options = {"variant": "adpt", "languages": ["en", "sw"], "vocabulary": 64, "positions": 16, "seed": 1}
    encoder = TaskModel(shape, kind=kind, classes=classes, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        encoder.classifier.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    return encoder


@pytest.mark.usefixtures("one_rank")
def test_loss_of_labels_by_hand() -> None:
    encoder = model("labels", 3)
    rows = some_rows(3)
    batch = collate(rows, np.array([0, 1, 0]), (0, 1), weights=np.full(3, 0.2), dropout_seed=1)
    loss, logits = encoder.eval()(batch)
    by_hand = 0.0
    for index, row in enumerate(rows):
        alone = collate([row], np.array([[0, 1, 0][index]]), (0, 1), weights=np.ones(1), dropout_seed=1)
        hidden = encoder.hidden(alone.tokens, alone.languages, (0, 1))  # no padding at all
        places = at_positions(hidden, alone.positions)[0]
        scores = (places @ encoder.classifier.weight.T + encoder.classifier.bias).log_softmax(-1)
        torch.testing.assert_close(logits[index].log_softmax(-1), scores.detach(), rtol=1e-4, atol=1e-5)
        by_hand -= sum(0.2 * float(scores[k, t].detach()) for k, t in enumerate(row.targets) if t >= 0)
    assert float(loss) == pytest.approx(by_hand, rel=1e-5)
    trained, nll = encoder.train()(batch)
    assert float(trained) == pytest.approx(by_hand, rel=1e-5) and nll.shape == (3, 1)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_words_logits_are_the_mean_of_its_pieces(dtype: torch.dtype) -> None:
    """With `finetune.word=mean`, in rows of different lengths; with first, and of pieces that stand alone, they are the piece's."""
    rows = [
        Row(0, [0, 9, 10, 11, 12, 13, 2], [1, 4], [0, 1], ends=[4, 6]),
        Row(1, [0, 9, 10, 2], [1], [2], ends=[2]),
        Row(2, [0, 8, 9, 10, 2], [2], [2], ends=[4]),
    ]
    encoder = model("labels", 3).eval().to(dtype)
    every = [
        Row(row.example, row.tokens, columns := [*range(1, len(row.tokens) - 1)], [0] * len(columns)) for row in rows
    ]
    batches = [
        collate(some, np.array([0, 1, 0]), (0, 1), weights=np.ones(3), dropout_seed=1) for some in (rows, every, rows)
    ]
    pieces = encoder(batches[1])[1]
    first = encoder(batches[0])[1]
    encoder.word = "mean"
    mean = encoder(batches[2])[1]
    exact = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.05}
    for row, start, end in ((0, 1, 4), (0, 4, 6), (1, 1, 2), (2, 2, 4)):
        word = rows[row].positions.index(start)
        torch.testing.assert_close(first[row, word], pieces[row, start - 1], **exact)
        torch.testing.assert_close(mean[row, word], pieces[row, start - 1 : end - 1].mean(0), **exact)
    assert not torch.allclose(mean[0, 0], first[0, 0], atol=0.1)


@pytest.mark.usefixtures("one_rank")
def test_a_span_is_looked_for_among_a_rows_own_places() -> None:
    encoder = model("span", 2)
    rows = [Row(0, [0, 9, 2, 10, 11, 12, 2], [0, 3, 4, 5], [1, 3]), Row(1, [0, 9, 2, 10, 2], [0, 3], [0, 0])]
    loss, logits = encoder.eval()(collate(rows, np.zeros(2), (0,), weights=np.full(2, 0.25), dropout_seed=1))
    assert logits.shape == (2, 2, 4) and bool(torch.isneginf(logits[1, :, 2:]).all())
    chances = logits.log_softmax(-1)
    wanted = -(chances[0, 0, 1] + chances[0, 1, 3] + chances[1, 0, 0] + chances[1, 1, 0]) / 4
    assert float(loss) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_the_classifier_is_a_group_of_its_own() -> None:
    encoder = model("labels", 3)
    groups = encoder.parameter_groups()
    assert groups.keys() >= {SHARED, CLASSIFIER} and len(groups[CLASSIFIER]) == 2
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in encoder.named_parameters())
    assert not any(name.startswith("head.") for name in names)
