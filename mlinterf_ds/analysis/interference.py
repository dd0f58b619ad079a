"""Interference itself (paper, sections 2 and 3.3): monolingual against joint models, and how far the languages are apart.

Positive interference hurts: of bits per character it is joint minus mono, of a task's score mono minus joint.

<output>/interference.csv      every comparison, with its 95% interval and the languages' distances
<output>/bars-*                the paper's figure 1: mono, joint and larger models, by metric
<output>/differences-*         the same as differences with their intervals
<output>/pairs-*               language by partner: interference of joint models of two
<output>/transfer-*            zero-shot: fine-tuned on a language, tested on another
<output>/distance              of the languages
<output>/validation            figure 2: validation perplexity during pretraining
<output>/training              figure 4c: training loss after the warm-up
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlinterf_ds.analysis.distance import distances
from mlinterf_ds.analysis.interference_figures import draw
from mlinterf_ds.analysis.job import AnalysisJob
from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.data.evaluation import EvaluationSet
from mlinterf_ds.errors import UserError
from mlinterf_ds.evaluate import ROWS, Model
from mlinterf_ds.ranks import from_first
from mlinterf_ds.results.comparison import BITS, Comparison
from mlinterf_ds.results.interference import Findings, epochs_of, pair_distances
from mlinterf_ds.results.runs import Group, Run, by_group, differences, one_text
from mlinterf_ds.results.task_scores import compare_scores, read_scores
from mlinterf_ds.tasks.metrics import rank_correlation


def run(job: AnalysisJob) -> dict[str, Any]:
    """Compare the runs named by the configuration; the summary. All ranks evaluate, the first one draws."""
    settings = job.config.interference
    if not (settings.mono and settings.joint) and not settings.tasks:
        raise UserError(
            "nothing to compare: give runs (--set interference.mono=runs/en,runs/sw --set interference.joint=runs/en-sw), "
            "or fine-tunings (--set interference.tasks=runs/ner-en,...)"
        )
    found = gather(job)
    if not found.comparisons and not found.scores:
        raise UserError("nothing to compare: " + ("; ".join(found.notes) or "no language has a mono and a joint model"))
    found.comparisons.sort(key=lambda each: (each.metric != BITS, each.metric, each.language, each.group[0]))
    summary = _summary(job, found)
    if job.first:
        draw(job.output, found)
        step = max([seeds[min(seeds)].step for seeds in found.joint.values()], default=0)
        for each in found.comparisons:
            job.log({f"interference/{each.metric}/{each.language} in {'-'.join(each.group[0])}": each.difference}, step)
        print(_shown(found), flush=True)
    return summary


def gather(job: AnalysisJob) -> Findings:
    """Open, check, evaluate and compare; every mistake is found before anything is evaluated."""
    settings = job.config.interference
    runs: dict[str, list[Run]] = {
        kind: open_runs(kind, getattr(settings, kind)) for kind in ("mono", "joint", "larger")
    }
    groups = {kind: by_group(of) for kind, of in runs.items()}
    every = list(itertools.chain(*runs.values()))
    scores = [read_scores(place) for place in settings.tasks]
    known = sorted({code for each in every or scores for code in each.languages})
    if unknown := [code for code in job.languages if code not in known]:
        raise UserError(f"languages: no run knows {', '.join(unknown)}; the runs' languages are {', '.join(known)}")
    languages = tuple(job.languages or known)
    comparisons, larger = compare_scores(scores, languages, settings.larger)
    distance: dict[str, np.ndarray] = {}
    epochs: dict[str, dict[str, float]] = {}
    notes: list[str] = []
    data = ""
    if every:
        corpus = one_text(every, job.config.corpus)
        distance = from_first(distances(corpus, languages, settings.typology) if job.first else None)
        bits = {each.place: evaluate(job, each, corpus, languages) for each in every}
        comparisons = compare(groups["mono"], groups["joint"], bits, languages, notes) + comparisons
        for code in languages:
            if values := [float(bits[each.place][code].mean()) for each in runs["larger"] if code in each.languages]:
                larger[BITS, code] = tuple(values)
        epochs = {each.place: each.epochs(corpus) for each in every}
        data = described(every, corpus, languages)
    return Findings(
        comparisons=comparisons,
        of_larger=larger,
        **groups,
        scores=scores,
        distance=distance,
        languages=languages,
        epochs=epochs,
        data=data,
        notes=notes,
    )


def open_runs(kind: str, places: Sequence[str]) -> list[Run]:
    """The runs of interference.<kind>: mono ones of one language, others of several."""
    runs = [Run.open(place) for place in places]
    for each in runs:
        if (len(each.languages) == 1) != (kind == "mono"):
            wanted = "one language" if kind == "mono" else "two languages or more"
            raise UserError(
                f"interference.{kind} {each.place}: that model's languages are {', '.join(each.languages)}; expected {wanted}"
            )
    return runs


# --- bits per character ----------------------------------------------------------------------------------------------
def row_losses(model: Model, rows: EvaluationSet) -> np.ndarray:
    """Mean loss of each row's predictions, in nats, the same on all ranks.  # (rows,) float64"""
    layout, losses = model.layout, np.zeros(rows.rows)
    size = min(ROWS, -(-rows.rows // layout.data))  # as `batches` shares them out
    for number, batch in enumerate(rows.batches(ROWS, layout.data_rank, layout.data)):
        first = (number * layout.data + layout.data_rank) * size
        mine = model.surprisals(batch).double().mean(dim=1).numpy()[: max(0, rows.rows - first)]
        losses[first : first + len(mine)] = mine
    return np.array(model.summed(losses.tolist()))


def evaluate(job: AnalysisJob, run: Run, corpus: Corpus, languages: Sequence[str]) -> dict[str, np.ndarray]:
    """language -> bits per character of each row; rows and masks do not depend on the model."""
    settings = job.config.interference
    model = Model(run.place, job.layout, job.precision)
    found = {}
    for code in (code for code in languages if code in model.languages):
        rows = EvaluationSet(
            corpus,
            code,
            settings.split,
            languages=model.languages,
            length=model.length,
            max_rows=settings.rows,
            mask_share=model.mask_share,
        )
        found[code] = row_losses(model, rows) * rows.bits_per_character(1.0)
    return found


def compare(
    mono: dict[Group, dict[int, Run]],
    joint: dict[Group, dict[int, Run]],
    bits: dict[str, dict[str, np.ndarray]],
    languages: Sequence[str],
    notes: list[str],
) -> list[Comparison]:
    """Every language of every joint model against its mono model, seed by seed; what cannot be paired is noted."""
    alone: dict[str, dict[int, Run]] = {}
    for ((only,), variant), seeds in mono.items():
        if only in alone:
            raise UserError(f"interference.mono: {only} has runs of several variants, {variant} too: give one")
        alone[only] = seeds
    found = []
    for group, seeds in joint.items():
        for code in (code for code in group[0] if code in languages):
            name = f"{code} in {'-'.join(group[0])} ({group[1]})"
            common = sorted(seeds.keys() & alone.get(code, {}).keys())
            if not common:
                notes.append(f"{name}: no mono run of {code} with one of the seeds {sorted(seeds)}: left out")
                continue
            if single := sorted(seeds.keys() ^ alone[code].keys()):
                notes.append(f"{name}: seeds {', '.join(map(str, single))} have no partner: left out")
            if differ := differences(alone[code][common[0]], seeds[common[0]]):
                notes.append(f"{name}: mono and joint differ in {', '.join(differ)}")
            ours = np.stack([bits[alone[code][seed].place][code] for seed in common])  # (seeds, rows)
            theirs = np.stack([bits[seeds[seed].place][code] for seed in common])
            found.append(Comparison.of(BITS, code, group, common, ours, theirs))
    return found


def described(runs: Sequence[Run], corpus: Corpus, languages: Sequence[str]) -> str:
    """Data, steps and seeds of the runs in words."""
    sizes = ", ".join(f"{code} {corpus.sentences(code, 'train'):,}" for code in languages)
    steps, batch, seeds = (
        "/".join(map(str, sorted(set(values))))
        for values in zip(*((each.step, each.config["train"]["batch"], each.seed) for each in runs), strict=True)
    )
    length = runs[0].pretrained.positions
    return (
        f"{corpus.folder.name} (training sentences: {sizes}); best checkpoints at step {steps}, {batch} rows of {length} "
        f"tokens a step, pretraining seeds {seeds}"
    )


# --- reports ---------------------------------------------------------------------------------------------------------
def correlations(found: Findings) -> dict[str, dict[str, Any]]:
    """Rank correlation of pairwise interference (bits per character) with each distance, by variant; 4 pairs or more.

    Both directions of a pair are counted, which share models: read it as a description.
    """
    table: dict[str, dict[str, Any]] = {}
    pairs = [each for each in found.comparisons if each.metric == BITS and len(each.others) == 1]
    for variant, name in itertools.product(sorted({each.group[1] for each in pairs}), found.distance):
        mine = [each for each in pairs if each.group[1] == variant]
        both = [(each.difference, pair_distances(found, each).get(name, math.nan)) for each in mine]
        both = [pair for pair in both if math.isfinite(pair[1])]
        if len(both) >= 4:
            rho = rank_correlation(*zip(*both, strict=True))
            table.setdefault(variant, {})[name] = {"rho": None if math.isnan(rho) else rho, "pairs": len(both)}
    return table


def _summary(job: AnalysisJob, found: Findings) -> dict[str, Any]:
    def plain(value: float) -> float | None:
        return value if math.isfinite(value) else None

    rows = [
        {
            "metric": each.metric,
            "language": each.language,
            "joint with": list(each.others),
            "variant": each.group[1],
            "seeds": list(each.seeds),
            "rows": each.rows,
            "mono": float(np.mean(each.mono)),
            "joint": float(np.mean(each.joint)),
            "interference": each.difference,
            "interval": [plain(each.low), plain(each.high)],
            "epochs": [plain(value) for value in epochs_of(found, each)],
            "distance": {name: plain(value) for name, value in pair_distances(found, each).items()},
        }
        for each in found.comparisons
    ]
    return {
        "analysis": "interference",
        "sign": "positive: joint training hurts",
        "interval": "95%, bootstrap over rows and seeds, paired",
        "split": job.config.interference.split,
        "precision": job.precision,
        "data": found.data,
        "languages": list(found.languages),
        "comparisons": rows,
        "rank correlation with distance": correlations(found),
        "notes": found.notes,
    }


def _shown(found: Findings) -> str:
    lines = [
        f"{'metric':<20}{'language':<10}{'joint model':<24}{'mono':>9}{'joint':>9}{'interference':>14}   95% interval"
    ]
    for each in found.comparisons:
        name = f"{'-'.join(each.group[0])} ({each.group[1]})"
        interval = "" if math.isnan(each.low) else f"   {each.low:+.3f} to {each.high:+.3f}"
        lines.append(
            f"{each.metric:<20}{each.language:<10}{name:<24}{np.mean(each.mono):>9.3f}{np.mean(each.joint):>9.3f}"
            f"{each.difference:>+14.3f}{interval}"
        )
    return "\n".join([*lines, "positive: joint training hurts", *(f"note: {note}" for note in found.notes)])
