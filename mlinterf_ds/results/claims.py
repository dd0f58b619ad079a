"""The paper's claims, each as a function of a study's records that returns its finding."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from mlinterf_ds.results import paper
from mlinterf_ds.results.findings import (
    Finding,
    PerSeed,
    averaged,
    compared,
    differences,
    finding,
    grid,
    standing,
    tasks_of,
)
from mlinterf_ds.results.records import Records
from mlinterf_ds.results.statistics import combined, effect, negligible, positive
from mlinterf_ds.results.tables import chosen, pick, targets

RIVALS = ("joint", "ffn", "attn", "adpt", "share_adpt")
SETTINGS = (paper.WITHIN, paper.ZERO_SHOT)
COLLAPSE = 0.5  # a variant that keeps less than this share of joint's gain over the floor has collapsed


def all_findings(records: Records) -> list[Finding]:
    """Every claim, in the paper's order; those for which there are no records are undecided, and say so."""
    tests: list[Callable[[Records], Finding]] = [mono_beats_joint, joint_beats_mono_low]
    tests += [_beats(variant, "joint", paper.WITHIN) for variant in ("ffn", "attn", "adpt")]
    tests += [_collapses(variant) for variant in ("ffn", "attn")]
    tests += [_beats("share_adpt", "joint", setting) for setting in SETTINGS]
    tests += [_best_of_all(setting) for setting in SETTINGS]
    tests += [distance_worsens, third_is_neutral_within, third_helps_zero_shot, partner_size]
    tests += [gradients_conflict, lower_layers_shared, attention_shared, meta_converges, tuning_beats_freezing]
    tests += [
        _control("adpt", "meta beats plain adapters"),
        _control("meta_adpt-direct", "the second-order term helps"),
    ]
    tests += [_control("adpt-compute", "meta beats plain adapters of equal compute")]
    return [test(records) for test in tests]


def _beats(ours: str, theirs: str, setting: str) -> Callable[[Records], Finding]:
    def test(records: Records) -> Finding:
        name = f"{ours}_beats_{theirs}_{setting.replace('-', '_')}"
        claim = f"{ours} beats {theirs}, {setting}"
        beside = standing(records, (ours, theirs), setting)
        return finding(records, name, claim, compared(records, ours, theirs, setting), beside=beside)

    return test


# --- interference ------------------------------------------------------------------------------------------------------
def mono_beats_joint(records: Records) -> Finding:
    """On the targets and on the source of each pair."""
    parts = compared(records, "mono", "joint", paper.WITHIN)
    source = records.source
    for task, group in itertools.product(tasks_of(records), dict.fromkeys(targets(records).values())):
        joint, mono = (pick(records, row, paper.WITHIN, task, source, group) for row in ("joint", "mono"))
        parts[f"{task} {source} in {group}"] = differences(mono, joint)
    claim = "a monolingual model beats the joint one within a language"
    return finding(
        records, "mono_beats_joint_within", claim, parts, beside=standing(records, ("mono", "joint"), paper.WITHIN)
    )


def joint_beats_mono_low(records: Records) -> Finding:
    parts = {}
    for (task, code, group), limited in _lows(records).items():
        common = {"task": task, "language": code, "train": code}
        joint = chosen(records, kind="low", set=group, variant="joint", **common)
        parts[f"{task} {code} ({group})"] = differences(joint, chosen(records, kind="mono", set=limited, **common))
    claim = "at low resource the joint model beats the monolingual one"
    return finding(records, "joint_beats_mono_at_low_resource", claim, parts)


def _lows(records: Records) -> dict[tuple[str, str, str], str]:
    """(task, subsampled language, set) -> the name of its monolingual model."""
    limited = {m.languages[0]: m.set for m in records.models if m.kind == "mono" and "@" in m.set}
    limited |= {s.languages[0]: s.set for s in records.scores if s.kind == "mono" and "@" in s.set}
    rows = {(s.task, s.languages[1], s.set) for s in records.scores if s.kind == "low"}
    return {row: limited.get(row[1], "") for row in sorted(rows)}


