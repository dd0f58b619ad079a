"""The data contract: pure functions of (seed, step), whatever the layout; exact weights; language frequencies."""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlinterf_ds.data.batch import Batch
from mlinterf_ds.data.evaluation import EvaluationSet, bits_per_character
from mlinterf_ds.data.stream import MetaRowsStream, Schedule, TrainStream, ValidationStream, prefetch
from mlinterf_ds.data.tokenizer import BOS, EOS, SPECIAL_PIECES, Vocabulary
from mlinterf_ds.data.windows import Windows
from mlinterf_ds.errors import UserError
from mlinterf_ds.sections import RowFormat

FIRST_ORDINARY = len(SPECIAL_PIECES)


class Corpus:
    """In memory: language number j counts up from 1000 j: a row tells its language and place. Every 7th is </s>."""

    vocabulary = Vocabulary(8000)

    def __init__(self, sizes: dict[str, int], eos: bool = True) -> None:
        self.languages = list(sizes)
        self._text = {}
        for number, (language, size) in enumerate(sizes.items()):
            text = (1000 * number + FIRST_ORDINARY + np.arange(size)).astype(np.uint16)
            if eos:
                text[6::7] = EOS
            self._text[language] = text

    def tokens(self, language: str, split: str) -> np.ndarray:
        assert len(self._text[language]) > 0  # an empty file can't be memory-mapped
        return self._text[language]

    def sentences(self, language: str, split: str) -> int:
        return -(-len(self._text[language]) // 7)

    def characters(self, language: str, split: str) -> int:
        return 4 * len(self._text[language])

    def unchanged(self, language: str, split: str) -> bool:
        return True

    def starts_document(self, language: str, split: str, offsets: np.ndarray) -> np.ndarray:
        return offsets % 21 == 0  # documents of three sentences


SIZES = {"en": 900, "sw": 350, "te": 140, "pt": 70}
CORPUS = Corpus(SIZES)
LANGUAGES = list(SIZES)
ROOMY = Corpus({language: 3 * size for language, size in SIZES.items()})  # room for validation rows beside a step's own


def train(**changes: object) -> TrainStream:
    settings: dict = {"rows": 12, "row_format": RowFormat(16), "seed": 7, "mixed": False, "temperature": 2.0} | changes
    return TrainStream(settings.pop("corpus", CORPUS), settings.pop("languages", LANGUAGES), **settings)


def validation(**changes: object) -> ValidationStream:
    settings: dict = {"rows": 10, "row_format": RowFormat(16), "seed": 7} | changes
    return ValidationStream(settings.pop("corpus", CORPUS), settings.pop("languages", LANGUAGES), **settings)


def same(a: Batch, b: Batch) -> bool:
    tensors = ("tokens", "positions", "labels", "weights", "languages", "segment_ids", "position_ids")
    return a.step_languages == b.step_languages and all(torch.equal(getattr(a, t), getattr(b, t)) for t in tensors)


def joined(parts: list[Batch]) -> Batch:
    tensors = ("tokens", "positions", "labels", "weights", "languages", "segment_ids", "position_ids")
    cat = {t: torch.cat([getattr(p, t) for p in parts]) for t in tensors}
    return Batch(**cat, step_languages=parts[0].step_languages, dropout_seed=parts[0].dropout_seed)


def original(batch: Batch) -> np.ndarray:
    """(rows, length - 1) the text before masking."""
    return batch.tokens.scatter(1, batch.positions, batch.labels).numpy()[:, 1:]


cuts = st.lists(st.integers(0, 10), max_size=4).map(lambda inner: [0, *sorted(inner), 10])


@settings(deadline=None, max_examples=60)
@given(step=st.integers(0, 3000), mixed=st.booleans(), layout=cuts)
def test_train_slices_join_to_the_whole(step: int, mixed: bool, layout: list[int]) -> None:
    stream = train(rows=10, mixed=mixed)
    parts = [stream.batch(step, start, stop) for start, stop in pairwise(layout)]
    assert same(joined(parts), stream.batch(step))
    assert all(part.step_languages == parts[0].step_languages for part in parts)
    assert parts[0].dropout_seed == stream.batch(step).dropout_seed


@settings(deadline=None, max_examples=60)
@given(step=st.integers(0, 3000), per_step=st.sampled_from([None, 2, 3]), language=st.integers(0, 3), layout=cuts)
def test_validation_slices_join_to_the_whole(step: int, per_step: int | None, language: int, layout: list[int]) -> None:
    stream = validation(languages_per_step=per_step)
    parts = [stream.batch(step, language, start, stop) for start, stop in pairwise(layout)]
    assert same(joined(parts), stream.batch(step, language))


@settings(deadline=None, max_examples=60)
@given(step=st.integers(0, 3000), mixed=st.booleans(), text=st.sampled_from(["train", "half"]), layout=cuts)
def test_plain_training_on_the_rows_of_a_meta_step(step: int, mixed: bool, text: str, layout: list[int]) -> None:
    """They are those of both its batches, masks included, which count half each; slices join to the whole."""
    half = {"half": "first"} if text == "half" else {}
    own = train(rows=6, mixed=mixed, corpus=ROOMY, **half)
    meta = validation(rows=4, training=own, text=text, corpus=ROOMY, languages_per_step=3).batch(
        step, own.language(step)
    )
    both = [own.batch(step), meta]
    common = {"row_format": RowFormat(16), "seed": 7, "temperature": 2.0, "mixed": mixed, "text": text, **half}
    plain = MetaRowsStream(ROOMY, LANGUAGES, rows=10, meta_rows=4, languages_per_step=3, **common)
    batch = plain.batch(step)
    for name in ("tokens", "positions", "labels", "languages", "segment_ids", "position_ids"):
        assert torch.equal(getattr(batch, name), torch.cat([getattr(one, name) for one in both])), name
    assert batch.step_languages == tuple(sorted({*both[0].step_languages, *meta.step_languages}))
    assert torch.equal(batch.weights, torch.cat([both[0].weights / 2, both[1].weights / 2]))
    assert same(joined([plain.batch(step, start, stop) for start, stop in pairwise(layout)]), batch)
    assert plain.batch(step, 7).step_languages == batch.step_languages


def test_rows_of_meta_steps_are_counted() -> None:
    plain = MetaRowsStream(ROOMY, LANGUAGES, rows=10, meta_rows=4, row_format=RowFormat(16), seed=7, mixed=True)
    walked: Counter[int] = Counter()
    for step in range(20):
        walked.update(plain.batch(step).languages.tolist())
    assert {code: facts["rows"] for code, facts in plain.seen(20).items()} == {
        code: walked[number] for number, code in enumerate(LANGUAGES)
    }


@pytest.mark.parametrize("mixed", [False, True])
def test_jumping_equals_walking_and_seen_counts_what_was_walked(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlinterf_ds.data.stream.BLOCK", 100)
    walked, rows_seen = train(rows=3, mixed=mixed), Counter[str]()
    for step in range(240):
        if step in (0, 1, 50, 99, 100, 139, 200, 239):
            jumped = train(rows=3, mixed=mixed)
            assert same(jumped.batch(step), walked.batch(step))
            seen = jumped.seen(step)
            assert {language: facts["rows"] for language, facts in seen.items()} == {n: rows_seen[n] for n in LANGUAGES}
            assert seen["sw"]["tokens"] == 15 * rows_seen["sw"]
            assert seen["sw"]["epochs"] == pytest.approx(15 * rows_seen["sw"] / 350)
        for language in walked.batch(step).languages.tolist():
            rows_seen[LANGUAGES[language]] += 1
    assert sum(rows_seen.values()) == 3 * 240
    assert same(walked.batch(2), train(rows=3, mixed=mixed).batch(2))  # and going back


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_are_packed_text_of_their_language_in_sorted_groups(mixed: bool) -> None:
    stream = train(corpus=Corpus(SIZES, eos=False), mixed=mixed, rows=30)
    for step in range(5):
        batch = stream.batch(step)
        assert (batch.tokens[:, 0] == BOS).all() and batch.tokens.shape == (30, 16)
        assert (batch.languages.diff() >= 0).all()
        assert batch.step_languages == tuple(sorted(set(batch.languages.tolist())))
        assert mixed or len(batch.step_languages) == 1
        text, languages = original(batch), batch.languages.numpy()
        assert np.array_equal((text - FIRST_ORDINARY) // 1000, np.repeat(languages[:, None], 15, axis=1))
        sizes = np.array(list(SIZES.values()))[languages]
        places = (text - FIRST_ORDINARY) % 1000
        assert np.array_equal((places[:, :1] + np.arange(15)) % sizes[:, None], places)


@pytest.mark.parametrize("mixed", [False, True])
def test_each_epoch_visits_each_window_once(mixed: bool) -> None:
    stream = train(corpus=Corpus(SIZES, eos=False), mixed=mixed, rows=5, temperature=5.0)
    starts: dict[int, list[int]] = {number: [] for number in range(4)}
    for step in range(200):
        batch = stream.batch(step)
        for language, first in zip(batch.languages.tolist(), original(batch)[:, 0].tolist(), strict=True):
            starts[language].append(first)
    for number, size in enumerate(SIZES.values()):
        windows = size // 15
        epochs = [starts[number][at : at + windows] for at in range(0, len(starts[number]) - windows + 1, windows)]
        assert len(epochs) >= 2
        assert all(len(set(epoch)) == windows for epoch in epochs)
        for epoch in epochs:  # one grid: all starts are a multiple of the width apart, round the ring
            places = sorted((first - FIRST_ORDINARY) % 1000 for first in epoch)
            gaps = np.diff([*places, places[0] + size])
            assert sorted(gaps.tolist()) == [15] * (windows - 1) + [15 + size % 15]


@pytest.mark.parametrize(("temperature", "mixed"), [(1.0, False), (2.0, False), (2.0, True), (1 / 0.7, True)])
def test_language_frequencies(temperature: float, mixed: bool) -> None:
    stream = train(temperature=temperature, mixed=mixed, rows=8)
    sentences = np.array([CORPUS.sentences(language, "train") for language in LANGUAGES])
    expected = (sentences / sentences.sum()) ** (1 / temperature)
    expected /= expected.sum()
    assert stream.probabilities == pytest.approx(expected)
    draws = 20_000 * (8 if mixed else 1)
    seen = stream.seen(20_000)
    for language, share in zip(LANGUAGES, expected, strict=True):
        count = seen[language]["rows"] / (1 if mixed else 8)
        assert abs(count - draws * share) < 5 * math.sqrt(draws * share * (1 - share))


def test_mixed_rows_are_drawn_independently() -> None:
    """The variance of a language's rows in a step is the binomial one: neither one draw for all nor a quota."""
    schedule = Schedule(np.array([0.3, 0.7]), 16, True, seed=1)
    counts = np.array([schedule.at(step)[1] for step in range(4000)])
    assert (counts.sum(axis=1) == 16).all()
    assert counts[:, 0].var() == pytest.approx(16 * 0.3 * 0.7, rel=0.12)


@pytest.mark.parametrize("mixed", [False, True])
def test_train_weights_are_the_global_mean(mixed: bool) -> None:
    batch = train(mixed=mixed, rows=512, row_format=RowFormat(64)).batch(3)
    assert batch.weights.shape == (512, 9)
    assert batch.weights.double().sum().item() == pytest.approx(1, rel=1e-6)
    assert batch.weights.unique().numel() == 1


def test_no_sentence_end_is_masked() -> None:
    for batch in (train(rows=200).batch(0), validation(rows=200).batch(0, 0)):
        assert (batch.tokens == EOS).any() and not (batch.labels == EOS).any() and not (batch.labels == BOS).any()


def test_seeds_steps_and_streams_differ() -> None:
    batches = [train(seed=s).batch(step) for s in (1, 2) for step in (0, 1)] + [validation(rows=12).batch(0, 0)]
    for a, b in combinations(batches, 2):
        assert not torch.equal(a.tokens, b.tokens) and not torch.equal(a.positions, b.positions)
        assert a.dropout_seed != b.dropout_seed


def test_the_order_of_a_languages_text_ignores_its_companions() -> None:
    """Mono and joint runs of one seed read a language alike; languages are numbered in the user's order."""
    mono, joint = train(languages=["te"], rows=40), train(languages=["sw", "te"], rows=40)
    step = next(step for step in range(100) if joint.batch(step).step_languages == (1,))
    before = joint.seen(step)["te"]["rows"] / 40
    assert before == int(before)
    assert np.array_equal(original(joint.batch(step)), original(mono.batch(int(before))))
    assert mono.batch(0).step_languages == (0,) and mono.languages == ("te",)


@pytest.mark.parametrize("size", [1, 3, 14, 15, 16, 31])
def test_tiny_corpora(size: int) -> None:
    corpus = Corpus({"xx": size}, eos=False)
    batch = train(corpus=corpus, languages=["xx"], rows=9).batch(11)
    places = original(batch) - FIRST_ORDINARY
    assert np.array_equal((places[:, :1] + np.arange(15)) % size, places)
    evaluation = EvaluationSet(corpus, "xx", "valid", languages=["xx"], row_format=RowFormat(16))
    assert evaluation.rows == max(1, size // 15)
    assert original(evaluation.batch(0, 1)).tolist() == [[FIRST_ORDINARY + i % size for i in range(15)]]


@settings(deadline=None, max_examples=60)
@given(step=st.integers(0, 10**6), rows=st.integers(4, 40), language=st.integers(0, 3))
def test_validation_weighs_every_language_the_same(step: int, rows: int, language: int) -> None:
    batch = validation(rows=rows).batch(step, language)
    assert batch.step_languages == (0, 1, 2, 3) and (batch.languages.diff() >= 0).all()
    counts = torch.bincount(batch.languages, minlength=4)
    assert counts.max() - counts.min() <= 1
    for number in range(4):
        assert batch.weights[batch.languages == number].double().sum().item() == pytest.approx(1 / 4, rel=1e-6)
        assert batch.weights[batch.languages == number].unique().numel() == 1


def test_validation_rotates_the_extra_rows() -> None:
    counts = [torch.bincount(validation(rows=10).batch(step, 0).languages, minlength=4) for step in range(4)]
    assert torch.stack(counts).sum(dim=0).tolist() == [10, 10, 10, 10]


def test_validation_does_not_repeat_text_within_an_epoch() -> None:
    stream = validation(corpus=Corpus({"en": 900, "sw": 900}, eos=False), languages=["en", "sw"], rows=4)
    first = [place for step in range(30) for place in original(stream.batch(step, 0))[:, 0].tolist()]
    assert len(set(first)) == len(first) == 120  # 60 windows a language, 2 rows a step
    english, swahili = (np.array([place % 1000 for place in first if place // 1000 == number]) for number in (0, 1))
    assert (english != swahili).any()  # every language in an order of its own


@pytest.mark.parametrize("held", [2, 3, 4])
@pytest.mark.parametrize("language", [0, 2, 4, None])
def test_languages_per_step_is_unbiased(held: int, language: int | None) -> None:
    """Over all subsets, equally likely, the weight vectors average to 1/L each: the estimate is the full one.

    A step's own language is always among them; one that mixes languages (None) has none.
    """
    stream = validation(corpus=Corpus(dict.fromkeys("abcde", 100)), languages=list("abcde"), languages_per_step=held)
    vectors: dict[tuple[int, ...], np.ndarray] = {}
    drawn = Counter[tuple[int, ...]]()
    for step in range(1200):
        chosen, weights, counts = stream.plan(step, language)
        assert language is None or (language in chosen and weights[chosen == language] == 1 / 5)
        assert counts.sum() == 10 and len(chosen) == held
        drawn[tuple(chosen)] += 1
        vectors[tuple(chosen)] = np.bincount(chosen, weights, minlength=5)
    subsets = math.comb(5, held) if language is None else math.comb(4, held - 1)
    assert len(vectors) == subsets
    assert np.mean(list(vectors.values()), axis=0) == pytest.approx(np.full(5, 1 / 5), abs=1e-15)
    assert all(abs(n - 1200 / subsets) < 5 * math.sqrt(1200 / subsets) for n in drawn.values())
    batch = stream.batch(3, language)
    chosen, weights, _ = stream.plan(3, language)
    assert batch.step_languages == tuple(chosen)
    for number, weight in zip(chosen.tolist(), weights, strict=True):
        assert batch.weights[batch.languages == number].double().sum().item() == pytest.approx(weight, rel=1e-6)


def test_validation_with_one_language() -> None:
    batch = validation(languages=["te"], rows=3).batch(5, 0)
    assert batch.step_languages == (0,) and batch.weights.double().sum().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("stream", "changes", "words"),
    [
        (validation, {"rows": 3}, ["meta.batch = 3", "4 languages", "meta.languages_per_step"]),
        (validation, {"languages_per_step": 1}, ["meta.languages_per_step = 1", "2 to 4"]),
        (validation, {"languages_per_step": 5}, ["meta.languages_per_step = 5", "2 to 4"]),
        (validation, {"row_format": RowFormat(100)}, ["'pt'", "'meta'", "70 tokens", "data.sequence_length = 100"]),
        (
            validation,
            {"corpus": Corpus({"en": 200, "sw": 0}), "languages": ["en", "sw"]},
            ["'sw'", "'meta' split is empty", "meta.text=train", "--meta-split", "synthetic ones"],
        ),
        (validation, {"languages": ["en", "en"]}, ["['en', 'en']", "en, sw, te, pt"]),
        (train, {"languages": ["en", "xx"]}, ["xx", "en, sw, te, pt"]),
        (train, {"languages": []}, ["one or more"]),
        (train, {"corpus": Corpus({"en": 0}), "languages": ["en"]}, ["'en'", "'train' split is empty"]),
        (train, {"temperature": 0}, ["data.temperature = 0"]),
        (train, {"row_format": RowFormat(1)}, ["data.sequence_length = 1"]),
    ],
)
def test_settings_are_refused_with_the_remedy(stream: Callable[..., object], changes: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        stream(**changes)
    assert all(word in str(error.value) for word in words), error.value


@settings(deadline=None, max_examples=100)
@given(size=st.integers(20, 400), taken=st.lists(st.integers(0, 399), max_size=12), seed=st.integers(0, 99))
def test_windows_beside_others_have_no_token_in_common_with_them(size: int, taken: list[int], seed: int) -> None:
    """The oracle tries every offset: those that overlap no taken window are drawn, and all of them."""
    windows, width = Windows(np.arange(size), 10, 0), 10
    starts = np.array([start % size for start in taken], dtype=np.int64)
    covered = np.zeros(size, dtype=bool)
    covered[(starts[:, None] + np.arange(width)) % size] = True
    free = [start for start in range(size) if not covered[(start + np.arange(width)) % size].any()]
    drawn = windows.beside(starts, (np.arange(20 * size) + 0.5) / (20 * size))
    if free:
        assert sorted(set(drawn.tolist())) == free
        shares = np.bincount(drawn, minlength=size)[free]
        assert shares.max() - shares.min() <= 1 + shares.mean() / 20, "all are equally likely"
    else:
        assert sorted(set(drawn.tolist())) == list(range(size)), "no room: anywhere"


@pytest.mark.parametrize("step", [0, 5, 31])
def test_validation_rows_of_the_training_text_are_not_the_steps_own(step: int) -> None:
    stream = train(rows=6, languages=["en", "sw"])
    rows = validation(text="train", training=stream, languages=["en", "sw"])
    (language,) = stream.batch(step).step_languages
    batch, read = rows.batch(step, language), original(stream.batch(step))
    own = original(batch)[batch.languages.numpy() == language]
    assert rows.crowded() == [] and validation(
        text="train", training=train(rows=20), languages=["en", "sw"]
    ).crowded() == ["sw"]
    assert len(own) and not set(own[own != EOS].tolist()) & set(read[read != EOS].tolist())
    assert not same(rows.batch(step, language), rows.batch(step + 1, language))
    parts = [rows.batch(step, language, *part) for part in ((0, 4), (4, 10))]
    assert same(joined(parts), batch), "slices join to the whole"


def test_halves_share_no_token_and_end_with_a_document() -> None:
    first = train(half="first", rows=40, languages=["en"])
    second = validation(text="half", languages=["en"])
    read = {int(t) for step in range(30) for t in np.unique(original(first.batch(step)))} - {EOS}
    held = {int(t) for step in range(60) for t in np.unique(original(second.batch(step, 0)))} - {EOS}
    assert max(read) < min(held) and read | held == set(CORPUS.tokens("en", "train").tolist()) - {EOS}
    assert first.seen(3)["en"]["epochs"] == pytest.approx(3 * 40 * 15 / 462), (
        "450 is inside a document, which ends at 462; its sentence ends at 455"
    )


@pytest.mark.parametrize("text", ["train", "half", "held_out"])
@pytest.mark.parametrize("per_step, every", [(None, 1), (2, 3)])
def test_what_is_seen_counts_the_rows_of_the_validation_loss(text: str, per_step: int | None, every: int) -> None:
    """Where they train the shared parameters too: counted by walking through the batches of all meta steps."""
    half = "first" if text == "half" else None

    def streams() -> tuple[TrainStream, ValidationStream]:
        training = train(half=half)
        options = {"text": text, "training": training, "languages_per_step": per_step, "every": every}
        return training, validation(**options)

    training, rows = streams()
    walked: Counter[str] = Counter()
    for step in range(20):
        batches = [training.batch(step)]
        if step % every == 0:
            batches.append(rows.batch(step, batches[0].step_languages[0]))
        walked.update(LANGUAGES[language] for batch in batches for language in batch.languages.tolist())
        seen = training.seen(step + 1, rows)
        assert {language: facts["rows"] for language, facts in seen.items()} == {n: walked[n] for n in LANGUAGES}
    resumed, rows = streams()
    assert resumed.seen(20, rows) == seen, "also where nothing was counted before"
    size = 350 * (2 if text == "held_out" else 1)  # tokens; here the meta split is as long as the training text
    assert seen["sw"]["epochs"] == pytest.approx(walked["sw"] * 15 / size)


def test_a_language_too_small_for_two_separate_rows_is_refused() -> None:
    corpus = Corpus({"en": 900, "pt": 29})
    stream = train(corpus=corpus, languages=["en", "pt"])
    with pytest.raises(UserError, match=r"'pt'.*29 tokens.*two separate rows.*data.sequence_length = 16"):
        validation(corpus=corpus, languages=["en", "pt"], text="train", training=stream)


def evaluation(**changes: object) -> EvaluationSet:
    return EvaluationSet(CORPUS, "sw", "valid", **({"languages": LANGUAGES, "row_format": RowFormat(16)} | changes))  # type: ignore[arg-type]


def test_evaluation_covers_the_split_once_under_fixed_masks() -> None:
    whole = evaluation().batch(0, 23)
    assert evaluation().rows == 350 // 15 == 23
    assert np.array_equal(original(whole).ravel(), CORPUS.tokens("sw", "valid")[: 23 * 15])
    assert whole.languages.tolist() == [1] * 23 and whole.step_languages == (1,)
    assert whole.weights.double().sum().item() == pytest.approx(1, rel=1e-6)
    for rows in (1, 4, 23, 100):
        parts = joined(list(evaluation().batches(rows)))
        kept = parts.weights[:, 0] > 0
        assert torch.equal(parts.tokens[kept], whole.tokens) and torch.equal(parts.positions[kept], whole.positions)
    assert not torch.equal(evaluation(seed=1).batch(0, 23).positions, whole.positions)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_evaluation_ranks_share_the_rows_in_equal_shapes(ranks: int, rows: int) -> None:
    shares = [list(evaluation().batches(rows, rank, ranks)) for rank in range(ranks)]
    shapes = {tuple(tuple(batch.tokens.shape) for batch in share) for share in shares}
    assert len(shapes) == 1
    kept = torch.cat([batch.tokens[batch.weights[:, 0] > 0] for share in shares for batch in share])
    assert sorted(kept.tolist()) == sorted(evaluation().batch(0, 23).tokens.tolist())
    total = sum(batch.weights.double().sum().item() for share in shares for batch in share)
    assert total == pytest.approx(1, rel=1e-6)


def test_copies_of_a_text_shorter_than_a_row_do_not_see_each_other() -> None:
    """Without boundaries a masked token could be read in the next copy of the text."""
    none = RowFormat(16, boundaries="none")
    assert evaluation(row_format=none).batch(0, 2).segment_ids is None
    short = EvaluationSet(Corpus({"en": 7}), "en", "valid", languages=["en"], row_format=none).batch(0, 1)
    assert short.segment_ids is not None
    assert short.segment_ids[0].tolist() == [0] * 8 + [1] * 7 + [2]


def test_evaluation_cap_spreads_over_the_split() -> None:
    capped = evaluation(max_rows=5)
    starts = original(capped.batch(0, 5))[:, 0]
    text = CORPUS.tokens("sw", "valid")
    assert capped.rows == 5 and starts.tolist() == [text[15 * window] for window in (0, 4, 9, 13, 18)]
    assert evaluation(max_rows=500).rows == 23


def test_unigram_perplexity_by_hand() -> None:
    class Skewed(Corpus):
        vocabulary = Vocabulary(9)

        def tokens(self, language: str, split: str) -> np.ndarray:
            return np.tile(np.array([5, 5, 5, 6, 7, EOS], dtype=np.int32), 50)

    measured = EvaluationSet(Skewed({"xx": 300}), "xx", "valid", languages=["xx"], row_format=RowFormat(11))
    labels = measured.batch(0, measured.rows).labels.numpy().ravel()
    assert set(labels.tolist()) == {5, 6, 7}
    probability = {5: 151 / 259, 6: 51 / 259, 7: 51 / 259}  # 250 tokens without </s>, 9 pieces
    expected = math.exp(-np.mean([math.log(probability[label]) for label in labels.tolist()]))
    assert measured.unigram_perplexity() == pytest.approx(expected)


def test_bits_per_character() -> None:
    assert bits_per_character(math.log(2), tokens=10, characters=40) == pytest.approx(0.25)
    assert evaluation().bits_per_character(math.log(2)) == pytest.approx((350 - 50) / 1400)


def test_prefetch_gives_the_same_items_made_ahead_on_another_thread() -> None:
    threads, made = set(), []

    def source() -> Iterator[int]:
        for item in range(50):
            threads.add(threading.current_thread())
            made.append(item)
            yield item

    items = prefetch(source(), depth=2)
    assert next(items) == 0
    patience = time.monotonic() + 20
    while len(made) < 4 and time.monotonic() < patience:
        time.sleep(0.01)
    time.sleep(0.05)  # in which it could run further ahead
    assert len(made) == 4  # one taken, two waiting, one in hand
    assert list(items) == list(range(1, 50))
    assert threading.current_thread() not in threads and not any(thread.is_alive() for thread in threads)


def test_prefetch_raises_the_error_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise KeyError("planted")

    items = prefetch(source())
    assert next(items) == 1
    with pytest.raises(KeyError, match="planted"):
        next(items)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_ends_when_the_consumer_stops_early(depth: int) -> None:
    def source() -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    items = prefetch(source(), depth)
    assert [next(items), next(items)] == [0, 1]
    assert any(thread.name == "prefetch" for thread in threading.enumerate())
    items.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
