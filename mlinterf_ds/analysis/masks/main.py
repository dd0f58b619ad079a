"""Language-specific parameters (paper, sections 3.1 and 3.3, figures 4a and 4b).

Masks are learned for each language on the frozen model (Eq. 1, `learning.py`), once for each seed. Languages share a group of
parameters that their masks value alike; a group that one language keeps and another prunes is language-specific. The similarity
of two languages is the cosine of their log-odds pi, averaged over pairs of seeds. The similarity of a language with itself,
over pairs of different seeds, is the ceiling for two languages. `correlation` is the cosine of centred pi, without what all
groups of a module have in common.

<output>/masks.csv              for each group: layer, component, group, parameters, and pi of every language and seed
<output>/similarity.csv         layer, component, left, right, cosine, correlation
<output>/pruned.csv             language, seed, perplexity full, pruned and pruned at random, and the share kept of each kind
<output>/layers.png/.svg/.csv   figure 4a
<output>/extremes.png/.svg/.csv figure 4b
<output>/matrix.png/.svg/.csv   the languages' similarities: whole model and components
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.analysis.job import AnalysisJob
from mlinterf_ds.analysis.masks.gates import Gates
from mlinterf_ds.analysis.masks.learning import Subject
from mlinterf_ds.analysis.masks.similarity import Masks
from mlinterf_ds.engine.optimizer import LossScale
from mlinterf_ds.engine.precision import DTYPES
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_csv
from mlinterf_ds.gradients.similarity import ALL, pairs, spread, spread_table
from mlinterf_ds.plots.heatmaps import heatmaps
from mlinterf_ds.plots.similarity import extremes_figure, layers_figure

TITLE = "Similarity of the languages' masks"


def run(job: AnalysisJob) -> dict[str, Any]:
    """Learn every language's masks, compare them, and score the pruned models; the summary."""
    settings, layout = job.config.prune, job.layout
    if settings.rows % layout.data:
        raise UserError(f"prune.rows={settings.rows} is not divisible by {layout.data} data-parallel ranks: change it")
    model = job.model.encoder(layout, job.device, DTYPES[job.precision]).requires_grad_(False)
    gates = Gates(model, settings.groups, layout.tensor_rank, layout.tensor)
    scale = LossScale(job.precision == "fp16", job.deepspeed_json.get("fp16", {}))
    subject = Subject(model, gates, job.text, layout, job.device, scale, job.model.row_format)
    learned: list[np.ndarray] = []
    scores: list[dict[str, Any]] = []
    for language, seed in itertools.product(job.languages, settings.seeds):
        pi = subject.learn(language, seed, settings, job.log)
        learned.append(pi.numpy())
        perplexities = subject.scores(language, pi, seed, settings.sequences)
        scores.append({"language": language, "seed": seed, **perplexities, **gates.kept(pi)})
        if job.first:
            print(_score_line(scores[-1]), flush=True)
    of_language = np.array(learned, dtype=np.float64).reshape(len(job.languages), len(settings.seeds), gates.count)
    masks = Masks(job.languages, tuple(settings.seeds), of_language, gates)
    summary = _summary(job, masks, scores)
    if job.first:
        write_tables(job.output, masks, scores)
        draw_figures(job, masks, summary)
        cosines = {name: value for name, value in summary["cosine"].items() if value is not None}
        job.log({f"prune/{name}": value for name, value in cosines.items()}, settings.steps)
        components = {component: facts["cosine"] for component, facts in summary["components"].items()}
        print(spread_table("cosine of pi", {"whole model": summary["cosine"], **components}), flush=True)
    return summary


