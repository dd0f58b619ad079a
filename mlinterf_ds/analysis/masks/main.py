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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.analysis.job import AnalysisJob
from mlinterf_ds.analysis.masks.gates import COMPONENTS, Gates
from mlinterf_ds.analysis.masks.learning import Subject
from mlinterf_ds.engine.optimizer import LossScale
from mlinterf_ds.engine.precision import DTYPES
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_csv
from mlinterf_ds.gradients.similarity import ALL, pairs, spread, spread_table
from mlinterf_ds.plots.heatmaps import heatmaps
from mlinterf_ds.plots.similarity import extremes_figure, layers_figure

TITLE = "Similarity of the languages' masks"
SCORES = (
    "{language}, seed {seed}: {kept:.0%} of the parameters kept; perplexity {full:.2f} full, {pruned:.2f} pruned "
    "({kept_whole:.2f} with the kept groups whole), {random:.2f} pruned at random"
)
EXTREMES = 10  # groups of either end in figure 4b


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
            print(SCORES.format(**scores[-1]), flush=True)
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


# --- similarity ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Masks:
    """pi of all languages and seeds, and the gates that they belong to."""

    languages: tuple[str, ...]
    seeds: tuple[int, ...]
    pi: np.ndarray  # (languages, seeds, groups) float64
    gates: Gates

    @property
    def components(self) -> list[str]:
        """The components that have groups."""
        return [component for component in COMPONENTS if component in self.gates.per_group("component")]

    @property
    def layers(self) -> list[int]:
        """The layers that have groups."""
        return sorted(set(self.gates.per_group("layer")))

    def scopes(self) -> Iterator[tuple[int | str, str]]:
        """(layer, component) of every reported similarity: the model, its components, and the components of each layer."""
        yield ALL, ALL
        layers: list[int | str] = [ALL, *self.layers]
        yield from itertools.product(layers, self.components)

    def matrix(self, layer: int | str = ALL, component: str = ALL, *, centred: bool = False) -> np.ndarray:
        """(L, L) similarities over a scope's groups; NaN on the diagonal if there is one seed.

        centred: subtract each pi's mean over the scope first, which makes the cosines correlations.
        """
        where = zip(self.gates.per_group("layer"), self.gates.per_group("component"), strict=True)
        chosen = [layer in (ALL, number) and component in (ALL, part) for number, part in where]
        pi = self.pi[..., np.array(chosen)]
        return similarities(pi - pi.mean(axis=-1, keepdims=True) if centred else pi)

    def extremes(self, language: int) -> list[tuple[str, np.ndarray]]:
        """(group, values (L,)) of the groups with a language's lowest and highest pi, ascending.

        Values are means over the seeds, divided by each language's largest absolute mean.
        """
        mean = self.pi.mean(axis=1)
        mean = mean / np.abs(mean).max(axis=1, keepdims=True)
        order = np.argsort(mean[language], kind="stable")
        count, names = min(EXTREMES, len(order) // 2), self.gates.names
        chosen = [*order[:count], *order[len(order) - count :]]
        return [(names[group], mean[:, group]) for group in chosen]


def similarities(pi: np.ndarray) -> np.ndarray:
    """(L, L) mean cosines of pi (L, seeds, groups): over all pairs of seeds of two languages, and over pairs of different
    seeds of one language."""
    count, seeds = pi.shape[:2]
    length = np.linalg.norm(pi, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = (pi / length).reshape(count * seeds, -1)
    cosines = (unit @ unit.T).reshape(count, seeds, count, seeds)
    matrix = cosines.mean(axis=(1, 3))
    different = np.triu_indices(seeds, 1)
    for language in range(count):
        within = cosines[language, :, language][different]
        matrix[language, language] = within.mean() if len(within) else np.nan
    return matrix


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
