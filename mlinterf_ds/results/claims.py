"""The paper's claims, each as a function of a study's records that returns its finding."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

from mlinterf_ds.results import paper
from mlinterf_ds.results.findings import Finding, PerSeed, averaged, cells, compared, differences, finding, mean_scores
from mlinterf_ds.results.records import Records
from mlinterf_ds.results.statistics import combined, negligible, positive, student_effect

RIVALS = ("joint", "ffn", "attn", "adpt", "share_adpt")
SETTINGS = (paper.WITHIN, paper.ZERO_SHOT)
COLLAPSE = 0.5  # a variant that keeps less than this share of joint's gain over the floor has collapsed


def all_findings(records: Records) -> list[Finding]:
    """Every claim, in the paper's order; those for which there are no records are undecided, and say so."""
    return [
        mono_beats_joint(records),
        joint_beats_mono_low(records),
        *(beats_joint(records, variant, paper.WITHIN) for variant in ("ffn", "attn", "adpt")),
        *(collapses(records, variant) for variant in ("ffn", "attn")),
        *(beats_joint(records, "share_adpt", setting) for setting in SETTINGS),
        *(meta_is_best(records, setting) for setting in SETTINGS),
        distance_worsens(records),
        *(third_language(records, setting) for setting in SETTINGS),
        partner_size(records),
        *causes(records),
        meta_converges(records),
        tuning_beats_freezing(records),
        meta_beats(records, "adpt", "meta beats plain adapters"),
        meta_beats(records, "meta_adpt-direct", "the second-order term helps"),
        meta_beats(records, "adpt-compute", "meta beats plain adapters of equal compute"),
    ]


# --- interference ------------------------------------------------------------------------------------------------------
def mono_beats_joint(records: Records) -> Finding:
    """Counts the targets and the source of each pair."""
    parts = compared(records, "mono", "joint", paper.WITHIN)
    source = records.source
    for task, group in itertools.product(records.tasks, dict.fromkeys(records.targets.values())):
        mono, joint = (records.pick(row, paper.WITHIN, task, source, group) for row in ("mono", "joint"))
        parts[f"{task} {source} in {group}"] = differences(mono, joint)
    claim = "a monolingual model beats the joint one within a language"
    beside = mean_scores(records, ("mono", "joint"), paper.WITHIN)
    return finding(records, "mono_beats_joint_within", claim, parts, beside=beside)


def joint_beats_mono_low(records: Records) -> Finding:
    parts = {}
    for task, code, group in records.groups("low"):
        joint, mono = (records.pick(row, paper.WITHIN, task, code, group) for row in ("low", "mono-low"))
        parts[f"{task} {code} ({group})"] = differences(joint, mono)
    claim = "at low resource the joint model beats the monolingual one"
    return finding(records, "joint_beats_mono_at_low_resource", claim, parts)


def distance_worsens(records: Records) -> Finding:
    """Interference is mono minus joint; the monolingual model of the source is the same, so joint scores compare."""
    known = {name: distance for name, distance in records.distances.items() if name in records.targets.values()}
    near, far = "", ""
    if len(set(known.values())) > 1:
        near, far = (extreme(known, key=known.__getitem__) for extreme in (min, max))
    parts = {}
    for task in records.tasks:
        close, distant = (records.pick("joint", paper.WITHIN, task, records.source, group) for group in (near, far))
        parts[task] = differences(close, distant)
    claim = f"a distant partner ({far or '?'}) hurts the source more than a close one ({near or '?'})"
    note = f"distances {records.distance}" if records.distance else ""
    return finding(records, "distance_worsens_interference", claim, parts, note=note)


def third_language(records: Records, setting: str) -> Finding:
    """Models of three languages minus models of two."""
    pairs, parts = records.targets, {}
    for task, code, group in records.groups("triple"):
        triple = records.pick("triple", setting, task, code, group)
        parts[f"{task} {code}"] = differences(triple, records.pick("joint", setting, task, code, pairs.get(code, "")))
    if setting == paper.ZERO_SHOT:
        claim = "a similar third language helps zero-shot transfer"
        return finding(records, "third_language_helps_zero_shot", claim, parts)
    claim = f"a similar third language leaves scores within a language as they were (within {records.margin:g} points)"
    judge = functools.partial(negligible, margin=records.margin)
    return finding(records, "third_language_neutral_within", claim, parts, judge=judge)


