"""The least effect that a study could detect: against simulated studies, and against tables."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_json
from mlinterf_ds.results.statistics import detectable
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


def test_spreads_are_read_from_findings(tmp_path: Path) -> None:
    path = tmp_path / "findings.json"
    assert spreads(path) == {}
    write_json(path, [{"name": "one", "effect": {"values": [1.0, 3.0]}}, {"name": "two", "effect": {"values": [1.0]}}])
    assert spreads(path) == {"one": pytest.approx(math.sqrt(2))}
    assert "one" in show_power(spreads(path), 5, 0.95)
    path.write_text("[{}]")
    with pytest.raises(UserError, match="findings.json: not a study's findings"):
        spreads(path)
