"""Probes, retrieval and alignment of frozen states: scores against counts made by hand, closed forms, other solvers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlinterf_ds.analysis.probe import (
    PENALTY,
    Probe,
    csls,
    diagonal,
    distinct,
    f1,
    linked,
    read_parallel,
    retrieved,
    shown,
)
from mlinterf_ds.data import synthetic
from mlinterf_ds.errors import UserError


def test_a_probe_is_the_least_squares_solution_with_its_penalty() -> None:
    """Against NumPy's solver of the same problem with the penalty as further rows; a feature that never varies is left alone."""
    source = np.random.default_rng(0)
    states = source.normal(3, 5, (60, 7))
    states[:, 3] = 4.0
    classes = source.integers(0, 3, 60)
    probe = Probe.fitted(states, classes, 3)
    features = (states - states.mean(0)) / np.where(states.std(0) > 0, states.std(0), 1)
    targets = np.eye(3)[classes] - np.eye(3)[classes].mean(0)
    rows = np.concatenate([features, (PENALTY * 60) ** 0.5 * np.eye(7)])
    wanted = np.linalg.lstsq(rows, np.concatenate([targets, np.zeros((7, 3))]), rcond=None)[0]
    np.testing.assert_allclose(probe.weights, wanted, rtol=1e-9, atol=1e-12)
    scores = features @ wanted + np.eye(3)[classes].mean(0)
    assert probe.classes(states).tolist() == scores.argmax(1).tolist()


def test_a_probe_tells_separable_classes_apart_and_no_more() -> None:
    """Classes in three corners are all right, also on states that it never saw; of labels without a cause it makes no rule."""
    source = np.random.default_rng(1)
    corners = np.array([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    classes = source.integers(0, 3, 400)
    states = corners[classes] + source.normal(0, 0.5, (400, 2))
    assert (Probe.fitted(states[:200], classes[:200], 3).classes(states[200:]) == classes[200:]).all()
    noise = source.normal(0, 1, (400, 2))
    right = (Probe.fitted(noise[:200], classes[:200], 3).classes(noise[200:]) == classes[200:]).mean()
    assert 0.2 < right < 0.5


def test_retrieval_by_hand() -> None:
    """Two of three are nearest; CSLS takes the hub, which is near to all, out of the way."""
    similarity = np.array([[0.9, 0.1, 0.8], [0.2, 0.5, 0.6], [0.0, 0.1, 0.7]])
    # of the one nearest: rows 0.9, 0.6, 0.7; columns 0.9, 0.5, 0.8
    wanted = [[0.0, -1.2, -0.1], [-1.1, -0.1, -0.2], [-1.6, -1.0, -0.1]]
    np.testing.assert_allclose(csls(similarity, 1), wanted)
    assert similarity.argmax(1).tolist() == [0, 2, 2] and csls(similarity, 1).argmax(1).tolist() == [0, 1, 2]
    left = np.eye(4)
    assert retrieved(left, 3 * left) == (100.0, 100.0)
    # the right sides of 0 and 1 change places: two of four are wrong both ways
    assert retrieved(left, left[[1, 0, 2, 3]]) == (50.0, 50.0)


def test_links_and_their_f1_by_hand() -> None:
    """Words 0 and 1 cross; word 2 of the left is nearest to 0 of the right, which is nearer to another."""
    left = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.1]])
    right = np.array([[0.1, 1.0], [1.0, 0.0]])
    assert linked(left, right) == {(0, 1), (1, 0)}
    assert diagonal(3, 2) == {(0, 0), (1, 1)}
    # right 2 + 0, predicted 2 + 2, gold 3 + 2: F1 = 2 * 2 / (4 + 5)
    assert f1([({(0, 1), (1, 0)}, {(0, 1), (1, 0), (2, 2)}), ({(0, 0), (1, 1)}, {(0, 1), (1, 0)})]) == pytest.approx(
        400 / 9
    )
    assert f1([]) == 0.0


def test_synthetic_sentences_are_parallel_and_their_alignment_is_known() -> None:
    """Word by word the same concept, in the order of each grammar; nothing is left over on either side."""
    moved = 0
    for same, far in synthetic.parallel(["syn", "syn-far"], 200, seed=0):
        links = synthetic.aligned(same, far)
        assert sorted(i for i, _ in links) == list(range(len(same))) and len(links) == len(far)
        assert all(same[i].concept == far[j].concept and same[i].role == far[j].role for i, j in links)
        moved += links != diagonal(len(same), len(far))
    assert 150 < moved < 200
    for one, close in synthetic.parallel(["syn", "syn-close"], 20, seed=0):
        assert synthetic.aligned(one, close) == diagonal(len(one), len(close)), "of equal grammar"


def test_a_concept_that_is_said_twice_is_aligned_in_order() -> None:
    """the dog the cat / the-dog the-cat with articles after the nouns."""
    (tokens,) = next(iter(synthetic.parallel(["syn"], 1, seed=0)))
    the, dog, cat = (tokens[0]._replace(concept=concept) for concept in (1, 2, 3))
    assert synthetic.aligned([the, dog, the, cat], [dog, the, cat, the]) == {(0, 1), (1, 0), (2, 3), (3, 2)}


def test_pairs_that_cannot_be_told_apart_are_counted() -> None:
    pairs = [(["a"], ["x"]), (["b"], ["y"]), (["a"], ["z"]), (["c"], ["w"]), (["d"], ["w"])]
    notes: list[str] = []
    assert distinct([*pairs, (["e"], ["v"])], range(6), "en-fr", notes) == [1, 5]
    assert notes == ["parallel en-fr: 4 of 6 pairs have a sentence that another has too: left out"]
    with pytest.raises(UserError, match="en-fr has 1 distinct pairs"):
        distinct(pairs, range(5), "en-fr", notes)


def test_files_that_are_not_parallel_are_refused(tmp_path: Path) -> None:
    (tmp_path / "en").write_text("a  b\nc\nd e\n")
    (tmp_path / "fr").write_text("A\nB C\nD\n")
    files = {code: str(tmp_path / code) for code in ("en", "fr")}
    assert read_parallel(files, ["en", "fr"], 2) == {"en": [["a", "b"], ["c"]], "fr": [["A"], ["B", "C"]]}
    (tmp_path / "fr").write_text("A\nB C\n")
    with pytest.raises(UserError, match=r"not parallel line by line: .*en has 3, .*fr has 2"):
        read_parallel(files, ["en", "fr"], 2)


def test_the_table_shows_the_last_layer_beside_its_floors() -> None:
    scores = {"retrieval": {"fr": {"floor": 0.5, "embeddings": 10.0, "layer 1": 20.0, "layer 2": 33.33}}}
    text = shown(scores, ["floor", "lexical", "embeddings", "layer 1", "layer 2"], ["a note"])
    assert "| retrieval | fr | 33.3 | 10.0 |  | 0.5 |" in text and text.endswith("\na note\n")