def partner_size(records: Records) -> Finding:
    parts, pairs = {}, records.targets
    for task, code, group in records.groups("low"):
        full = records.pick("joint", paper.WITHIN, task, records.source, pairs.get(code, ""))
        low = records.pick("low", paper.WITHIN, task, records.source, group)
        parts[f"{task}, partner {code}"] = differences(full, low)
    claim = f"how much text the partner has changes the source's scores by less than {records.margin:g} points"
    judge = functools.partial(negligible, margin=records.margin)
    return finding(records, "partner_size_matters_little", claim, parts, judge=judge)


# --- the variants ------------------------------------------------------------------------------------------------------
def beats_joint(records: Records, variant: str, setting: str) -> Finding:
    parts = compared(records, variant, "joint", setting)
    beside = mean_scores(records, (variant, "joint"), setting)
    name = f"{variant}_beats_joint_{setting.replace('-', '_')}"
    return finding(records, name, f"{variant} beats joint, {setting}", parts, beside=beside)


def collapses(records: Records, variant: str) -> Finding:
    """The floor is a model that never saw the language, or guessing where a study has none."""
    parts: dict[str, PerSeed] = {}
    untransferred: list[str] = []  # where joint training transfers nothing that could collapse
    for task, language, group in cells(records):
        rows = [records.pick(row, paper.ZERO_SHOT, task, language, group) for row in ("joint", variant, "unseen")]
        joint, ours, unseen = ({s.seed: s for s in scores} for scores in rows)
        seeds = joint.keys() & ours.keys()
        floor = {seed: unseen[seed].score if seed in unseen else joint[seed].majority for seed in seeds}
        gain = {seed: joint[seed].score - floor[seed] for seed in seeds}
        if gain and statistics.fmean(gain.values()) > records.margin:
            parts[f"{task} {language}"] = {
                seed: floor[seed] + COLLAPSE * gain[seed] - ours[seed].score for seed in seeds
            }
        elif gain:
            untransferred.append(f"{task} {language}")
    claim = f"{variant} collapses zero-shot: it keeps less than half of joint's gain over a model that never saw the language"
    beside = mean_scores(records, ("joint", variant), paper.ZERO_SHOT)
    note = f"without {', '.join(untransferred)}, where joint transfers nothing" if untransferred else ""
    return finding(records, f"{variant}_collapses_zero_shot", claim, parts, beside=beside, note=note)


def meta_is_best(records: Records, setting: str) -> Finding:
    """Holds if meta_adpt beats every rival; the effect shown is the one over the closest."""
    rivals = {row: averaged(compared(records, "meta_adpt", row, setting).values()) for row in RIVALS}
    effects = {row: student_effect(list(part.values()), records.confidence) for row, part in rivals.items() if part}
    claim = f"meta_adpt is the best joint model, {setting}; the effect is over the closest rival"
    name = f"meta_adpt_best_{setting.replace('-', '_')}"
    if not effects:
        return finding(records, name, claim, {})
    closest = min(effects, key=lambda row: effects[row].mean)
    note = f"closest rival: {closest}" + "; one seed gives no interval" * (not effects[closest].has_interval)
    means = {row: effect.mean for row, effect in effects.items()}
    verdict = combined([positive(effect) for effect in effects.values()])
    beside = mean_scores(records, ("meta_adpt", *effects), setting)
    return Finding(name, claim, "points", verdict, effects[closest], beside, means, note)


