"""Language-specific parameters (paper, sections 3.1 and 3.3, figures 4a and 4b).

For each language masks are learned on the frozen model (`masks.py`, Eq. 1), once for each seed. Groups that two languages
value alike are shared by them; groups that one keeps and the other prunes are language-specific. The similarity of two
languages is the cosine of their pi, mean over pairs of seeds; of a language with itself, over pairs of different seeds:
the ceiling. `correlation` is the same with each pi centred, which takes out what all groups of a module have in common.

<output>/masks.csv              a line a group: layer, component, group, parameters; pi of every language and seed
<output>/similarity.csv         layer, component, left, right, cosine, correlation
<output>/pruned.csv             language, seed: perplexity full, pruned and pruned at random; the share kept of each kind
<output>/layers.png/.svg/.csv   figure 4a
<output>/extremes.png/.svg/.csv figure 4b
<output>/matrix.png/.svg/.csv   the languages' similarities: whole model and components
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mlinterf_ds.analysis.job import AnalysisJob
from mlinterf_ds.analysis.masks import hard_concrete
from mlinterf_ds.analysis.masks.gates import Gates
from mlinterf_ds.analysis.masks.learning import Subject
from mlinterf_ds.engine.optimizer import LossScale
from mlinterf_ds.engine.precision import DTYPES
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_csv
from mlinterf_ds.gradients.similarity import ALL, spread
from mlinterf_ds.plots.heatmaps import heatmaps
from mlinterf_ds.plots.masks import extremes_figure, layers_figure

COMPONENTS = ("attention", "ffn")
EXTREMES = 10  # of either end, in figure 4b


def run(job: AnalysisJob) -> dict[str, Any]:
    """Learn every language's masks, compare them, score the pruned models; the summary."""
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
        facts = subject.scores(language, pi, seed, settings.sequences)
        scores.append({"language": language, "seed": seed, **facts, **kept(gates, pi)})
        if job.first:
            print(_line(scores[-1]), flush=True)
    masks = Masks.of(gates, job.languages, settings.seeds, learned)
    summary = _summary(job, masks, scores)
    if job.first:
        _write(job, masks, scores, summary)
        found = summary["cosine"]
        job.log({f"prune/{name}": value for name, value in found.items() if value is not None}, settings.steps)
        print(_shown(summary), flush=True)
    return summary


