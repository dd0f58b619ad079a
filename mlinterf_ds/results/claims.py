"""The paper's claims, each as a function of a study's records that returns its finding."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlinterf_ds.results import paper
from mlinterf_ds.results.findings import (
    Finding,
    Part,
    PerSeed,
    above_floor,
    cells,
    compared,
    corrected,
    difference,
    finding,
    mean_effect,
    measured,
    needing_all,
    unseen,
)  # fmt: skip
from mlinterf_ds.results.records import Records, TaskScore
from mlinterf_ds.results.statistics import negligible, paired, positive

RIVALS = ("joint", "ffn", "attn", "adpt", "share_adpt")
SETTINGS = (paper.WITHIN, paper.ZERO_SHOT)
COLLAPSE = 0.5  # a variant that keeps less than this share of joint's gain over the floor has collapsed
TIE = 0.05  # two distances that differ by less are alike: as much as another measure of them would shift


def all_findings(records: Records) -> list[Finding]:
    """Every claim, in the paper's order, corrected for their number; those without any records are not measured."""
    claims = [
        mono_beats_joint(records, "mono", "a monolingual model beats the joint one within a language"),
        mono_beats_joint(
            records,
            "mono-text",
            "a monolingual model of half the steps beats the joint one (it reads as much text of its language as a pair's model "
            "where the languages are equally large)",
        ),
        mono_beats_joint(
            records, "mono-vocabulary", "a monolingual model with a vocabulary of its own beats the joint one"
        ),
        own_vocabulary_predicts_better(records),
        joint_beats_mono_low(records),
        *(beats_joint(records, variant, paper.WITHIN) for variant in ("ffn", "attn", "adpt")),
        *(collapses(records, variant) for variant in ("ffn", "attn")),
        *(beats_joint(records, "share_adpt", setting) for setting in SETTINGS),
        *(meta_is_best(records, setting) for setting in SETTINGS),
        distance_worsens(records),
        distance_hinders_transfer(records),
        *(third_language(records, setting) for setting in SETTINGS),
        partner_size(records),
        *causes(records),
        meta_converges(records),
        tuning_beats_freezing(records),
        meta_beats(records, "adpt", "meta beats plain adapters"),
        meta_beats(records, "meta_adpt-direct", "the second-order term helps"),
        meta_beats(
            records,
            "meta_adpt-held_out",
            "validation rows of the training text are better than those of a split of their own",
        ),
        meta_beats(records, "adpt-compute", "meta beats plain adapters of equal compute"),
        meta_beats(records, "adpt-batch", "meta beats plain adapters of as many rows a step"),
        meta_beats(records, "adpt-rows", "meta beats plain adapters of the same rows a step"),
        meta_predicts_better(records, "adpt", "meta adapters predict text better than plain ones"),
        meta_predicts_better(
            records, "adpt-compute", "meta adapters predict text better than plain ones of equal compute"
        ),
        meta_predicts_better(
            records, "adpt-batch", "meta adapters predict text better than plain ones of as many rows a step"
        ),
        meta_predicts_better(
            records, "adpt-rows", "meta adapters predict text better than plain ones of the same rows a step"
        ),
        meta_predicts_better(records, "meta_adpt-direct", "the second-order term helps to predict text"),
        meta_predicts_better(
            records,
            "meta_adpt-held_out",
            "validation rows of the training text are better to predict text than those of a split of their own",
        ),
    ]
    return corrected(claims, records.confidence)


# --- interference ------------------------------------------------------------------------------------------------------
def mono_beats_joint(records: Records, row: str, claim: str) -> Finding:
    """Counts the targets and the source of each pair. row: "mono", or a control of it: "mono-text" or "mono-vocabulary"."""
    parts = compared(records, row, "joint", paper.WITHIN)
    source = records.source
    for task, group in itertools.product(records.tasks, dict.fromkeys(records.targets.values())):
        mono, joint = (records.pick(side, paper.WITHIN, task, source, group) for side in (row, "joint"))
        parts[f"{task} {source} in {group}"] = difference(mono, joint, (row, "joint"))
    return finding(records, f"{row.replace('-', '_')}_beats_joint_within", claim, parts)


