"""Interference itself (paper, sections 2 and 3.3): monolingual against joint models, and how far the languages are apart.

Positive interference means harm: in bits per character it is joint minus mono, in a task's score mono minus joint.

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

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.analysis.distance import distances
from mlinterf_ds.analysis.job import AnalysisJob
from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.data.evaluation import EvaluationSet
from mlinterf_ds.errors import UserError
from mlinterf_ds.evaluate import ROWS, Model
from mlinterf_ds.files import write_csv
from mlinterf_ds.plots.bars import Value, bars, intervals
from mlinterf_ds.plots.curves import BINS, binned, seed_curves
from mlinterf_ds.plots.heatmaps import heatmaps
from mlinterf_ds.plots.style import Points
from mlinterf_ds.ranks import from_first
from mlinterf_ds.results.interference import (
    BITS,
    Comparison,
    InterferenceResults,
    compare_bits,
    compare_scores,
    transfer,
)
from mlinterf_ds.results.runs import FineTunedRun, PretrainedRun, Setup, by_setup, common_corpus

UNITS = {BITS: "bits per character, joint − mono"}
NAMED_PARTNERS = 3  # a label names up to this many partners, and only counts more


def run(job: AnalysisJob) -> dict[str, Any]:
    """Compares the runs that the configuration names and returns the summary. All ranks evaluate; the first one draws."""
    settings = job.config.interference
    if not (settings.mono and settings.joint) and not settings.tasks:
        raise UserError(
            "nothing to compare: give runs (--set interference.mono=runs/en,runs/sw --set interference.joint=runs/en-sw), "
            "or fine-tunings (--set interference.tasks=runs/ner-en,...)"
        )
    results = measure(job)
    if not results.comparisons and not results.tuned:
        raise UserError(
            "nothing to compare: " + ("; ".join(results.notes) or "no language has a mono and a joint model")
        )
    if job.first:
        draw(job.output, results)
        step = max([seeds[min(seeds)].step for seeds in results.joint.values()], default=0)
        for comparison in results.comparisons:
            name = f"interference/{comparison.metric}/{comparison.language} in {comparison.setup.joined}"
            job.log({name: comparison.effect.mean}, step)
        print(results.shown(), flush=True)
    return {
        "analysis": "interference",
        "sign": "positive: joint training hurts",
        "interval": "95%, over seeds and test examples or rows of text, paired",
        "split": settings.split,
        "precision": job.precision,
        "data": results.data,
        "languages": list(results.languages),
        "comparisons": results.rows(),
        "intervals that include zero": results.with_zero,
        "rank correlation with distance": results.correlations(),
        "notes": [*results.notes, *results.cautions()],
    }


def measure(job: AnalysisJob) -> InterferenceResults:
    """Opens, checks, evaluates and compares the runs; every mistake of the user is reported before anything is evaluated."""
    settings = job.config.interference
    mono, joint, larger = (open_runs(kind, getattr(settings, kind)) for kind in ("mono", "joint", "larger"))
    every = [*mono, *joint, *larger]
    tuned = [FineTunedRun.open(folder) for folder in settings.tasks]
    known = sorted({code for run in every or tuned for code in run.setup.languages})
    if unknown := [code for code in job.languages if code not in known]:
        raise UserError(f"languages: no run knows {', '.join(unknown)}; the runs' languages are {', '.join(known)}")
    languages = tuple(job.languages or known)
    comparisons, of_larger = compare_scores(tuned, languages, settings.larger)
    results = InterferenceResults(
        comparisons, of_larger, by_setup(mono), by_setup(joint), by_setup(larger), tuned, languages
    )
    if every:
        corpus = common_corpus(every, job.config.corpus)
        results.distances |= from_first(distances(corpus, languages) if job.first else None)
        bits = {run.folder: bits_per_character(job, run, corpus, languages) for run in every}
        of_text, notes = compare_bits(results.mono, results.joint, bits, languages)
        results.comparisons.extend(of_text)
        results.notes.extend(notes)
        for code in languages:
            if large_bits := [bits[run.folder][code] for run in larger if code in bits[run.folder]]:
                results.of_larger[BITS, code] = tuple(float(rows.mean()) for rows in large_bits)
        results.epochs |= {run.folder: run.epochs(corpus) for run in every}
        results.data = description(every, corpus, languages)
    results.comparisons.sort(key=lambda c: (c.metric != BITS, c.metric, c.language, c.setup.languages))
    return results


def open_runs(kind: str, names: Sequence[str]) -> list[PretrainedRun]:
    """Opens the runs of `interference.<kind>`. UserError if a mono model has several languages or another one has one."""
    runs = [PretrainedRun.open(name) for name in names]
    wanted = "one language" if kind == "mono" else "two languages or more"
    for member in runs:
        if (len(member.setup.languages) == 1) != (kind == "mono"):
            codes = ", ".join(member.setup.languages)
            raise UserError(
                f"interference.{kind} {member.folder}: that model's languages are {codes}; expected {wanted}"
            )
    return runs


def bits_per_character(
    job: AnalysisJob, run: PretrainedRun, corpus: Corpus, languages: Sequence[str]
) -> dict[str, np.ndarray]:
    """Language -> (rows,) bits per character of held-out text; its rows and masks do not depend on the model."""
    settings = job.config.interference
    model = Model(run.folder, job.layout, job.precision)
    bits = {}
    for code in (code for code in languages if code in model.languages):
        rows = EvaluationSet(
            corpus, code, settings.split, languages=model.languages, row_format=model.row_format, max_rows=settings.rows,
        )  # fmt: skip
        bits[code] = row_losses(model, rows) * rows.bits_per_character(1.0)
    return bits


def row_losses(model: Model, rows: EvaluationSet) -> np.ndarray:
    """(rows,) float64 mean loss of the predictions in each row, in nats; the same on all ranks."""
    layout, losses = model.layout, np.zeros(rows.rows)
    size = min(ROWS, -(-rows.rows // layout.data))  # rows of a rank's batch, as `EvaluationSet.batches` shares them out
    for number, batch in enumerate(rows.batches(ROWS, layout.data_rank, layout.data)):
        first = (number * layout.data + layout.data_rank) * size
        of_batch = model.surprisals(batch).double().mean(dim=1).numpy()[: max(0, rows.rows - first)]
        losses[first : first + len(of_batch)] = of_batch
    return np.array(model.summed(losses.tolist()))


def description(runs: Sequence[PretrainedRun], corpus: Corpus, languages: Sequence[str]) -> str:
    """The data, steps and seeds of the runs in words."""
    sizes = ", ".join(f"{code} {corpus.sentences(code, 'train'):,}" for code in languages)
    facts = [(member.step, member.config["train"]["batch"], member.seed) for member in runs]
    steps, batch, seeds = ("/".join(map(str, sorted(set(values)))) for values in zip(*facts, strict=True))
    return (
        f"{corpus.folder.name} (training sentences: {sizes}); best checkpoints at step {steps}, {batch} rows of "
        f"{runs[0].pretrained.row_format.length} tokens a step, pretraining seeds {seeds}"
    )


# --- tables and figures -------------------------------------------------------------------------------------------------
def draw(output: Path, results: InterferenceResults) -> None:
    """Writes every table and figure into `output`."""
    _write_table(output, results)
    draw_matrices = functools.partial(heatmaps, rows=results.languages, columns=results.languages)
    for metric in dict.fromkeys(comparison.metric for comparison in results.comparisons):
        _draw_metric(output, results, metric)
    for metric, matrices in transfer(results.tuned, results.languages).items():
        caption = "mean over seeds and over the models that have both languages; diagonal: within-language"
        draw_matrices(
            matrices, path=output / f"transfer-{metric.replace(' ', '-')}.png", title=f"Zero-shot transfer: {metric}",
            label=metric, caption=f"{results.data}\n{caption}", form=".1f", row_label="fine-tuned on",
            column_label="tested on",
        )  # fmt: skip
    if results.distances and len(results.languages) > 1:
        caption = (
            "vocabulary: 1 − overlap of unigrams; characters: Jensen-Shannon of sequences of 1 to 3; training text of "
        )
        draw_matrices(
            results.distances, path=output / "distance.png", title="Distance between languages", label="distance",
            caption=caption + results.data,
        )  # fmt: skip
    if results.mono or results.joint:
        _draw_curves(output, results)


def _partners(language: str, setup: Setup) -> str:
    """For example "en", "en+hi" or "12 languages"."""
    partners = setup.partners(language)
    return "+".join(partners) if len(partners) <= NAMED_PARTNERS else f"{len(partners)} languages"


def _write_table(output: Path, results: InterferenceResults) -> None:
    """interference.csv: the rows of the summary, with lists joined by "+"."""
    columns = ["metric", "language", "joint_with", "variant", "seeds", "rows"]
    columns += ["mono", "joint", "interference", "low", "high", "mono_epochs", "joint_epochs"]
    floors = ["majority", "lexical"]
    table = []
    for row in results.rows():
        cells = [row["metric"], row["language"], "+".join(row["joint with"]), row["variant"]]
        cells += ["+".join(map(str, row["seeds"])), row["rows"], row["mono"], row["joint"], row["interference"]]
        distances = (row["distance"].get(name) for name in results.distances)
        table.append(
            [*cells, *row["interval"], *row["epochs"], *distances, *(row["floors"].get(name) for name in floors)]
        )
    columns += [f"{name}_distance" for name in results.distances] + floors
    write_csv(output / "interference.csv", columns, table)


def _draw_metric(output: Path, results: InterferenceResults, metric: str) -> None:
    """The bars of figure 1, the differences with their intervals, and the matrix of pairs."""
    comparisons = [comparison for comparison in results.comparisons if comparison.metric == metric]
    levels: list[Value] = []
    gaps: list[Value] = []
    for comparison in comparisons:
        language, variant, effect = comparison.language, comparison.setup.variant, comparison.effect
        category = f"{language} with {_partners(language, comparison.setup)}"
        if not any((level.category, level.series) == (category, "mono") for level in levels):
            levels.append(_level(category, "mono", comparison.mono))
            if of_larger := results.of_larger.get((metric, language)):
                levels.append(_level(category, "larger", of_larger))
            levels += [Value(category, name, floor) for name, floor in comparison.floors.items()]
        levels.append(_level(category, variant, comparison.joint))
        gaps.append(Value(category, variant, effect.mean, *(effect.low, effect.high) * effect.has_interval))
    levels.sort(key=lambda level: {"mono": 0, "larger": 2}.get(level.series, 1))
    basis, stem = _basis(comparisons, results), metric.replace(" ", "-")
    better = "lower is better" if metric == BITS else "higher is better"
    whiskers = "whiskers: lowest and highest seed" if any(len(c.seeds) > 1 for c in comparisons) else "one seed"
    title = "Bits per character of held-out text" if metric == BITS else f"{metric}, within-language"
    bars(levels, output / f"bars-{stem}.png", title=title, label=metric, caption=f"{basis}; {better}; {whiskers}")
    sampled = "rows" if metric == BITS else "test examples"
    unit = UNITS.get(metric, f"{metric}, mono − joint")
    caption = f"{basis}; 95% intervals over seeds and {sampled}, paired; right of 0: joint training hurts"
    intervals(gaps, output / f"differences-{stem}.png", title="Interference", label=unit, caption=caption)
    if matrices := results.pair_matrices(metric):
        caption = f"{basis}; positive: the partner hurts; grey: no such run"
        heatmaps(
            matrices, results.languages, results.languages, output / f"pairs-{stem}.png", title="Interference of pairs",
            label=unit, caption=caption, form="+.2f", signed=True, noise=results.pair_matrices(metric, noise=True),
            row_label="language", column_label="partner",
        )  # fmt: skip


def _level(category: str, series: str, values: tuple[float, ...]) -> Value:
    """A bar at the mean, with whiskers to the lowest and the highest seed."""
    spread = (min(values), max(values)) if len(values) > 1 else (math.nan, math.nan)
    return Value(category, series, float(np.mean(values)), *spread)


def _basis(comparisons: list[Comparison], results: InterferenceResults) -> str:
    """What the numbers of a figure rest on, in words."""
    seeds = sorted({seed for comparison in comparisons for seed in comparison.seeds})
    rows = sorted({comparison.rows for comparison in comparisons})
    unit = "rows a language" if comparisons[0].metric == BITS else "fine-tuning seeds"
    span = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
    return "; ".join([results.data or f"pretraining seeds {'/'.join(map(str, seeds))}", f"{span} {unit}"])


def _draw_curves(output: Path, results: InterferenceResults) -> None:
    """Figures 2 and 4c from the runs' own records; a run without train.csv is left out of the latter."""
    runs = [
        (run, f"larger ({variant}, {len(codes)} languages)" if groups is results.larger else variant)
        for groups in (results.mono, results.joint, results.larger)
        for (codes, variant), seeds in groups.items()
        for run in seeds.values()
    ]
    warmup = max((int(run.config["train"]["warmup"]) for run, _ in runs if run.losses), default=0)
    last = max((points[-1][0] for run, _ in runs for points in run.losses.values()), default=0)
    perplexity: dict[str, dict[str, dict[int, Points]]] = {}
    losses: dict[str, dict[str, dict[int, Points]]] = {}
    for code in results.languages:
        for run, name in runs:
            if code not in run.setup.languages:
                continue
            if run.setup.joined != code and not name.startswith("larger"):
                name = f"{name} with {_partners(code, run.setup)}"
            trained = [point for point in run.history[code] if point[0]]  # step 0, untrained, would set the scale
            perplexity.setdefault(code, {}).setdefault(name, {})[run.seed] = trained
            if points := binned(run.losses.get(code, []), warmup, last):
                losses.setdefault(code, {}).setdefault(name, {})[run.seed] = points
    lines = "line: mean of the seeds, shade: their range; x: steps over all languages of a model"
    title, label = "Validation perplexity during pretraining", "validation perplexity"
    if perplexity:
        caption = f"{results.data}; {lines}"
        seed_curves(perplexity, output / "validation.png", title=title, label=label, caption=caption)
    title, label = "Training loss after the warm-up", "loss (nats a prediction)"
    if losses:
        caption = f"{results.data}; from step {warmup} on, means over up to {BINS} stretches; {lines}"
        seed_curves(losses, output / "training.png", title=title, label=label, caption=caption)
