"""Interference: intervals, distances and pairing against hand-made examples; every figure's CSV is its input."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlinterf_ds.analysis import distance
from mlinterf_ds.analysis.interference import draw
from mlinterf_ds.data.prepare.main import prepare
from mlinterf_ds.data.synthetic import write_sentences
from mlinterf_ds.errors import UserError
from mlinterf_ds.plots import bars, curves
from mlinterf_ds.plots.bars import Value
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.pretrain.report import LossTable
from mlinterf_ds.pretrained import Pretrained
from mlinterf_ds.results.interference import (
    BITS,
    Comparison,
    InterferenceResults,
    compare_bits,
    compare_scores,
    transfer,
)
from mlinterf_ds.results.runs import FineTunedRun, PretrainedRun, Setup, read_losses
from mlinterf_ds.results.statistics import Effect
from mlinterf_ds.sections import MetaConfig
from tests.commands import table

EN_SW = Setup(("en", "sw"), "joint")


def test_pairing_by_hand() -> None:
    mono = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 6.0]])
    joint = np.array([[1.5, 2.5, 3.5], [1.5, 2.5, 6.5]])
    row = Comparison.of(BITS, "en", EN_SW, [0, 4], mono, joint)
    assert (row.mono, row.joint, row.rows, row.partners) == ((2.0, 3.0), (2.5, 3.5), 3, ("sw",))
    assert row.effect.mean == 0.5 and not row.effect.has_interval, "rows that all agree say nothing of others"
    # Each row is about half a bit worse: unpaired, rows of 1 to 6 would hide it.
    shifted = joint + np.array([[0.0, 0.01, -0.01], [0.01, 0.0, 0.0]])
    assert 0.4 < Comparison.of(BITS, "en", EN_SW, [0, 4], mono, shifted).effect.low < 0.5
    task = Comparison.of("ner f1", "en", EN_SW, [0, 4], mono, joint)
    assert task.effect.mean == -0.5 and not task.effect.has_interval, "seeds that agree, of unknown examples"


# --- distances -------------------------------------------------------------------------------------------------------
def test_settings_of_the_meta_step_count_between_meta_models() -> None:
    def run(variant: str, **meta: Any) -> PretrainedRun:
        config = RunConfig(variant=variant, meta=MetaConfig(**meta)).model_dump()
        return PretrainedRun("folder", Pretrained(Path("folder"), {"config": config, "languages": ["en", "sw"]}))

    reused = run("meta_adpt", order="simultaneous", reuse=True, check_every=7)
    unlike = run("meta_adpt").settings_unlike(reused)
    assert unlike == ["meta.order phi_first against simultaneous", "meta.reuse False against True"]
    assert run("adpt").settings_unlike(reused) == [], "a plain model takes no meta step"
    _, notes = compare_bits({}, {reused.setup: {0: run("meta_adpt"), 1: reused}}, {}, [])
    assert notes == [f"meta_adpt on en-sw: seeds 0 and 1 differ in {', '.join(unlike)}"]


def test_vocabulary_distance_by_hand() -> None:
    left, right = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
    assert distance.vocabulary_distance(left, right) == distance.vocabulary_distance(right, left) == 0.5
    assert distance.vocabulary_distance(left, left) == 0
    assert distance.vocabulary_distance(left, np.array([0.0, 0.0, 1.0])) == 1


def test_jensen_shannon_by_hand() -> None:
    a, b = Counter("aab"), Counter("abb")
    # The middle is (1/2, 1/2): each side is D((2/3, 1/3) || (1/2, 1/2)) = 1 - H(1/3) bits.
    entropy = -(2 / 3) * math.log2(2 / 3) - (1 / 3) * math.log2(1 / 3)
    assert distance.jensen_shannon(a, b) == pytest.approx(math.sqrt(1 - entropy))
    assert distance.jensen_shannon(a, b) == distance.jensen_shannon(b, a)
    assert distance.jensen_shannon(a, Counter("aabaab")) == pytest.approx(0, abs=1e-7)
    assert distance.jensen_shannon(a, Counter("xyz")) == pytest.approx(1)


def test_character_sequences_stay_inside_a_sentence() -> None:
    one, two, three = distance.ngrams(["ab a", "b"])
    assert one == {"a": 2, "b": 2, " ": 1} and two == {"ab": 1, "b ": 1, " a": 1} and three == {"ab ": 1, "b a": 1}
    far = distance.ngrams(["xyz"])
    assert distance.character_distance(distance.ngrams(["ab a"]), far) == pytest.approx(1)


def test_synthetic_languages_in_order(tmp_path: Path) -> None:
    """`far` is farthest in shared words and letters; `close` and `mid` differ in word order, which these do not see."""
    codes = ["syn", "syn-close", "syn-mid", "syn-far"]
    for code in codes:
        write_sentences(code, tmp_path / code, 400, seed=0)
    corpus = prepare(
        {code: [tmp_path / code] for code in codes}, tmp_path / "corpus", vocabulary_size=900, progress=False, workers=1
    )
    matrices = distance.distances(corpus, codes)
    assert list(matrices) == ["vocabulary", "characters", "planted"]
    for name, matrix in matrices.items():
        assert (matrix == matrix.T).all() and (np.diagonal(matrix) == 0).all() and matrix.max() <= 1, name
        _, close, mid, far = matrix[0]
        assert far > 1.15 * max(close, mid), name
        assert close == pytest.approx(mid, abs=0.05) or name == "planted"
    assert matrices["planted"][0].tolist() == pytest.approx([0, 0.20, 0.3667, 0.95], abs=1e-3), "as `language` states"
    whole = (tmp_path / "syn").read_text().split("\n")
    assert set(distance.sentences(corpus, "syn", 7)) < set(whole) and len(distance.sentences(corpus, "syn", 7)) == 7


def test_a_low_resource_version_beside_the_whole_language(tmp_path: Path) -> None:
    """As launch/recipes/low_resource_fr.toml says: same vocabulary, same held-out text, a subset to train on."""
    write_sentences("syn", tmp_path / "text", 500, seed=0)
    sources = {"fr": [tmp_path / "text"], "frl": [tmp_path / "text"]}
    corpus = prepare(sources, tmp_path / "corpus", vocabulary_size=500, limits={"frl": 120}, progress=False, workers=1)
    for split in ("valid", "test"):
        assert (corpus.tokens("fr", split) == corpus.tokens("frl", split)).all()
    whole, low = (set(distance.sentences(corpus, code, 1000)) for code in ("fr", "frl"))
    assert len(low) == 120 < len(whole) and low < whole


# --- scores of tasks -------------------------------------------------------------------------------------------------
def tuned(
    folder: Path, languages: str, seed: int, trained: str, per_seed: dict[str, list[float]], **more: Any
) -> FineTunedRun:
    """A fine-tuning read from its summary.json, as far as that matters here."""
    summary = {
        "task": "ner",
        "metric": "f1",
        "finished": True,
        "seeds": [0, 1],
        "languages": languages.split("-"),
        "variant": "joint" if "-" in languages else "mono",
        "checkpoint": f"{folder}/runs/{languages}-{seed}/checkpoints/step-00000009",
        "pretraining_seed": seed,
        "examples": {"train": {trained: 9}},
        "per_seed": per_seed,
        "baseline": dict.fromkeys(per_seed, 1.0),
        "metrics": {code: {} for code in per_seed},
        "data": {f"test {code}": f"{code}.tsv" for code in per_seed},
    } | more
    output = folder / f"ner-{languages}-{seed}-{trained}"
    output.mkdir(parents=True)
    (output / "summary.json").write_text(json.dumps(summary))
    return FineTunedRun.open(str(output))


def test_scores_are_paired_by_both_seeds(tmp_path: Path) -> None:
    runs = [
        tuned(tmp_path, "sw", 0, "sw", {"sw": [50.0, 52.0]}),
        tuned(tmp_path, "sw", 1, "sw", {"sw": [60.0, 62.0]}),
        tuned(tmp_path, "en-sw", 1, "sw", {"sw": [57.0, 61.0], "en": [9.0, 9.0]}),
        tuned(tmp_path, "en-hi-sw", 0, "sw", {"sw": [70.0, 80.0]}),
    ]
    (row,), larger = compare_scores(runs, ["en", "sw"], [f"{tmp_path}/runs/en-hi-sw-0"])
    assert (row.metric, row.language, row.partners, row.seeds, row.rows) == ("ner f1", "sw", ("en",), (1,), 2)
    assert (row.mono, row.joint) == ((61.0,), (59.0,)), "seed 1 alone has both"
    assert (row.effect.mean, row.effect.values) == (2.0, (3.0, 1.0)), "one pretraining seed: fine-tuning varies"
    assert larger == {("ner f1", "sw"): (75.0,)}


def test_each_pretraining_seed_may_be_tuned_with_a_seed_of_its_own(tmp_path: Path) -> None:
    """As a study does it."""
    runs = [
        tuned(tmp_path, name, seed, "sw", {"sw": [score + 3 * seed]}, seeds=[seed])
        for name, score in (("sw", 50.0), ("en-sw", 49.0))
        for seed in (0, 1, 2)
    ]
    ((row,), _) = compare_scores(runs, ["sw"])
    assert (row.seeds, row.rows, row.mono, row.joint) == ((0, 1, 2), 1, (50.0, 53.0, 56.0), (49.0, 52.0, 55.0))
    assert row.effect.mean == 1.0 and not row.effect.has_interval
    other = tuned(tmp_path / "other", "en-sw", 0, "sw", {"sw": [49.0]}, seeds=[1])
    with pytest.raises(UserError, match=r"ner f1 in sw.*none of finetune\.seeds in common"):
        compare_scores([runs[0], other], ["sw"])


def test_intervals_of_tasks_know_the_test_examples(tmp_path: Path) -> None:
    """300 examples near chance, two seeds that differ by one example: the standard error is points, not a third of one."""
    runs = []
    for name, count in (("sw", 100), ("en-sw", 101)):
        right = np.roll(np.arange(300) < count, 50 * (name == "sw"))
        score, floors = 100 * float(right.mean()), {"majority": {"f1": 33.3}, "lexical": {"f1": 40.0}}
        run = tuned(tmp_path, name, 0, "sw", {"sw": [score, score]}, baselines={"sw": floors}, baseline={"sw": 33.3})
        for seed in (0, 1):
            path = run.counts_file("sw", seed)
            path.parent.mkdir(parents=True)
            path.write_text("right,predicted,gold\n" + "".join(f"{value:d},1,1\n" for value in right))
        runs.append(run)
    ((row,), _) = compare_scores(runs, ["sw"])
    assert row.effect.values == pytest.approx([-1 / 3] * 2) and row.effect.examples == 300
    error = np.std((np.arange(300) < 101) * 1.0 - np.roll(np.arange(300) < 100, 50), ddof=1) * 100 / 300**0.5
    assert row.effect.high - row.effect.mean == pytest.approx(1.968 * error, rel=1e-3) and error > 3
    whole = results([row], ("en", "sw"), tuned=runs)
    assert whole.rows()[0]["floors"] == {"majority": 33.3, "lexical": 40.0}
    assert "33.300    40.000" in whole.shown() and "joint 33.7 is below the lexical baseline, 40.0" in whole.shown()


def test_transfer_by_hand(tmp_path: Path) -> None:
    runs = [
        tuned(tmp_path, "en-sw", 0, "en", {"en": [80.0, 90.0], "sw": [40.0, 50.0]}),
        tuned(tmp_path, "en-hi", 0, "en", {"en": [70.0, 80.0], "hi": [20.0, 30.0]}),
        tuned(tmp_path, "en", 0, "en", {"en": [99.0, 99.0]}),
    ]
    tables = transfer(runs, ["en", "hi", "sw"])
    assert list(tables) == ["ner f1"] and list(tables["ner f1"]) == ["joint"], "a mono model transferred nothing"
    np.testing.assert_array_equal(tables["ner f1"]["joint"][0], [80.0, 25.0, 45.0])
    assert np.isnan(tables["ner f1"]["joint"][1:]).all()


def test_bad_summaries_of_tasks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere.*finished launch/finetune.py"):
        FineTunedRun.open(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"ner-en-sw-0-sw.*resume=auto"):
        tuned(tmp_path, "en-sw", 0, "sw", {"sw": [1.0, 2.0]}, finished=False)
    (tmp_path / "ner-en-sw-0-sw/summary.json").write_text('{"finished": true}')
    with pytest.raises(UserError, match="not the summary of a fine-tuning"):
        FineTunedRun.open(str(tmp_path / "ner-en-sw-0-sw"))
    other = [
        tuned(tmp_path / "other", "sw", 0, "sw", {"sw": [1.0, 2.0]}),
        tuned(tmp_path / "other", "en-sw", 0, "sw", {"sw": [1.0, 2.0]}, data={"test sw": "another.tsv"}),
    ]
    with pytest.raises(UserError, match="different data.*another.tsv"):
        compare_scores(other, ["sw"])
    with pytest.raises(UserError, match="both score ner f1 of mono on sw with train.seed=0"):
        compare_scores([other[0]] * 2, ["sw"])


def results(comparisons: list[Comparison], languages: tuple[str, ...], **more: Any) -> InterferenceResults:
    empty: dict[str, Any] = {"of_larger": {}, "mono": {}, "joint": {}, "larger": {}, "tuned": []}
    return InterferenceResults(comparisons, languages=languages, **(empty | more))


def test_intervals_with_zero_are_counted() -> None:
    """Of a null control most should include zero; an effect without an interval counts on neither side."""
    setup = Setup(("en", "en-b"), "joint")
    rows = [
        Comparison(BITS, "en", setup, (0, 1), 1, (1.0, 1.0), (1.0, 1.0), Effect((0.0, mean), mean, low, high))
        for mean, low, high in ((0.1, -0.1, 0.3), (0.2, 0.1, 0.3), (-0.2, -0.3, 0.0), (0.1, -math.inf, math.inf))
    ]
    assert results(rows, ("en", "en-b")).with_zero == (2, 3)
    assert "2 of 3 intervals include zero" in results(rows, ("en", "en-b")).shown()


def test_figures_of_tasks_alone(tmp_path: Path) -> None:
    runs = [
        tuned(tmp_path, "sw", 0, "sw", {"sw": [50.0, 52.0]}),
        tuned(tmp_path, "en-sw", 0, "sw", {"sw": [57.0, 61.0], "en": [9.0, 10.0]}),
    ]
    comparisons, _ = compare_scores(runs, ["en", "sw"])
    draw(tmp_path / "out", results(comparisons, ("en", "sw"), tuned=runs))
    cells = {(row["row"], row["column"]): row["value"] for row in table(tmp_path / "out" / "transfer-ner-f1.csv")}
    assert cells == {("en", "en"): "", ("en", "sw"): "", ("sw", "en"): "9.5", ("sw", "sw"): "59.0"}
    (row,) = table(tmp_path / "out" / "interference.csv")
    assert (row["language"], row["interference"], row["mono_epochs"]) == ("sw", "-8.0", "")
    cells = {(row["row"], row["column"]): row["value"] for row in table(tmp_path / "out" / "pairs-ner-f1.csv")}
    assert cells["sw", "en"] == "-8.0" and cells["en", "sw"] == ""


def of_pair(language: str, other: str, difference: float) -> Comparison:
    setup = Setup(tuple(sorted((language, other))), "joint")
    return Comparison.of(BITS, language, setup, [0], np.zeros((1, 2)), np.full((1, 2), difference))


def test_rank_correlation_with_distance() -> None:
    """Interference 0.1, 0.2, 0.3 and 0.4 against distances 0.5, 0.5, 0.9 and 0.9: ranks by hand give 0.894."""
    distances = {"vocabulary": np.array([[0, 0.5, 0.9], [0.5, 0, np.nan], [0.9, np.nan, 0]])}
    rows = [of_pair("en", "fr", 0.1), of_pair("fr", "en", 0.2), of_pair("en", "hi", 0.3), of_pair("hi", "en", 0.4)]
    of_all = results([*rows, of_pair("fr", "hi", 9.0)], ("en", "fr", "hi"), distances=distances)
    (entry,) = of_all.correlations()["joint"].values()
    assert entry == {"rho": pytest.approx(2 / math.sqrt(5)), "pairs": 4}
    assert results(rows[:3], ("en", "fr", "hi"), distances=distances).correlations() == {}


# --- figures ---------------------------------------------------------------------------------------------------------
def test_pairs_leave_what_is_missing() -> None:
    three = Comparison.of(BITS, "sw", Setup(("en", "hi", "sw"), "joint"), [0], np.array([[1.0]]), np.array([[3.0]]))
    matrix = results([of_pair("sw", "en", 0.25), three], ("en", "hi", "sw")).pair_matrices(BITS)["joint"]
    assert matrix[2, 0] == 0.25 and np.isnan(matrix).sum() == 8


@pytest.mark.parametrize("draw_it", [bars.bars, bars.intervals])
def test_the_csv_is_what_is_drawn(tmp_path: Path, draw_it: Any) -> None:
    values = [Value("sw with en", "mono", 2.5, 2.25, 2.75), Value("sw with en", "joint", 2.625)]
    draw_it(values, tmp_path / "a" / "f.png", title="Суахили", label="bits", caption="data " * 40)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["f.csv", "f.png", "f.svg"]
    assert [tuple(row.values()) for row in table(tmp_path / "a" / "f.csv")] == [
        ("sw with en", "mono", "2.5", "2.25", "2.75"),
        ("sw with en", "joint", "2.625", "", ""),
    ]


def test_curves_of_a_hundred_languages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "MOST_PANELS", 3)
    data = {f"l{n:02d}": {"mono": {0: [(0, 9.0), (5, 4.0 + n)], 3: [(0, 8.0)]}} for n in range(100)}
    curves.seed_curves(data, tmp_path / "f.png", title="t", label="perplexity", caption="c")
    lines = (tmp_path / "f.csv").read_text().splitlines()
    assert lines[:4] == ["language,model,seed,step,value", "l00,mono,0,0,9.0", "l00,mono,0,5,4.0", "l00,mono,3,0,8.0"]
    assert len(lines) == 301


def test_means_over_stretches_of_steps() -> None:
    points = [(step, float(step)) for step in range(1, 11)] + [(11, math.nan)]
    assert curves.binned(points, first=2, last=10, bins=4) == [(4, 3.5), (6, 5.5), (8, 7.5), (10, 9.5)]
    assert curves.binned(points, first=8, last=12, bins=100) == [(9, 9.0), (10, 10.0)]


# --- train.csv -------------------------------------------------------------------------------------------------------
def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "run" / "train.csv"
    first = LossTable(path, 0)
    for step in range(1, 8):
        first.add(step, {"en": step / 8} if step % 2 else {"en": step / 8, "sw": 0.5}, 1e-3, 100 * step)
    first.file.flush()
    with path.open("a") as file:
        file.write("8,en,0.1")  # killed in the middle of a line
    again = LossTable(path, 5)
    again.add(6, {"sw": 0.25}, 1e-3, 600)
    again.file.close()
    assert read_losses(path) == {
        "en": [(1, 0.125), (2, 0.25), (3, 0.375), (4, 0.5), (5, 0.625)],
        "sw": [(2, 0.5), (4, 0.5), (6, 0.25)],
    }
    assert table(path)[-1] == {"step": "6", "language": "sw", "loss": "0.25", "lr": "0.001", "tokens": "600"}
    LossTable(path, 0).file.close()  # a run that starts again
    assert path.read_text() == "step,language,loss,lr,tokens\n"


def test_what_is_no_table_of_losses(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a table of step,language"):
        read_losses(tmp_path / "train.csv")
    with pytest.raises(UserError, match="pretraining writes it"):
        read_losses(tmp_path / "none.csv")