def own_vocabulary_predicts_better(records: Records) -> Finding:
    """By bits per character of validation text.

    They are summed over masked pieces, of which each is predicted from all others. A short piece sees the rest of its word, so that
    the same text costs less in shorter pieces. A vocabulary that several languages share has the shorter ones: the measure favours
    the joint model, and a loss to it tells nothing.
    """

    def bits(group: str, variant: str, control: str, language: str) -> PerSeed:
        models = [m for m in records.models if (m.set, m.variant, m.control) == (group, variant, control)]
        return {m.seed: m.bits_per_character[language] for m in models}

    parts = {}
    for target, group in records.targets.items():
        for language in (records.source, target):
            sides = bits(group, "joint", "", language), bits(language, "mono", "vocabulary", language)
            parts[f"{language} in {group}"] = {seed: joint - mono for seed, (joint, mono) in paired(*sides).items()}
    claim = (
        "a monolingual model with a vocabulary of its own predicts text better than the joint one, by bits per character, "
        "which favour the joint one's shorter pieces"
    )
    result = measured(records, "mono_vocabulary_predicts_better_than_joint", claim, parts, "bits per character")
    if result.verdict == "fails":
        reason = "shorter pieces, which see the rest of their word, may be all of the joint model's advantage"
        return replace(result, verdict="undecided", uncorrected="undecided", reason=reason, p=1.0)
    return result


def joint_beats_mono_low(records: Records) -> Finding:
    parts = {}
    for task, code, group in records.groups("low"):
        joint, mono = (records.pick(row, paper.WITHIN, task, code, group) for row in ("low", "mono-low"))
        parts[f"{task} {code} ({group})"] = difference(joint, mono, ("joint", "mono"))
    claim = "at low resource the joint model beats the monolingual one"
    return finding(records, "joint_beats_mono_at_low_resource", claim, parts)


def distance_worsens(records: Records) -> Finding:
    """Interference is mono minus joint; the monolingual model of the source is the same, so joint scores compare."""
    near, far, tie = extremes(records)
    parts = {}
    for task in records.tasks if near != far else ():
        close, distant = (records.pick("joint", paper.WITHIN, task, records.source, group) for group in (near, far))
        parts[task] = difference(close, distant, (f"with {near}", f"with {far}"))
    claim = f"a distant partner ({far or '?'}) hurts the source more than a close one ({near or '?'})"
    note = f"distances {records.distance}" if records.distance else ""
    return finding(records, "distance_worsens_interference", claim, parts, note=note, cause=tie)


def distance_hinders_transfer(records: Records) -> Finding:
    """What joint training transfers to the closest target minus what it transfers to the farthest.

    That is its zero-shot score above the one of a model that never saw the language, since one test set may be harder than the
    other; scores as they are where a study has no such model. The note has the rank correlation over all pairs.
    """
    near, far, tie = extremes(records)
    languages = {group: language for language, group in records.targets.items()}
    tasks = records.tasks if near != far else []
    rows = {
        (task, group): tuple(records.pick(row, paper.ZERO_SHOT, task, language, group) for row in ("joint", "unseen"))
        for task, (group, language) in itertools.product(tasks, languages.items())
    }
    known = all(rows[task, group][1] for task in tasks for group in (near, far))

    def gain(task: str, group: str, sign: float = 1.0) -> dict[str, tuple[float, list[TaskScore]]]:
        joint, floor = rows[task, group]
        on, never = f"on {languages[group]}", f"never saw {languages[group]}"
        return {on: (sign, joint), never: (-sign, floor)} if known else {on: (sign, joint)}

    parts: dict[str, Part] = {}
    untransferred: list[str] = []
    correlations: list[float] = []
    for task in tasks:
        part = Part(gain(task, near) | gain(task, far, -1.0))
        if known and part.per_seed and not any(_transfers(records, *rows[task, group]) for group in (near, far)):
            untransferred.append(task)
        else:
            parts[task] = part
        correlations += _rank_correlations(records, {group: Part(gain(task, group)).per_seed for group in languages})
    claim = (
        f"zero-shot scores fall with distance: lower on {languages.get(far, '?')} than on {languages.get(near, '?')}"
    )
    notes = ["no model that never saw the languages: how hard each test set is counts too"]
    if known:
        claim = "zero-shot transfer, above a model that never saw the language, falls with distance: "
        claim += f"less to {languages.get(far, '?')} than to {languages.get(near, '?')}"
        notes = []
    notes += [f"without {', '.join(untransferred)}, where joint transfers nothing"] if untransferred else []
    if correlations:
        told = ", ".join(f"{value:+.2f}" for value in correlations)
        notes.append(f"rank correlation with distance over {len(languages)} pairs, by task and seed: {told}")
    cause = tie or ("at the floor: joint transfers nothing to either" if untransferred and not parts else "")
    return finding(records, "distance_hinders_transfer", claim, parts, note="; ".join(notes), cause=cause)


