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
from typing import Any

import numpy as np

from mlinterf_ds.analysis.job import AnalysisJob
from mlinterf_ds.analysis.masks.figures import draw_figures, write_tables
from mlinterf_ds.analysis.masks.gates import Gates
from mlinterf_ds.analysis.masks.learning import Subject
from mlinterf_ds.analysis.masks.similarity import Masks
from mlinterf_ds.engine.optimizer import LossScale
from mlinterf_ds.engine.precision import DTYPES
from mlinterf_ds.errors import UserError
from mlinterf_ds.gradients.similarity import ALL, spread


def run(job: AnalysisJob) -> dict[str, Any]:
    """Learn every language's masks, compare them, and score the pruned models; the summary."""
    settings, layout = job.config.prune, job.layout
    if settings.rows % layout.data:
        raise UserError(f"prune.rows={settings.rows} is not divisible by {layout.data} data-parallel ranks: change it")
    model = job.model.encoder(layout, job.device, DTYPES[job.precision]).requires_grad_(False)
    gates = Gates(model, settings.groups, layout.tensor_rank, layout.tensor)
    scale = LossScale(job.precision == "fp16", job.deepspeed_json.get("fp16", {}))
    share = job.model.mask_share
    subject = Subject(model, gates, job.text, layout, job.device, scale, job.model.positions, share)
    learned: dict[tuple[str, int], np.ndarray] = {}
    scores: list[dict[str, Any]] = []
    for language, seed in itertools.product(job.languages, settings.seeds):
        pi = subject.learn(language, seed, settings, job.log)
        learned[language, seed] = pi.numpy()
        perplexities = subject.scores(language, pi, seed, settings.sequences)
        scores.append({"language": language, "seed": seed, **perplexities, **gates.kept(pi)})
        if job.first:
            print(_score_line(scores[-1]), flush=True)
    masks = Masks.of(gates, job.languages, settings.seeds, learned)
    summary = _summary(job, masks, scores)
    if job.first:
        write_tables(job.output, masks, scores)
        draw_figures(job, masks, summary)
        cosines = {name: value for name, value in summary["cosine"].items() if value is not None}
        job.log({f"prune/{name}": value for name, value in cosines.items()}, settings.steps)
        print(_similarity_table(summary), flush=True)
    return summary


def _summary(job: AnalysisJob, masks: Masks, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "analysis": "prune",
        "checkpoint": str(job.model.path),
        "step": int(job.model.saved["updates"]) + int(job.model.saved["skipped"]),
        "languages": list(masks.languages),
        "groups": {str(kind): int((masks.kind == kind).sum()) for kind in dict.fromkeys(masks.kind)},
        **job.config.prune.model_dump(include={"penalty", "steps", "rows", "lr", "seeds", "sequences"}),
        **_spreads(masks, ALL),
        "components": {component: _spreads(masks, component) for component in masks.components},
        "pruned": {language: _mean_score(scores, language) for language in masks.languages},
    }


def _spreads(masks: Masks, component: str) -> dict[str, dict[str, float | None]]:
    """The mean similarities within and between languages; None where one language or one seed has none."""
    spreads = {
        "cosine": spread(masks.matrix(ALL, component)),
        "correlation": spread(masks.matrix(ALL, component, centred=True)),
    }
    return {
        measure: {name: value if math.isfinite(value) else None for name, value in facts.items()}
        for measure, facts in spreads.items()
    }


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


def _similarity_table(summary: dict[str, Any]) -> str:
    lines = [f"{'cosine of pi':<22}{'within':>9}{'between':>9}"]
    components = {component: facts["cosine"] for component, facts in summary["components"].items()}
    for name, facts in {"whole model": summary["cosine"], **components}.items():
        cells = [facts.get(column) for column in ("within", "between")]
        lines.append(f"{name:<22}" + "".join(f"{'-' if cell is None else f'{cell:.3f}':>9}" for cell in cells))
    return "\n".join(lines)
