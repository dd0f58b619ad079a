"""The least effect that a study could detect: against simulated studies, and against tables."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_json
from mlinterf_ds.results.findings import Finding
from mlinterf_ds.results.statistics import Effect, detectable
from mlinterf_ds.study.cost import show_power, spreads


@pytest.mark.parametrize("seeds, power", [(3, 0.8), (5, 0.8), (8, 0.5)])
def test_so_many_simulated_studies_find_it(seeds: int, power: float) -> None:
    effect = detectable(2.0, seeds, 0.95, power)
    draws = np.random.default_rng(0).normal(effect, 2.0, (20_000, seeds))
    share = float(np.mean(stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05))
    assert share == pytest.approx(power, abs=4 * math.sqrt(power * (1 - power) / 20_000) + 0.002)


def test_many_seeds_are_the_normal_case() -> None:
    assert detectable(1.0, 10_000, 0.95) * 100 == pytest.approx(stats.norm.ppf(0.975) + stats.norm.ppf(0.8), rel=1e-3)
    assert detectable(1.0, 1, 0.95) == math.inf


@pytest.mark.parametrize("seeds, of_examples", [(3, 1.0), (6, 0.5), (6, 2.0)])
def test_so_many_simulated_studies_find_it_in_a_sample_of_examples(seeds: int, of_examples: float) -> None:
    """Studies of 60 examples, drawn anew: by seeds alone, the effect that is promised is found far more seldom."""

    def power(effect: float) -> float:
        draw, found = np.random.default_rng(seeds), 0
        for _ in range(1500):
            difficulty = draw.normal(0, of_examples * 60**0.5, 60)
            table = effect + draw.normal(0, 1.0, (seeds, 1)) + difficulty + draw.normal(0, 0.3, (seeds, 60))
            found += Effect.of(table.mean(axis=1).tolist(), [table / 60]).low > 0
        return found / 1500

    assert power(detectable(1.0, seeds, 0.95, of_examples=of_examples)) == pytest.approx(0.8, abs=0.05)
    assert power(detectable(1.0, seeds, 0.95)) < 0.7


def test_spreads_are_read_from_findings(tmp_path: Path) -> None:
    path = tmp_path / "findings.json"
    assert spreads(path) == {}
    rows = np.random.default_rng(0).normal(0.0, 6.0, 40)  # of which each seed sees the same, a little higher or lower
    effect = Effect.of([1.0, 3.0], [np.stack([rows, rows]) / 40])
    findings = [
        Finding("one", "a claim", "points", "undecided", effect),
        Finding("two", "", "", "undecided", Effect.of([1.0])),
    ]
    findings.append(Finding("three", "", "nats", "undecided", Effect.of([1.0, 3.0])))
    write_json(path, [row.row() for row in findings])
    known = spreads(path)
    assert known.keys() == {"one", "three"} and known["three"] == (pytest.approx(math.sqrt(2)), None)
    assert known["one"] == pytest.approx((math.sqrt(2), np.std(rows, ddof=1) / math.sqrt(40)))
    one, three = show_power(known, 5, 0.95).splitlines()[1:]
    assert one.split()[0] == "one" and three.endswith(
        "by seeds alone; the sample of test examples or rows of text comes on top)"
    )
    assert float(one.split()[1]) > float(three.split()[1]) and "over test examples" in one
    path.write_text("[{}]")
    with pytest.raises(UserError, match="findings.json: not a study's findings"):
        spreads(path)