def _rank_correlations(records: Records, gains: Mapping[str, PerSeed]) -> list[float]:
    """Spearman's correlation of the pairs' gains with their distances, at each seed that has three pairs or more."""
    from scipy.stats import spearmanr

    by_seed: dict[int, list[tuple[float, float]]] = {}
    for group, per_seed in gains.items():
        for seed, gain in per_seed.items() if group in records.distances else ():
            by_seed.setdefault(seed, []).append((records.distances[group], gain))
    return [float(spearmanr(pairs).statistic) for _, pairs in sorted(by_seed.items()) if len(pairs) > 2]


def _transfers(records: Records, joint: Sequence[TaskScore], floor: Sequence[TaskScore]) -> bool:
    """Whether joint surely scores more than a model that never saw the language, or than guessing where there is none.

    Over seeds and test examples: a mean that is high by chance would let a part in that holds for that reason.
    """
    guessing = {score.seed: -score.majority for score in joint}
    part = difference(joint, floor, ("joint", "never saw it")) if floor else Part({"joint": (1.0, joint)}, (), guessing)
    effect, _ = mean_effect([part], records.confidence)
    if not effect.values:  # no seed in common: the floor's mean, as if it were exact
        return above_floor(joint, statistics.fmean(score.score for score in floor), records.confidence) > records.margin
    return effect.low > records.margin if effect.has_interval else effect.mean > records.margin


def extremes(records: Records) -> tuple[str, str, str]:
    """(the pair set of the closest languages, that of the most distant ones, why they can't be told apart if so)."""
    known = {name: distance for name, distance in records.distances.items() if name in records.targets.values()}
    near, far, tie = "", "", ""
    if len(known) > 1:
        near, far = (extreme(known, key=known.__getitem__) for extreme in (min, max))
        if known[far] - known[near] < TIE:
            tie = f"the distances tie: {far} at {known[far]:.3f}, {near} at {known[near]:.3f}"
        second = records.second_distances
        if not tie and {near, far} <= second.keys() and second[far] < second[near]:
            tie = (
                "the distances disagree: by the pieces that the texts share it is the other way round, "
                f"{far} at {second[far]:.3f}, {near} at {second[near]:.3f}"
            )
    return near, far, tie


def third_language(records: Records, setting: str) -> Finding:
    """Models of three languages minus models of two."""
    pairs, parts = records.targets, {}
    for task, code, group in records.groups("triple"):
        triple = records.pick("triple", setting, task, code, group)
        pair = records.pick("joint", setting, task, code, pairs.get(code, ""))
        floor = unseen(records, setting, task, code)
        parts[f"{task} {code}"] = difference(triple, pair, ("three languages", "two"), floor)
    if setting == paper.ZERO_SHOT:
        claim = "a similar third language helps zero-shot transfer"
        return finding(records, "third_language_helps_zero_shot", claim, parts)
    claim = (
        f"a similar third language leaves scores within a language as they were (each within {records.margin:g} points)"
    )
    return equivalent(records, "third_language_neutral_within", claim, parts)


def partner_size(records: Records) -> Finding:
    parts, pairs = {}, records.targets
    for task, code, group in records.groups("low"):
        full = records.pick("joint", paper.WITHIN, task, records.source, pairs.get(code, ""))
        low = records.pick("low", paper.WITHIN, task, records.source, group)
        parts[f"{task}, partner {code}"] = difference(full, low, ("whole partner", "part of it"))
    claim = f"how much text the partner has changes each of the source's scores by less than {records.margin:g} points"
    return equivalent(records, "partner_size_matters_little", claim, parts)


