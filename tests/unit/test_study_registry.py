"""Which model a study registers as its best."""

from __future__ import annotations

from dataclasses import replace

from mlinterf_ds.study.records import Records
from mlinterf_ds.study.registry import best
from tests.study_records import planted


def test_the_best_zero_shot_pair_model() -> None:
    found = best(planted())
    assert found is not None and (found.kind, found.variant) == ("pair", "meta_adpt")


def test_without_scores_the_lowest_bits_per_character() -> None:
    records = planted(seeds=2)
    records.scores = []
    low = dict.fromkeys(("syn", "syn-far"), 0.5)
    records.models = [
        replace(m, bits_per_character=low) if (m.set, m.variant, m.seed) == ("far", "attn", 1) else m
        for m in records.models
    ]
    found = best(records)
    assert found is not None and (found.set, found.variant, found.seed) == ("far", "attn", 1)


def test_nothing_to_register() -> None:
    assert best(Records()) is None
