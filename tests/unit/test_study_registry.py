"""Which model a study registers as its best."""

from __future__ import annotations

from dataclasses import replace

from mlinterf_ds.results.records import Records
from mlinterf_ds.study.mlflow_run import best
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


def test_a_model_whose_hard_task_failed_is_not_the_best() -> None:
    """QA is hard for all; ffn, which has no score of it, would have the best average."""
    records = planted(seeds=1)
    zero_shot = [s for s in records.scores if s.kind == "pair" and not s.control and not s.within]
    records.scores = [replace(s, score=90.0) if s.variant == "ffn" and s in zero_shot else s for s in records.scores]
    records.scores += [replace(s, task="qa", score=5.0) for s in zero_shot if s.variant != "ffn"]
    found = best(records)
    assert found is not None and found.variant == "meta_adpt"