def equivalent(records: Records, name: str, claim: str, parts: Mapping[str, Part]) -> Finding:
    """Holds if each part lies within the margin: in their mean, effects of opposite signs would hide each other."""
    single = {key: finding(records, name, claim, {key: part}) for key, part in parts.items() if part.per_seed}
    if not single:
        return finding(records, name, claim, {})
    return needing_all(single, functools.partial(negligible, margin=records.margin), records, "farthest from none")


# --- the variants ------------------------------------------------------------------------------------------------------
def beats_joint(records: Records, variant: str, setting: str) -> Finding:
    name = f"{variant}_beats_joint_{setting.replace('-', '_')}"
    return finding(records, name, f"{variant} beats joint, {setting}", compared(records, variant, "joint", setting))


def collapses(records: Records, variant: str) -> Finding:
    """The floor is a model that never saw the language, or guessing where a study has none."""
    parts: dict[str, Part] = {}
    untransferred: list[str] = []  # where joint training transfers nothing that could collapse
    for task, language, group in cells(records):
        joint, ours, floor = (
            records.pick(row, paper.ZERO_SHOT, task, language, group) for row in ("joint", variant, "unseen")
        )
        terms = {"joint": (COLLAPSE, joint), variant: (-1.0, ours)}
        guessing = {score.seed: (1 - COLLAPSE) * score.majority for score in joint}
        part = Part(terms | {"never saw it": (1 - COLLAPSE, floor)}, floor) if floor else Part(terms, (), guessing)
        if not part.per_seed:
            continue
        if _transfers(records, joint, floor):
            parts[f"{task} {language}"] = part
        else:
            untransferred.append(f"{task} {language}")
    claim = f"{variant} collapses zero-shot: it keeps less than half of joint's gain over a model that never saw the language"
    note = f"without {', '.join(untransferred)}, where joint transfers nothing" if untransferred else ""
    cause = "at the floor: joint transfers nothing that could collapse" if untransferred and not parts else ""
    return finding(records, f"{variant}_collapses_zero_shot", claim, parts, note=note, cause=cause)


def meta_is_best(records: Records, setting: str) -> Finding:
    """Holds if meta_adpt beats every rival, of which none may be missing; fails as soon as one rival is better."""
    claim = f"meta_adpt is the best joint model, {setting}; the effect is over the rival that the note names"
    name = f"meta_adpt_best_{setting.replace('-', '_')}"
    rivals = {row: finding(records, name, claim, compared(records, "meta_adpt", row, setting)) for row in RIVALS}
    missing = [row for row, of_rival in rivals.items() if not of_rival.effect.values]
    rivals = {row: of_rival for row, of_rival in rivals.items() if of_rival.effect.values}
    if not rivals:
        return finding(records, name, claim, {})
    result = needing_all(rivals, positive, records, "rival")
    if missing and result.judgement and result.judgement.side == "holds":
        reason = f"without {', '.join(missing)}: not in this study"
        return replace(result, verdict="undecided", uncorrected="undecided", reason=reason, open=False, judgement=None)
    return result


def meta_beats(records: Records, row: str, claim: str) -> Finding:
    """Against a control, over both settings and all sets of two languages together."""
    parts: dict[str, Part] = {}
    for setting in SETTINGS:
        for key, part in compared(records, "meta_adpt", row, setting, low=True).items():
            terms = {f"{name} {setting}": term for name, term in part.terms.items()}
            parts[f"{setting} {key}"] = replace(part, terms=terms)
    name = f"meta_adpt_beats_{row.replace('-', '_')}"
    return finding(records, name, f"{claim}, both settings together", parts)


def meta_predicts_better(records: Records, row: str, claim: str) -> Finding:
    """By the validation loss (the logarithm of perplexity), the mean over a set's languages, against a control."""

    def losses(group: str, variant: str, control: str) -> PerSeed:
        models = [m for m in records.models if (m.set, m.variant, m.control) == (group, variant, control)]
        return {m.seed: statistics.fmean(math.log(value) for value in m.perplexity.values()) for m in models}

    variant, _, control = row.partition("-")
    parts = {}
    for group in dict.fromkeys(m.set for m in records.models if m.variant == "meta_adpt" and not m.control):
        sides = losses(group, variant, control), losses(group, "meta_adpt", "")
        parts[group] = {seed: plain - meta for seed, (plain, meta) in paired(*sides).items()}
    return measured(records, f"meta_adpt_predicts_better_than_{row.replace('-', '_')}", claim, parts, "nats")