def _collapses(variant: str) -> Callable[[Records], Finding]:
    def test(records: Records) -> Finding:
        parts: dict[str, PerSeed] = {}
        lost: list[str] = []  # where joint training transfers nothing that could collapse
        for task, language, group in grid(records):
            rows = [pick(records, row, paper.ZERO_SHOT, task, language, group) for row in ("joint", variant, "unseen")]
            joint, ours, unseen = ({s.seed: s for s in scores} for scores in rows)
            seeds = joint.keys() & ours.keys()
            floor = {seed: unseen[seed].score if seed in unseen else joint[seed].majority for seed in seeds}
            gain = {seed: joint[seed].score - floor[seed] for seed in seeds}
            part = {seed: floor[seed] + COLLAPSE * gain[seed] - ours[seed].score for seed in seeds}
            if gain and statistics.fmean(gain.values()) > records.margin:
                parts[f"{task} {language}"] = part
            elif gain:
                lost.append(f"{task} {language}")
        claim = f"{variant} collapses zero-shot: it keeps less than half of joint's gain over a model that never saw the language"
        beside = standing(records, ("joint", variant), paper.ZERO_SHOT)
        note = f"without {', '.join(lost)}, where joint transfers nothing" if lost else ""
        return finding(records, f"{variant}_collapses_zero_shot", claim, parts, beside=beside, note=note)

    return test


def distance_worsens(records: Records) -> Finding:
    """Interference is mono minus joint; the monolingual model of the source is the same, so joint scores compare."""
    near, far = _extreme_sets(records)
    parts = {}
    for task in tasks_of(records):
        close, distant = (pick(records, "joint", paper.WITHIN, task, records.source, group) for group in (near, far))
        parts[task] = differences(close, distant)
    claim = f"a distant partner ({far or '?'}) hurts the source more than a close one ({near or '?'})"
    note = f"distances {records.distance}" if records.distance else ""
    return finding(records, "distance_worsens_interference", claim, parts, note=note)


def _extreme_sets(records: Records) -> tuple[str, str]:
    known = {name: far for name, far in records.distances.items() if name in targets(records).values()}
    if len(set(known.values())) < 2:
        return "", ""
    return min(known, key=known.__getitem__), max(known, key=known.__getitem__)


def _third(records: Records, setting: str) -> dict[str, PerSeed]:
    pairs, parts = targets(records), {}
    for task, code, group in sorted({(s.task, s.languages[1], s.set) for s in records.scores if s.kind == "triple"}):
        train = code if setting == paper.WITHIN else records.source
        tri = chosen(records, kind="triple", set=group, variant="joint", task=task, language=code, train=train)
        parts[f"{task} {code}"] = differences(tri, pick(records, "joint", setting, task, code, pairs.get(code, "")))
    return parts


def third_is_neutral_within(records: Records) -> Finding:
    claim = f"a similar third language leaves scores within a language as they were (within {records.margin:g} points)"
    judge = lambda found: negligible(found, records.margin)  # noqa: E731
    return finding(records, "third_language_neutral_within", claim, _third(records, paper.WITHIN), judge=judge)


def third_helps_zero_shot(records: Records) -> Finding:
    claim = "a similar third language helps zero-shot transfer"
    return finding(records, "third_language_helps_zero_shot", claim, _third(records, paper.ZERO_SHOT))


def partner_size(records: Records) -> Finding:
    parts, pairs = {}, targets(records)
    for task, code, group in _lows(records):
        on = {"task": task, "language": records.source, "train": records.source, "variant": "joint", "control": ""}
        full = chosen(records, kind="pair", set=pairs.get(code, ""), **on)
        parts[f"{task}, partner {code}"] = differences(full, chosen(records, kind="low", set=group, **on))
    claim = f"how much text the partner has changes the source's scores by less than {records.margin:g} points"
    judge = lambda found: negligible(found, records.margin)  # noqa: E731
    return finding(records, "partner_size_matters_little", claim, parts, judge=judge)


# --- the method --------------------------------------------------------------------------------------------------------
def _best_of_all(setting: str) -> Callable[[Records], Finding]:
    def test(records: Records) -> Finding:
        rivals = {row: averaged(compared(records, "meta_adpt", row, setting).values()) for row in RIVALS}
        effects = {row: effect(list(part.values()), records.confidence) for row, part in rivals.items() if part}
        claim = f"meta_adpt is the best joint model, {setting}; the effect is over the closest rival"
        name = f"meta_adpt_best_{setting.replace('-', '_')}"
        if not effects:
            return finding(records, name, claim, {})
        closest = min(effects, key=lambda row: effects[row].mean)
        verdict = combined([positive(found) for found in effects.values()])
        means = {row: found.mean for row, found in effects.items()}
        beside = standing(records, ("meta_adpt", *effects), setting)
        note = f"closest rival: {closest}"
        if len(effects[closest].values) == 1:
            note += "; one seed gives no interval"
        return Finding(name, claim, "points", verdict, effects[closest], beside, means, note)

    return test


