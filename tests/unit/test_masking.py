"""Randomness, windows and masking: exact properties, and proportions within five standard deviations."""

from collections import Counter
from math import factorial, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlinterf_ds.data.batch import Batch, Masker, generator, key, mask_rows, row_draws
from mlinterf_ds.data.tokenizer import BOS, EOS, MASK, SPECIAL_PIECES, Vocabulary
from mlinterf_ds.data.windows import Windows, shuffled
from mlinterf_ds.sections import RowFormat

FIRST_ORDINARY = len(SPECIAL_PIECES)
VOCABULARY = 1000


def text_rows(rows: int, length: int, eos_share: float = 0.1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    text = rng.integers(FIRST_ORDINARY, VOCABULARY, size=(rows, length))
    text[rng.random(text.shape) < eos_share] = EOS
    text[:, 0] = BOS
    return text


def within(count: float, trials: int, probability: float) -> bool:
    return abs(count - trials * probability) <= 5 * sqrt(trials * probability * (1 - probability))


@settings(deadline=None)
@given(start=st.integers(0, 20), split=st.integers(0, 20), end=st.integers(0, 20), step=st.integers(0, 10**12))
def test_draws_of_slices_are_slices_of_the_draws(start: int, split: int, end: int, step: int) -> None:
    start, split, end = sorted((start, split, end))
    source = key(3, "masks", size=16)
    whole = row_draws(source, step, 0, 20, 17, 3)
    parts = [row_draws(source, step, start, split, 17, 3), row_draws(source, step, split, end, 17, 3)]
    assert np.array_equal(np.concatenate(parts), whole[start:end])
    assert whole.shape[1] >= 16 + 2 * 3


def test_sources_and_indices_give_different_draws() -> None:
    sources = [key(seed, purpose, size=16) for seed in (0, 1, -1) for purpose in ("a", "b")]
    draws = {tuple(generator(source, index).random(4)) for source in sources for index in (0, 1, 2)}
    assert len(draws) == 18


@settings(deadline=None)
@given(length=st.integers(2, 60), share=st.floats(0.01, 0.9), eos=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_masking_changes_exactly_the_chosen_positions(length: int, share: float, eos: float, seed: int) -> None:
    rows, masked = text_rows(7, length, eos, seed), RowFormat(length, share).masked
    before = rows.copy()
    tokens, positions, labels = mask_rows(
        rows, row_draws(seed, 0, 0, 7, length, masked), masked, Vocabulary(VOCABULARY)
    )
    assert np.array_equal(rows, before)  # the input is left alone
    assert positions.shape == labels.shape == (7, masked)
    assert (positions >= 1).all() and (positions < length).all() and (np.diff(positions, axis=1) > 0).all()
    assert np.array_equal(labels, np.take_along_axis(rows, positions, axis=1))
    restored = tokens.copy()
    np.put_along_axis(restored, positions, labels, axis=1)
    assert np.array_equal(restored, rows)
    # </s> only where nothing else is left
    others = (rows[:, 1:] != EOS).sum(axis=1)
    assert np.array_equal((labels == EOS).sum(axis=1), np.maximum(0, masked - others))


@pytest.mark.parametrize(("length", "expected"), [(256, 38), (128, 19), (2, 1), (4, 1), (21, 3)])
def test_masked_per_row(length: int, expected: int) -> None:
    assert RowFormat(length).masked == expected


def test_eighty_ten_ten_and_uniform_positions() -> None:
    rows, masked = text_rows(4000, 65, eos_share=0), 10
    tokens, positions, labels = mask_rows(rows, row_draws(5, 1, 0, 4000, 65, masked), masked, Vocabulary(VOCABULARY))
    now, trials = np.take_along_axis(tokens, positions, axis=1), labels.size
    same_by_chance = 0.1 / (VOCABULARY - FIRST_ORDINARY)
    assert within((now == MASK).sum(), trials, 0.8)
    assert within((now == labels).sum(), trials, 0.1 + same_by_chance)
    replaced = now[(now != MASK) & (now != labels)]
    assert within(len(replaced), trials, 0.1 - same_by_chance)
    assert replaced.min() == FIRST_ORDINARY and replaced.max() == VOCABULARY - 1
    assert within((replaced < 500).sum(), len(replaced), (500 - FIRST_ORDINARY) / (VOCABULARY - FIRST_ORDINARY))
    columns = np.bincount(positions.ravel(), minlength=65)
    assert columns[0] == 0 and all(within(count, 4000, masked / 64) for count in columns[1:])


@settings(deadline=None)
@given(size=st.integers(1, 3000), source=st.integers(0, 2**64 - 1))
def test_shuffled_is_a_permutation(size: int, source: int) -> None:
    image = shuffled(np.arange(size), size, np.full(size, source, dtype=np.uint64))
    assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_are_equally_likely(size: int) -> None:
    tries = 200 * factorial(size)
    keys = np.repeat(np.array([key(i) for i in range(tries)], dtype=np.uint64), size)
    images = shuffled(np.tile(np.arange(size), tries), size, keys).reshape(tries, size)
    counts = Counter(map(tuple, images.tolist()))
    assert len(counts) == factorial(size)
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    freedom = factorial(size) - 1
    assert chi_square < freedom + 5 * sqrt(2 * freedom) + 10


def test_shuffled_of_a_large_range_spreads_neighbours() -> None:
    size = 3 * 10**9  # a permutation that nobody would want to hold in memory
    image = shuffled(np.arange(1000), size, np.full(1000, key("any"), dtype=np.uint64))
    assert len(set(image.tolist())) == 1000 and image.min() >= 0 and image.max() < size
    assert within((image < size // 2).sum(), 1000, 0.5)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.16


@settings(deadline=None)
@given(tokens=st.integers(1, 500), width=st.integers(1, 40), source=st.integers(0, 2**64 - 1), epoch=st.integers(0, 99))
def test_an_epoch_sees_every_window_once(tokens: int, width: int, source: int, epoch: int) -> None:
    windows = Windows(np.arange(tokens, dtype=np.uint16), width, source)
    assert windows.count == max(1, tokens // width)
    rows, _ = windows.visit(epoch * windows.count + np.arange(windows.count))
    assert rows.shape == (windows.count, width)
    assert np.array_equal((rows[:, :1] + np.arange(width)) % tokens, rows)  # consecutive text, round the ring
    if tokens >= width:
        assert len(np.unique(rows)) == windows.count * width  # no token twice


def test_epochs_differ_in_order_and_grid_and_leave_no_token_out() -> None:
    windows = Windows(np.arange(107), 10, key("text"))
    epochs = [windows.visit(epoch * 10 + np.arange(10))[0] for epoch in range(30)]
    assert len({int(rows.min(axis=1)[0]) for rows in epochs}) > 10
    assert len({int(rows[0, 0]) % 10 for rows in epochs}) > 5
    assert len(np.unique(np.concatenate(epochs))) == 107
    backwards = windows.visit(np.arange(300)[::-1])[0][::-1]  # a visit depends on its number only
    assert np.array_equal(backwards, np.concatenate(epochs))


def test_masker_builds_a_batch_that_moves_between_devices() -> None:
    masker = Masker(seed=1, purpose="train", row_format=RowFormat(20), vocabulary=Vocabulary(VOCABULARY))
    text = text_rows(4, 19)
    batch = masker.batch(
        text, text == EOS, np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 0, 2, 2]), (0, 2), step=3, start=8
    )
    assert batch.tokens.dtype == batch.positions.dtype == batch.labels.dtype == batch.languages.dtype == torch.int64
    assert batch.tokens.shape == (4, 20) and (batch.tokens[:, 0] == BOS).all()
    assert batch.weights.dtype == torch.float32 and batch.weights.shape == (4, 3)
    assert batch.weights[:, 0].tolist() == [1, 2, 3, 4]
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and moved.tokens.device.type == moved.weights.device.type == "meta"
    assert (moved.step_languages, moved.dropout_seed) == ((0, 2), batch.dropout_seed)


def test_dropout_seeds_tell_seed_purpose_step_and_slice_apart() -> None:
    text, weights, languages = text_rows(1, 9), np.ones(1), np.zeros(1, dtype=int)
    seeds = {
        Masker(seed, purpose, RowFormat(10), Vocabulary(VOCABULARY))
        .batch(text, text == EOS, weights, languages, (0,), step=step, start=start)
        .dropout_seed
        for seed in (0, 1)
        for purpose in ("train", "meta")
        for step in (0, 1)
        for start in (0, 1)
    }
    assert len(seeds) == 16
    assert all(torch.Generator().manual_seed(seed).initial_seed() == seed for seed in seeds)


def test_another_models_special_pieces() -> None:
    """CamemBERT's and BERT's special pieces lie elsewhere: text is masked by that vocabulary's, and drawn from its ordinary ones."""
    vocabulary = Vocabulary(60, bos=5, pad=1, eos=6, unk=3, mask=59, others=(0, 2, 4))
    assert vocabulary.ordinary.tolist() == list(range(7, 59))
    rng = np.random.default_rng(3)
    text = rng.choice(vocabulary.ordinary, size=(3000, 20))
    text[:, ::7] = vocabulary.eos
    masker = Masker(0, "train", RowFormat(21, 0.3), vocabulary)
    begins, languages = np.zeros(text.shape, bool), np.zeros(len(text), int)
    batch = masker.batch(text, begins, np.ones(len(text)), languages, (0,), step=0, start=0)
    tokens, positions, labels = (x.numpy() for x in (batch.tokens, batch.positions, batch.labels))
    assert (tokens[:, 0] == 5).all() and not (labels == 6).any()
    seen = np.take_along_axis(tokens, positions, axis=1)
    assert within((seen == 59).sum(), seen.size, 0.8)
    drawn = seen[(seen != 59) & (seen != labels)]
    assert np.unique(drawn).tolist() == list(range(7, 59))