def meta_beats(records: Records, row: str, claim: str) -> Finding:
    """Against a control, over both settings together."""
    parts: dict[str, PerSeed] = {}
    beside: dict[str, float] = {}
    for setting in SETTINGS:
        parts |= {f"{setting} {key}": part for key, part in compared(records, "meta_adpt", row, setting).items()}
        beside |= {f"{key} {setting}": mean for key, mean in mean_scores(records, ("meta_adpt", row), setting).items()}
    name = f"meta_adpt_beats_{row.replace('-', '_')}"
    return finding(records, name, f"{claim}, both settings together", parts, beside=beside)


def meta_converges(records: Records) -> Finding:
    parts = {}
    for group in dict.fromkeys(records.targets.values()):
        plain, meta = (
            {m.seed: m.early_loss for m in records.models_of(group, row).values() if m.early_loss is not None}
            for row in ("adpt", "meta_adpt")
        )
        parts[group] = {seed: plain[seed] - meta[seed] for seed in plain.keys() & meta.keys()}
    claim = (
        "meta adapters converge faster than plain ones: lower training loss from the warm-up to the middle of the run"
    )
    return finding(records, "meta_adpt_converges_faster", claim, parts, unit="nats")


def tuning_beats_freezing(records: Records) -> Finding:
    parts: dict[str, PerSeed] = {}
    for frozen in (score for score in records.scores if score.control == "freeze"):
        same = {name: getattr(frozen, name) for name in ("kind", "set", "variant", "task", "language", "train")}
        part = differences(records.chosen(control="", **same), [frozen])
        name = f"{frozen.variant} {frozen.task} {frozen.train}>{frozen.language} in {frozen.set}"
        parts.setdefault(name, {}).update(part)
    claim = "tuning all parameters beats freezing the language modules"
    return finding(records, "tuning_all_beats_freezing", claim, parts)


# --- the causes --------------------------------------------------------------------------------------------------------
def causes(records: Records) -> list[Finding]:
    """What the analyses of gradients and of masks say."""

    def of_gradients(facts: dict[str, Any]) -> float:
        return facts["within"] - facts["between"] if "between" in facts else math.nan

    def of_layers(facts: dict[str, Any]) -> float:
        layers = sorted({row["layer"] for row in _mask_rows(facts)}, key=int)
        half = len(layers) // 2
        return _cosine(facts, "layer", layers[:half]) - _cosine(facts, "layer", layers[len(layers) - half :])

    def of_components(facts: dict[str, Any]) -> float:
        return _cosine(facts, "component", ["attention"]) - _cosine(facts, "component", ["ffn"])

    gradients = "gradients of two languages are less alike than those of one language"
    masks, pi = "masks of two languages are more alike in", "cosine of pi"
    layers, components = (
        f"{masks} the lower half of the layers than in the upper",
        f"{masks} attention than in the feed-forward layers",
    )
    return [
        finding(records, name, claim, _of_analyses(records, analysis, gap), unit=unit)
        for name, claim, analysis, gap, unit in (
            ("gradients_conflict_across_languages", gradients, "conflict", of_gradients, "cosine"),
            ("lower_layers_shared_more", layers, "prune", of_layers, pi),
            ("attention_shared_more", components, "prune", of_components, pi),
        )
    ]


def _of_analyses(records: Records, analysis: str, gap: Callable[[dict[str, Any]], float]) -> dict[str, PerSeed]:
    """Set and variant -> seed -> gap, of the analyses where it is known."""
    parts: dict[str, PerSeed] = {}
    for row in records.analyses:
        if row.analysis == analysis and math.isfinite(value := gap(row.facts)):
            parts.setdefault(f"{row.set} ({row.variant})", {})[row.seed] = value
    return parts


def _mask_rows(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of similarity.csv that belong to a layer."""
    return [row for row in facts.get("layers", []) if str(row["layer"]).isdecimal()]


def _cosine(facts: dict[str, Any], column: str, values: list[Any]) -> float:
    """Mean cosine of the masks of two languages over the rows with these values; NaN without any."""
    rows = [row for row in _mask_rows(facts) if row["left"] != row["right"] and row["cosine"] and row[column] in values]
    return statistics.fmean(float(row["cosine"]) for row in rows) if rows else math.nan
