"""The paper's figure 4c over a whole study: validation perplexity of plain and of meta adapters during training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from mlinterf_ds.results.records import AnalysisSummary, Records, TrainedModel

if TYPE_CHECKING:
    from mlinterf_ds.plots.style import Points

CONVERGENCE = "convergence"
VARIANTS = ("adpt", "meta_adpt")


def draw(records: Records, folder: Path) -> list[AnalysisSummary]:
    """Draws a figure for each pair set that was trained both ways, over the seeds that both have; lists them as an analysis."""
    from mlinterf_ds.plots.curves import seed_curves

    figures = []
    for name in dict.fromkeys(model.set for model in records.models if model.kind == "pair"):
        models = {variant: records.models_of(name, variant) for variant in VARIANTS}
        seeds = sorted(set.intersection(*(set(by_seed) for by_seed in models.values())))
        if not seeds:
            continue
        path, count = folder / f"{CONVERGENCE}-{name}.png", f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        curves = {
            language: {
                f"{variant}, {count}": {seed: trained(by_seed[seed], language) for seed in seeds}
                for variant, by_seed in models.items()
            }
            for language in models[VARIANTS[0]][seeds[0]].languages
        }
        caption = "line: mean of the seeds, shade: their range"
        seed_curves(curves, path, title=f"Convergence, {name}", label="validation perplexity", caption=caption)
        figures.append(str(path))
    if not figures:
        return []
    seed = records.seeds[0]
    return [AnalysisSummary("all", [], "all", seed, analysis=CONVERGENCE, facts={}, figures=figures)]


def trained(model: TrainedModel, language: str) -> Points:
    """The model's finite perplexities after step 0; beside an untrained model's all others would look alike."""
    return [(step, value) for step, value in model.history.get(language, []) if step and math.isfinite(value)]