def meta_converges(records: Records) -> Finding:
    parts = {}
    for group in dict.fromkeys(records.targets.values()):
        plain, meta = (
            {m.seed: m.early_loss for m in records.models_of(group, row).values() if m.early_loss is not None}
            for row in ("adpt", "meta_adpt")
        )
        parts[group] = {seed: ours - theirs for seed, (ours, theirs) in paired(plain, meta).items()}
    claim = (
        "meta adapters converge faster than plain ones: lower training loss from the warm-up to the middle of the run"
    )
    return measured(records, "meta_adpt_converges_faster", claim, parts, "nats")


def tuning_beats_freezing(records: Records) -> Finding:
    groups: dict[tuple[str, ...], list[TaskScore]] = {}
    for score in records.scores:
        if score.control == "freeze":
            groups.setdefault(
                (score.kind, score.set, score.variant, score.task, score.language, score.train), []
            ).append(score)
    parts = {}
    for (kind, group, variant, task, language, train), frozen in groups.items():
        tuned = records.chosen(
            control="", kind=kind, set=group, variant=variant, task=task, language=language, train=train
        )
        parts[f"{variant} {task} {train}>{language} in {group}"] = difference(tuned, frozen, ("tuned", "frozen"))
    claim = "tuning all parameters beats freezing the language modules"
    return finding(records, "tuning_all_beats_freezing", claim, parts)


# --- the causes --------------------------------------------------------------------------------------------------------
def causes(records: Records) -> list[Finding]:
    """What the analyses of gradients and of masks say."""

    def of_gradients(facts: dict[str, Any]) -> float:
        return facts["within"] - facts["between"] if "between" in facts else math.nan

    def of_masks(name: str, claim: str, more: str, less: str) -> Finding:
        """The masks of two languages on one side of a comparison and on the other, beside the ceilings of both."""
        sides = {side: _of_analyses(records, "prune", functools.partial(_cosine, side=side)) for side in (more, less)}
        ceilings = {
            f"{side} (one language)": _of_analyses(records, "prune", functools.partial(_cosine, side=side, one=True))
            for side in sides
        }
        gaps = _of_analyses(records, "prune", lambda facts: _cosine(facts, more) - _cosine(facts, less))
        return measured(
            records, name, f"masks of two languages are more alike in {claim}", gaps, "cosine of pi", sides | ceilings
        )

    gradients = "gradients of two languages are less alike than those of one language"
    conflict = _of_analyses(records, "conflict", of_gradients)
    return [
        measured(records, "gradients_conflict_across_languages", gradients, conflict, "cosine"),
        of_masks(
            "lower_layers_shared_more", "the lower half of the layers than in the upper", "lower half", "upper half"
        ),
        of_masks("attention_shared_more", "attention than in the feed-forward layers", "attention", "ffn"),
    ]


def _of_analyses(records: Records, analysis: str, gap: Callable[[dict[str, Any]], float]) -> dict[str, PerSeed]:
    """Set and variant -> seed -> gap, of the analyses where it is known."""
    parts: dict[str, PerSeed] = {}
    for row in records.analyses:
        if row.analysis == analysis and math.isfinite(value := gap(row.facts)):
            parts.setdefault(f"{row.set} ({row.variant})", {})[row.seed] = value
    return parts


def _cosine(facts: dict[str, Any], side: str, one: bool = False) -> float:
    """Mean cosine of the masks of two languages in a half of the layers or in a component; NaN where it is not known.

    one: of one language's masks from two seeds instead, which are the ceiling: they differ by chance alone.
    """
    rows = [row for row in facts.get("layers", []) if str(row["layer"]).isdecimal()]
    layers = sorted({row["layer"] for row in rows}, key=int)
    half = len(layers) // 2
    halves = {"lower half": layers[:half], "upper half": layers[len(layers) - half :]}
    column, values = ("layer", halves[side]) if side in halves else ("component", [side])
    chosen = [row for row in rows if (row["left"] == row["right"]) == one and row["cosine"] and row[column] in values]
    return statistics.fmean(float(row["cosine"]) for row in chosen) if chosen else math.nan
