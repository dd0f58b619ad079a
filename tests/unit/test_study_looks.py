"""A study that adds seeds until its claims are decided: when it stops, and that many looks do not decide by chance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlinterf_ds.errors import UserError
from mlinterf_ds.results.findings import Finding, judged
from mlinterf_ds.results.statistics import Effect, positive
from mlinterf_ds.study.main import main
from mlinterf_ds.study.sequential import Decided, Looks, level, settled, until_decided


def of(values: list[float], confidence: float) -> Finding:
    effect = Effect.of(values, confidence=confidence)
    return judged(Finding("claim", "a claim", "points", "not measured", effect), positive(effect), confidence)


def test_the_levels_add_up_to_alpha() -> None:
    assert sum(level(0.05, look) for look in range(1, 100_000)) == pytest.approx(0.05, rel=1e-4)


def test_it_stops_where_nothing_is_open_or_the_time_is_over() -> None:
    values = [1.0, 3.0, 2.2, 1.7, 2.4, 1.9, 2.1]
    asked: list[list[int]] = []

    def study(seeds: list[int], confidence: float, decided: object) -> list[Finding]:
        asked.append(seeds)
        return [of(values[: len(seeds)], confidence)]

    looks = until_decided(study, [0, 1], 0.95, hours=1.0)
    assert looks.decided["claim"]["verdict"] == "holds" and not looks.open
    assert asked[0] == [0, 1] and asked[-1] == list(range(int(str(looks.decided["claim"]["seeds"])))) and len(asked) > 1
    ticks = iter(range(0, 10**6, 1000))  # every question takes 1,000 seconds
    asked.clear()
    looks = until_decided(study, [0, 1], 0.95, hours=0.5, clock=lambda: float(next(ticks)))
    assert looks.open == ["claim"] and len(asked) == 1


@pytest.mark.parametrize(
    "values, rows, is_open",
    [
        ([2.0], 0, True),  # one seed
        ([2.0], 50, True),  # one seed, whose test examples are known
        ([3.0, -2.0, 1.0], 0, True),
        ([1.0, -1.0], 0, False),  # a tie
        ([2.0, 2.0], 0, False),  # no spread
        ([3.0, 2.0, 1.0], 50, False),  # the test set is too small
        ([1.0, 0.9, 1.1], 0, False),  # decided
    ],
)
def test_open_is_what_more_seeds_could_decide(values: list[float], rows: int, is_open: bool) -> None:
    shares = [np.tile(np.random.default_rng(0).normal(0, 1, rows), (len(values), 1))] if rows else []
    effect = Effect.of(values, shares)
    row = judged(Finding("claim", "a claim", "points", "not measured", effect), positive(effect), 0.95)
    looks = Looks()
    looks.add(1, len(values), [row])
    assert looks.open == ["claim"] * is_open


def test_a_study_of_one_seed_gets_more() -> None:
    looks = until_decided(
        lambda seeds, confidence, decided: [of([1.0, 1.1, 0.9, 1.0][: len(seeds)], confidence)], [0], 0.95, 1.0
    )
    assert looks.decided["claim"]["verdict"] == "holds"


def test_what_a_look_has_decided_is_reported_so_by_later_ones() -> None:
    """A stricter look alone would call it undecided."""
    values, reports = [2.0, 1.6, 2.4, -3.0, 9.0, -4.0], []

    def study(seeds: list[int], confidence: float, decided: Decided) -> list[Finding]:
        findings = [of(values[: len(seeds)], confidence), replace(of([1.0, -1.0, 2.0], confidence), name="other")]
        reports.append(settled(findings, decided))
        return findings if len(seeds) < 6 else []

    kept: list[tuple[dict, list[int], float]] = []
    until_decided(study, [0, 1, 2], 0.95, 1.0, lambda looks, seeds, at: kept.append((dict(looks.decided), seeds, at)))
    assert [(len(seeds), at) for _, seeds, at in kept] == [(n + 2, 1 - level(0.05, n)) for n in range(1, 5)]
    assert all(decided["claim"]["look"] == 1 for decided, _, _ in kept)
    assert [row[0].verdict for row in reports] == ["holds"] * 4 and not reports[-1][0].open
    assert "decided at look 1, with 3 seeds" in reports[-1][0].note and not reports[0][0].note
    assert {row[1].verdict for row in reports} == {"undecided"}


@pytest.mark.parametrize("asked", [["0"], ["nan"], ["1", "--executor", "slurm"]])
def test_what_it_cannot_do_is_refused(asked: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--until-decided .*: give hours above 0, and run the study on this machine"):
        main(["--recipe", "study_ci", "--set", f"output={tmp_path}/study", "--until-decided", *asked])
    assert not (tmp_path / "study").exists()


def test_many_looks_are_rarely_wrong_where_nothing_is() -> None:
    """Of 400 studies of no effect that may look nine times, at most a share of .05 decides one (and three standard errors)."""
    wrong = 0
    for draw in range(400):
        values = np.random.default_rng(draw).normal(0, 1, 10).tolist()
        looks = until_decided(
            lambda seeds, confidence, decided, v=values: [of(v[: len(seeds)], confidence)] if len(seeds) < 11 else [],
            [0, 1],
            0.95,
            1.0,
        )  # type: ignore[misc]
        wrong += bool(looks.decided)
    assert wrong / 400 <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5