def _control(row: str, claim: str) -> Callable[[Records], Finding]:
    def test(records: Records) -> Finding:
        parts = {
            f"{setting} {key}": part
            for setting in SETTINGS
            for key, part in compared(records, "meta_adpt", row, setting).items()
        }
        name = f"meta_adpt_beats_{row.replace('-', '_')}"
        beside = {f"{row_} {s}": v for s in SETTINGS for row_, v in standing(records, ("meta_adpt", row), s).items()}
        return finding(records, name, f"{claim}, both settings together", parts, beside=beside)

    return test


def meta_converges(records: Records) -> Finding:
    parts = {}
    for group in dict.fromkeys(targets(records).values()):
        losses: dict[str, PerSeed] = {
            row: {
                m.seed: m.early_loss
                for m in records.models
                if (m.set, m.variant, m.control) == (group, row, "") and m.early_loss is not None
            }
            for row in ("adpt", "meta_adpt")
        }
        plain, ours = losses["adpt"], losses["meta_adpt"]
        parts[group] = {seed: plain[seed] - ours[seed] for seed in plain.keys() & ours.keys()}
    claim = (
        "meta adapters converge faster than plain ones: lower training loss from the warm-up to the middle of the run"
    )
    return finding(records, "meta_adpt_converges_faster", claim, parts, unit="nats")


def tuning_beats_freezing(records: Records) -> Finding:
    parts: dict[str, PerSeed] = {}
    frozen = [s for s in records.scores if s.control == "freeze"]
    for s in frozen:
        same = {name: getattr(s, name) for name in ("kind", "set", "variant", "task", "language", "train")}
        tuned = chosen(records, control="", **same)
        part = differences(tuned, [s])
        parts.setdefault(f"{s.variant} {s.task} {s.train}>{s.language} in {s.set}", {}).update(part)
    claim = "tuning all parameters beats freezing the language modules"
    return finding(records, "tuning_all_beats_freezing", claim, parts)


# --- the causes --------------------------------------------------------------------------------------------------------
def _by_seed(records: Records, analysis: str, fact: Callable[[dict[str, Any]], float | None]) -> dict[str, PerSeed]:
    parts: dict[str, PerSeed] = {}
    for found in records.analyses:
        if found.analysis == analysis and (value := fact(found.facts)) is not None and math.isfinite(value):
            parts.setdefault(f"{found.set} ({found.variant})", {})[found.seed] = value
    return parts


def gradients_conflict(records: Records) -> Finding:
    def fact(facts: dict[str, Any]) -> float | None:
        within, between = facts.get("within"), facts.get("between")
        return None if within is None or between is None else within - between

    claim = "gradients of two languages are less alike than those of one language"
    return finding(
        records, "gradients_conflict_across_languages", claim, _by_seed(records, "conflict", fact), unit="cosine"
    )


def _between(rows: Sequence[dict[str, Any]], keep: Callable[[dict[str, Any]], bool]) -> float:
    values = [float(row["cosine"]) for row in rows if row["left"] != row["right"] and row["cosine"] and keep(row)]
    return statistics.fmean(values) if values else math.nan


def lower_layers_shared(records: Records) -> Finding:
    def fact(facts: dict[str, Any]) -> float | None:
        rows = [row for row in facts.get("layers", []) if str(row["layer"]).isdecimal()]
        layers = sorted({int(row["layer"]) for row in rows})
        if len(layers) < 2:
            return None
        low, high = layers[: len(layers) // 2], layers[-(len(layers) // 2) :]
        return _between(rows, lambda row: int(row["layer"]) in low) - _between(
            rows, lambda row: int(row["layer"]) in high
        )

    claim = "masks of two languages are more alike in the lower half of the layers than in the upper"
    return finding(records, "lower_layers_shared_more", claim, _by_seed(records, "prune", fact), unit="cosine of pi")


def attention_shared(records: Records) -> Finding:
    def fact(facts: dict[str, Any]) -> float | None:
        rows = [row for row in facts.get("layers", []) if str(row["layer"]).isdecimal()]
        return _between(rows, lambda row: row["component"] == "attention") - _between(
            rows, lambda row: row["component"] == "ffn"
        )

    claim = "masks of two languages are more alike in attention than in the feed-forward layers"
    return finding(records, "attention_shared_more", claim, _by_seed(records, "prune", fact), unit="cosine of pi")
