"""Which figures and tables an interference analysis writes, and what their captions say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.files import write_csv
from mlinterf_ds.plots.bars import BINS, Points, Value, bars, binned, curves, intervals
from mlinterf_ds.plots.heatmaps import heatmaps
from mlinterf_ds.results.comparison import BITS, Comparison
from mlinterf_ds.results.interference import Findings, epochs_of, pair_distances, pairs
from mlinterf_ds.results.losses import read_losses
from mlinterf_ds.results.task_scores import transfer

UNITS = {BITS: "bits per character, joint − mono"}
NAMED_PARTNERS = 3  # of a joint model; of more, their number


def draw(output: Path, found: Findings) -> None:
    """Everything, into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    _table(output, found)
    for metric in dict.fromkeys(each.metric for each in found.comparisons):
        _metric(output, found, metric)
    for metric, panels in transfer(found.scores, found.languages).items():
        caption = (
            f"{found.data}\nmean over seeds and over the models that have both languages; diagonal: within-language"
        )
        middle = float(np.nanmean(np.stack(list(panels.values()))))
        heatmaps(
            panels,
            found.languages,
            found.languages,
            output / f"transfer-{_file(metric)}.png",
            title=f"Zero-shot transfer: {metric}",
            label=metric,
            caption=caption,
            form=".1f",
            middle=middle,
            row_label="fine-tuned on",
            column_label="tested on",
        )
    if found.distance and len(found.languages) > 1:
        heatmaps(
            found.distance,
            found.languages,
            found.languages,
            output / "distance.png",
            title="Distance between languages",
            label="distance",
            caption="vocabulary: 1 − overlap of unigrams; characters: Jensen-Shannon of sequences of 1 to 3; training text of "
            + found.data,
            middle=0.5,
        )
    if found.mono or found.joint:
        _curves(output, found)


def others(language: str, languages: tuple[str, ...]) -> str:
    """ "en" or "3 languages": the partners of a language in a model."""
    rest = [code for code in languages if code != language]
    return "+".join(rest) if len(rest) <= NAMED_PARTNERS else f"{len(rest)} languages"


def _metric(output: Path, found: Findings, metric: str) -> None:
    """Figure 1, the differences and the matrix of one metric."""
    mine = [each for each in found.comparisons if each.metric == metric]
    whiskers = "whiskers: lowest and highest seed" if any(len(each.seeds) > 1 for each in mine) else "one seed"
    heights: list[Value] = []
    gaps: list[Value] = []
    for each in mine:
        category = f"{each.language} with {others(each.language, each.group[0])}"
        if not any(value.category == category and value.series == "mono" for value in heights):
            heights.append(_bar(category, "mono", each.mono))
            if of_larger := found.of_larger.get((metric, each.language)):
                heights.append(_bar(category, "larger", of_larger))
        heights.append(_bar(category, each.group[1], each.joint))
        gaps.append(Value(category, each.group[1], each.difference, each.low, each.high))
    heights.sort(key=lambda value: {"mono": 0, "larger": 2}.get(value.series, 1))
    basis = _basis(mine, found)
    title = "Bits per character of held-out text" if metric == BITS else f"{metric}, within-language"
    name = _file(metric)
    better = "lower is better" if metric == BITS else "higher is better"
    bars(heights, output / f"bars-{name}.png", title=title, label=metric, caption=f"{basis}; {better}; {whiskers}")
    unit = UNITS.get(metric, f"{metric}, mono − joint")
    caption = f"{basis}; 95% bootstrap intervals, paired; right of 0: joint training hurts"
    intervals(gaps, output / f"differences-{name}.png", title="Interference", label=unit, caption=caption)
    panels = pairs(mine, found.languages)
    if panels:
        heatmaps(
            panels,
            found.languages,
            found.languages,
            output / f"pairs-{name}.png",
            title="Interference of pairs",
            label=unit,
            caption=f"{basis}; positive: the partner hurts; grey: no such run",
            form="+.2f",
            row_label="language",
            column_label="partner",
        )


def _bar(category: str, series: str, values: tuple[float, ...]) -> Value:
    spread = (min(values), max(values)) if len(values) > 1 else (math.nan, math.nan)
    return Value(category, series, float(np.mean(values)), *spread)


def _basis(comparisons: list[Comparison], found: Findings) -> str:
    seeds = sorted({seed for each in comparisons for seed in each.seeds})
    rows = sorted({each.rows for each in comparisons})
    what = "rows a language" if comparisons[0].metric == BITS else "fine-tuning seeds"
    span = f"{rows[0]}" if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
    return "; ".join([found.data or f"pretraining seeds {'/'.join(map(str, seeds))}", f"{span} {what}"])


def _table(output: Path, found: Findings) -> None:
    fields = ["metric", "language", "joint_with", "variant", "seeds", "rows"]
    fields += ["mono", "joint", "interference", "low", "high", "mono_epochs", "joint_epochs"]
    rows: list[list[Any]] = []
    for each in found.comparisons:
        near = pair_distances(found, each)
        means = [float(np.mean(each.mono)), float(np.mean(each.joint)), each.difference, each.low, each.high]
        seeds = "+".join(map(str, each.seeds))
        row = [each.metric, each.language, "+".join(each.others), each.group[1], seeds, each.rows, *means]
        rows.append([*row, *epochs_of(found, each), *(near.get(name) for name in found.distance)])
    write_csv(output / "interference.csv", [*fields, *(f"{name}_distance" for name in found.distance)], rows)


def _curves(output: Path, found: Findings) -> None:
    """Figures 2 and 4c: from the runs' own records; a run without train.csv is left out of the latter."""
    runs = [
        (run, kind is found.larger)
        for kind in (found.mono, found.joint, found.larger)
        for seeds in kind.values()
        for run in seeds.values()
    ]
    paths = {run.place: Path(run.place) / "train.csv" for run, _ in runs}
    steps = {place: read_losses(path) for place, path in paths.items() if path.is_file()}
    warm = max((int(run.config["train"]["warmup"]) for run, _ in runs if run.place in steps), default=0)
    last = max((points[-1][0] for of in steps.values() for points in of.values()), default=0)
    perplexity: dict[str, dict[str, dict[int, Points]]] = {}
    losses: dict[str, dict[str, dict[int, Points]]] = {}
    for code in found.languages:
        for run, larger in (each for each in runs if code in each[0].languages):
            name = f"{run.variant} with {others(code, run.languages)}"
            if larger:
                name = f"larger ({run.variant}, {len(run.languages)} languages)"
            elif len(run.languages) == 1:
                name = run.variant
            trained = [point for point in run.history[code] if point[0]]  # untrained, it would set the scale
            perplexity.setdefault(code, {}).setdefault(name, {})[run.seed] = trained
            if points := binned(steps.get(run.place, {}).get(code, []), warm, last):
                losses.setdefault(code, {}).setdefault(name, {})[run.seed] = points
    more = "line: mean of the seeds, shade: their range; x: steps over all languages of a model"
    if perplexity:
        title, label = "Validation perplexity during pretraining", "validation perplexity"
        caption = f"{found.data}; {more}"
        curves(perplexity, output / "validation.png", title=title, label=label, caption=caption)
    if losses:
        title, label = "Training loss after the warm-up", "loss (nats a prediction)"
        caption = f"{found.data}; from step {warm} on, means over up to {BINS} stretches; {more}"
        curves(losses, output / "training.png", title=title, label=label, caption=caption)


def _file(metric: str) -> str:
    return metric.replace(" ", "-")