def _summary(job: AnalysisJob, masks: Masks, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kinds = masks.gates.per_group("kind")
    return {
        "analysis": "prune",
        "checkpoint": str(job.model.path),
        "step": job.model.step,
        "languages": list(masks.languages),
        "groups": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        **job.config.prune.model_dump(include={"penalty", "steps", "rows", "lr", "seeds", "sequences"}),
        **_spreads(masks, ALL),
        "components": {component: _spreads(masks, component) for component in masks.components},
        "pruned": {language: _mean_score(scores, language) for language in masks.languages},
    }


def _spreads(masks: Masks, component: str) -> dict[str, dict[str, float | None]]:
    """The mean similarities within and between languages; None where one language or one seed has none."""
    spreads: dict[str, dict[str, float | None]] = {}
    for measure, centred in (("cosine", False), ("correlation", True)):
        facts = spread(masks.matrix(ALL, component, centred=centred))
        spreads[measure] = {name: value if math.isfinite(value) else None for name, value in facts.items()}
    return spreads


def _mean_score(scores: Sequence[dict[str, Any]], language: str) -> dict[str, float]:
    """A language's perplexities and shares kept, averaged over its seeds."""
    rows = [score for score in scores if score["language"] == language]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name not in ("language", "seed")}


def _score_line(score: dict[str, Any]) -> str:
    return (
        f"{score['language']}, seed {score['seed']}: {score['kept']:.0%} of the parameters kept; perplexity "
        f"{score['full']:.2f} full, {score['pruned']:.2f} pruned ({score['kept_whole']:.2f} with the kept groups whole), "
        f"{score['random']:.2f} pruned at random"
    )


# --- tables and figures ------------------------------------------------------------------------------------------------
def write_tables(output: Path, masks: Masks, scores: Sequence[dict[str, Any]]) -> None:
    """Write masks.csv, pruned.csv, similarity.csv and extremes.csv. scores: a row for each language and seed."""
    codes, gates = list(masks.languages), masks.gates
    runs = [f"{code}/{seed}" for code in codes for seed in masks.seeds]
    fields = [gates.per_group("layer"), gates.per_group("component"), gates.names, gates.per_group("parameters")]
    rows = [
        [*group, *(f"{value:.6g}" for value in values)]
        for *group, values in zip(*fields, masks.pi.reshape(len(runs), -1).T, strict=True)
    ]
    write_csv(output / "masks.csv", ["layer", "component", "group", "parameters", *runs], rows)
    write_csv(output / "pruned.csv", list(scores[0]), [list(score.values()) for score in scores])
    similar = []
    for layer, component in masks.scopes():
        matrices = [masks.matrix(layer, component, centred=centred) for centred in (False, True)]
        for a, b in pairs(len(codes)):
            similar.append([layer, component, codes[a], codes[b], *(float(matrix[a, b]) for matrix in matrices)])
    write_csv(output / "similarity.csv", ["layer", "component", "left", "right", "cosine", "correlation"], similar)
    extremes = [
        [code, name, *map(float, values)] for index, code in enumerate(codes) for name, values in masks.extremes(index)
    ]
    write_csv(output / "extremes.csv", ["chosen_by", "group", *codes], extremes)


def draw_figures(job: AnalysisJob, masks: Masks, summary: dict[str, Any]) -> None:
    """Draw layers, extremes and matrix, each as PNG and SVG with the numbers behind it as CSV."""
    codes, output = list(masks.languages), job.output
    groups = ", ".join(f"{count} {kind}" for kind, count in summary["groups"].items())
    caption = (
        f"{job.described}\n{groups}; lambda {summary['penalty']:g}, {summary['steps']} steps of {summary['rows']} rows, "
        f"seeds {', '.join(map(str, masks.seeds))}"
    )
    by_layer = {part: {layer: masks.matrix(layer, part) for layer in masks.layers} for part in masks.components}
    note = f"{caption}\ndashed: two seeds of one language"
    layers_figure(by_layer, codes, output / "layers.png", title=TITLE, caption=note)
    extremes = {code: masks.extremes(index) for index, code in enumerate(codes)}
    extremes_figure(extremes, codes, output / "extremes.png", title="Groups of extreme pi", caption=caption)
    panels = {"whole model": masks.matrix()} | {part: masks.matrix(ALL, part) for part in masks.components}
    note = f"{caption}\ndiagonal: two seeds of one language"
    heatmaps(panels, codes, codes, output / "matrix.png", title=TITLE, label="cosine of pi", caption=note)