@dataclass(frozen=True)
class Masks:
    """pi of all languages and seeds, and where its groups lie."""

    languages: tuple[str, ...]
    seeds: tuple[int, ...]
    pi: np.ndarray  # (languages, seeds, groups) float64
    layer: np.ndarray  # (groups,)
    component: np.ndarray  # (groups,)
    kind: np.ndarray  # (groups,)
    names: list[str]
    parameters: list[int]

    @classmethod
    def of(
        cls, gates: Gates, languages: Sequence[str], seeds: Sequence[int], learned: dict[tuple[str, int], np.ndarray]
    ) -> Masks:
        pi = np.array([[learned[language, seed] for seed in seeds] for language in languages], dtype=np.float64)
        layer, component, kind = (np.array(gates.per_group(field)) for field in ("layer", "component", "kind"))
        parameters = gates.per_group("parameters")
        return cls(tuple(languages), tuple(seeds), pi, layer, component, kind, gates.names, parameters)

    def scopes(self) -> Iterator[tuple[int | str, str]]:
        """(layer, component) of everything reported: the model, components, components of layers."""
        yield ALL, ALL
        parts = [part for part in COMPONENTS if part in self.component]
        yield from ((ALL, part) for part in parts)
        yield from ((int(layer), part) for layer in np.unique(self.layer) for part in parts)

    def matrix(self, layer: int | str = ALL, component: str = ALL, *, centred: bool = False) -> np.ndarray:
        """(L, L) similarities over a scope's groups; NaN on the diagonal where there is one seed."""
        chosen = (self.layer == layer) | (layer == ALL)
        chosen &= (self.component == component) | (component == ALL)
        pi = self.pi[..., chosen]
        return similarities(pi - pi.mean(axis=-1, keepdims=True) if centred else pi)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Places of every language with itself, then of every two."""
        count = range(len(self.languages))
        yield from ((place, place) for place in count)
        yield from itertools.combinations(count, 2)

    def extremes(self, language: int) -> list[tuple[str, np.ndarray]]:
        """(group, values (L,)) of the most negative and the most positive groups of a language, ascending.

        Values are means over the seeds, divided by the largest absolute one of each language.
        """
        mean = self.pi.mean(axis=1)
        mean = mean / np.abs(mean).max(axis=1, keepdims=True)
        order = np.argsort(mean[language], kind="stable")
        few = min(EXTREMES, len(order) // 2)
        chosen = [*order[:few], *order[len(order) - few :]]
        return [(self.names[group], mean[:, group]) for group in chosen]


def similarities(pi: np.ndarray) -> np.ndarray:
    """(L, L) cosines from (L, seeds, groups): between languages over all pairs of seeds, within one over different ones."""
    count, seeds = pi.shape[:2]
    length = np.linalg.norm(pi, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = (pi / length).reshape(count * seeds, -1)
    cosines = (unit @ unit.T).reshape(count, seeds, count, seeds)
    found = cosines.mean(axis=(1, 3))
    different = np.triu_indices(seeds, 1)
    for place in range(count):
        within = cosines[place, :, place][different]
        found[place, place] = within.mean() if len(within) else np.nan
    return found


def kept(gates: Gates, pi: torch.Tensor) -> dict[str, float]:
    """The shares that the pruned model keeps: of each kind of group, and of all gated parameters."""
    open_ = (hard_concrete.gate(pi) > 0).float()
    kinds = np.array(gates.per_group("kind"))
    shares = {f"kept_{kind}": float(open_[torch.from_numpy(kinds == kind)].mean()) for kind in dict.fromkeys(kinds)}
    return {"kept": float((open_ * gates.weights()).sum()), **shares}


def _summary(job: AnalysisJob, masks: Masks, scores: list[dict[str, Any]]) -> dict[str, Any]:
    settings = job.config.prune
    averaged = {}
    for language in masks.languages:
        mine = [score for score in scores if score["language"] == language]
        averaged[language] = {name: float(np.mean([s[name] for s in mine])) for name in mine[0] if _is_fact(name)}
    return {
        "analysis": "prune",
        "checkpoint": str(job.model.path),
        "step": int(job.model.saved["updates"]) + int(job.model.saved["skipped"]),
        "languages": list(masks.languages),
        "groups": {str(kind): int((masks.kind == kind).sum()) for kind in dict.fromkeys(masks.kind)},
        **settings.model_dump(include={"penalty", "steps", "rows", "lr", "seeds", "sequences"}),
        "cosine": _plain(spread(masks.matrix())),
        "correlation": _plain(spread(masks.matrix(centred=True))),
        "components": {
            part: {
                "cosine": _plain(spread(masks.matrix(ALL, part))),
                "correlation": _plain(spread(masks.matrix(ALL, part, centred=True))),
            }
            for layer, part in masks.scopes()
            if layer == ALL and part != ALL
        },
        "pruned": averaged,
    }


def _is_fact(name: str) -> bool:
    return name not in ("language", "seed")


def _plain(facts: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in facts.items()}


def _write(job: AnalysisJob, masks: Masks, scores: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Tables and figures."""
    codes, output = list(masks.languages), job.output
    runs = [f"{code}/{seed}" for code in codes for seed in masks.seeds]
    columns = masks.pi.reshape(len(runs), -1).T
    places = zip(masks.layer, masks.component, masks.names, masks.parameters, strict=True)
    rows = [[*place, *(f"{v:.6g}" for v in values)] for place, values in zip(places, columns, strict=True)]
    write_csv(output / "masks.csv", ["layer", "component", "group", "parameters", *runs], rows)
    write_csv(output / "pruned.csv", list(scores[0]), [list(score.values()) for score in scores])
    similar = [
        [layer, part, codes[a], codes[b], *(_cell(masks.matrix(layer, part, centred=c)[a, b]) for c in (False, True))]
        for layer, part in masks.scopes()
        for a, b in masks.pairs()
    ]
    write_csv(output / "similarity.csv", ["layer", "component", "left", "right", "cosine", "correlation"], similar)
    groups = ", ".join(f"{count} {kind}" for kind, count in summary["groups"].items())
    caption = (
        f"{job.model.path}, step {summary['step']}, text of {job.text.folder.name}\n{groups}; lambda {summary['penalty']:g}, {summary['steps']} steps of "
        f"{summary['rows']} rows, seeds {', '.join(map(str, masks.seeds))}"
    )
    layered = {
        part: {int(layer): masks.matrix(int(layer), part) for layer in np.unique(masks.layer)}
        for part in COMPONENTS
        if part in masks.component
    }
    dashes = f"{caption}\ndashed: two seeds of one language"
    layers_figure(layered, codes, output / "layers.png", title="Similarity of the languages' masks", caption=dashes)
    chosen = {code: masks.extremes(place) for place, code in enumerate(codes)}
    table = [[code, name, *map(float, values)] for code, found in chosen.items() for name, values in found]
    write_csv(output / "extremes.csv", ["chosen_by", "group", *codes], table)
    extremes_figure(chosen, codes, output / "extremes.png", title="Groups of extreme pi", caption=caption)
    panels = {"whole model": masks.matrix()} | {part: masks.matrix(ALL, part) for part in layered}
    heatmaps(
        panels,
        codes,
        codes,
        output / "matrix.png",
        title="Similarity of the languages' masks",
        label="cosine of pi",
        caption=f"{caption}\ndiagonal: two seeds of one language",
    )


def _cell(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else ""


def _line(score: dict[str, Any]) -> str:
    return (
        f"{score['language']}, seed {score['seed']}: {score['kept']:.0%} of the parameters kept; perplexity "
        f"{score['full']:.2f} full, {score['pruned']:.2f} pruned ({score['kept_whole']:.2f} with the kept groups whole), "
        f"{score['random']:.2f} pruned at random"
    )


def _shown(summary: dict[str, Any]) -> str:
    lines = [f"{'cosine of pi':<22}{'within':>9}{'between':>9}"]
    parts = {part: facts["cosine"] for part, facts in summary["components"].items()}
    for name, facts in {"whole model": summary["cosine"], **parts}.items():
        cells = [facts.get(column) for column in ("within", "between")]
        lines.append(f"{name:<22}" + "".join(f"{'-' if v is None else f'{v:.3f}':>9}" for v in cells))
    return "\n".join(lines)
