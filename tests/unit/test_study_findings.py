"""Verdicts on planted records: every claim that is true of them holds, its opposite fails, few seeds decide nothing."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from mlinterf_ds.results.claims import all_findings
from mlinterf_ds.results.findings import markdown, mean_scores
from mlinterf_ds.results.records import Records
from mlinterf_ds.results.statistics import bootstrap_p, combined, f1, negligible, positive, student_effect
from tests.study_records import MAJORITY, planted

UNASKED = {"meta_adpt_beats_meta_adpt_direct", "meta_adpt_beats_adpt_compute"}  # planted() has no controls


def verdicts(records: Records) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in all_findings(records)}


def test_the_papers_claims_hold_where_they_were_planted() -> None:
    verdict_of = verdicts(planted())
    # 70 zero-shot, 30 without the language: attn at 50 keeps exactly half, so does not collapse for sure; ffn does
    assert verdict_of.pop("attn_collapses_zero_shot") == "undecided"
    assert {verdict_of.pop(name) for name in UNASKED} == {"undecided"}
    assert set(verdict_of.values()) == {"holds"}, {name for name, verdict in verdict_of.items() if verdict != "holds"}


def test_planted_effects_are_measured() -> None:
    of = {finding.name: finding for finding in all_findings(planted())}
    assert of["share_adpt_beats_joint_zero_shot"].effect.mean == pytest.approx(3.0, abs=0.05)
    assert of["meta_adpt_best_within"].effect.mean == pytest.approx(2.0, abs=0.05)
    assert of["meta_adpt_best_zero_shot"].effect.mean == pytest.approx(3.0, abs=0.05)
    assert "share_adpt" in of["meta_adpt_best_zero_shot"].note
    assert of["ffn_collapses_zero_shot"].effect.mean == pytest.approx(30 + 0.5 * 40 - 10, abs=0.05)
    assert of["distance_worsens_interference"].effect.mean == pytest.approx(4.0, abs=0.05)
    assert of["gradients_conflict_across_languages"].effect.mean == pytest.approx(0.32)
    assert of["lower_layers_shared_more"].effect.mean == pytest.approx(0.3 + 0.02)
    assert of["attention_shared_more"].effect.mean == pytest.approx(0.2)
    assert of["meta_adpt_converges_faster"].effect.mean == pytest.approx(0.5)
    beside = of["ffn_collapses_zero_shot"].beside
    assert beside["unseen"] == pytest.approx(30, abs=0.2) and beside["majority"] == 10


def test_the_opposite_fails() -> None:
    worse = dict.fromkeys(("ffn", "attn", "adpt", "share_adpt"), (-3.0, 0.0)) | {
        "meta_adpt": (-1.0, 3.0),
        "joint": (0.0, 4.0),
    }
    verdict_of = verdicts(planted(shifts=worse, mono=-8.0, low=4.0, far=4.0))
    fails = {name for name, verdict in verdict_of.items() if verdict == "fails"}
    assert {"mono_beats_joint_within", "joint_beats_mono_at_low_resource", "distance_worsens_interference"} <= fails
    assert {f"{name}_beats_joint_within" for name in ("ffn", "attn", "adpt", "share_adpt")} <= fails
    assert {"meta_adpt_best_within", "meta_adpt_best_zero_shot", "attn_collapses_zero_shot"} <= fails
    # the source scores 8 points better with the distant partner's full text than with its 400 sentences
    assert "partner_size_matters_little" in fails


def test_nothing_collapses_where_joint_training_transfers_nothing() -> None:
    """Joint zero-shot at 30.5 is within the margin of the floor of 30: ffn, far below, has lost no transfer."""
    nothing = {"joint": (0.0, -39.5), "ffn": (0.0, -60.0), "attn": (0.0, -60.0)}
    collapse = {finding.name: finding for finding in all_findings(planted(shifts=nothing))}["ffn_collapses_zero_shot"]
    assert (collapse.verdict, collapse.parts) == ("undecided", {})
    assert "without pos syn-close, pos syn-far, where joint transfers nothing" in collapse.note


def test_one_seed_decides_nothing_and_says_so() -> None:
    for finding in all_findings(planted(seeds=1)):
        assert finding.verdict == "undecided" and ("one seed" in finding.note or finding.name in UNASKED)
        assert finding.effect.low == -math.inf or not finding.effect.values


def test_an_empty_study_says_that_it_has_no_records() -> None:
    for finding in all_findings(Records(source="syn")):
        assert (finding.verdict, finding.effect.values) == ("undecided", ()) and "no records" in finding.note


def test_the_report_of_findings_names_all_of_them() -> None:
    records = planted()
    findings = all_findings(records)
    text = markdown(findings, records.confidence)
    assert len(findings) >= 20 and all(finding.claim in text for finding in findings) and "95% interval" in text
    assert f"not corrected for there being {len(findings)} of them" in text and "5% are still told apart" in text


def test_controls_are_compared_by_their_own_rows() -> None:
    records = planted()
    ours = [s for s in records.scores if s.variant == "meta_adpt"]
    records.scores += [replace(s, control="direct", score=s.score - 1.5 - 0.1 * (s.seed % 2)) for s in ours]
    of = {finding.name: finding for finding in all_findings(records)}
    direct = of["meta_adpt_beats_meta_adpt_direct"]
    assert direct.verdict == "holds" and direct.effect.mean == pytest.approx(1.54)
    assert of["meta_adpt_best_within"].effect.mean == pytest.approx(2.0, abs=0.05)  # the control is no rival


# --- statistics --------------------------------------------------------------------------------------------------------
def test_interval_is_students() -> None:
    values = [1.0, 2.5, 0.5, 1.5, 2.0]
    effect = student_effect(values, 0.9)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (effect.low, effect.high) == pytest.approx((low, high))
    assert effect.size == pytest.approx(np.mean(values) / np.std(values, ddof=1))


@pytest.mark.parametrize(
    "values, sign, equal",
    [
        ([1.0, 1.1, 0.9], "holds", "undecided"),
        ([-2.0, -2.1, -1.9], "fails", "fails"),
        ([3.0, -3.0, 0.1], "undecided", "undecided"),
        ([0.1, -0.1, 0.05], "undecided", "holds"),
        ([2.0], "undecided", "undecided"),
    ],
)
def test_verdicts(values: list[float], sign: str, equal: str) -> None:
    effect = student_effect(values)
    assert (positive(effect), negligible(effect, 1.0)) == (sign, equal)


def test_a_claim_of_several_parts() -> None:
    assert combined(["holds", "holds"]) == "holds" and combined(["holds", "undecided"]) == "undecided"
    assert combined(["holds", "fails", "undecided"]) == "fails" and combined([]) == "undecided"


def test_bootstrap_against_the_exact_sign_test() -> None:
    """Answers right or wrong, one seed: the two systems differ on 20 of 200 examples."""
    draw = np.random.default_rng(0)
    right = (draw.random(200) < 0.7).astype(float)

    def counts(values: np.ndarray) -> np.ndarray:
        return np.stack([values, np.ones(200), np.ones(200)], axis=-1)[None]

    wrong = np.flatnonzero(right == 0)
    for better, worse in ((10, 10), (16, 4), (19, 1)):
        other = right.copy()
        other[wrong[:better]], other[np.flatnonzero(right)[:worse]] = 1, 0
        exact = stats.binomtest(better, 20).pvalue
        p = bootstrap_p([counts(other)], [counts(right)], resamples=2000)
        # the bootstrap's normal limit; the exact test is more cautious in the tails
        limit = 2 * stats.norm.sf(abs(better - worse) / math.sqrt(20 - (better - worse) ** 2 / 200))
        assert p == pytest.approx(limit, abs=0.05) and abs(p - exact) < 0.2
    assert bootstrap_p([counts(right)], [counts(right)]) == 1.0


def test_counts_give_f1() -> None:
    assert f1(np.array([3.0, 4.0, 5.0])) == pytest.approx(100 * 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert f1(np.zeros(3)) == 0


def test_scores_beside_a_claim_are_of_what_all_rows_have() -> None:
    """A row that lacks a language must not look better or worse for it."""
    records = planted(seeds=1)
    records.scores = [s for s in records.scores if not (s.variant == "adpt" and s.set == "far")]
    means = mean_scores(records, ("adpt", "joint", "attn"), "within")
    by_hand = {
        row: statistics.fmean(
            s.score for s in records.scores if s.variant == row and s.train == s.language == "syn-close"
        )
        for row in ("adpt", "joint", "attn")
    }
    assert means == pytest.approx(by_hand | {"majority": MAJORITY})
    assert "ffn" not in mean_scores(records, ("joint",), "within")
