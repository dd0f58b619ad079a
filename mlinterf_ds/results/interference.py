"""What an interference analysis found, as its figures and tables are drawn from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlinterf_ds.results.comparison import Comparison
from mlinterf_ds.results.runs import Group, Run
from mlinterf_ds.results.task_scores import Scores


@dataclass(frozen=True)
class Findings:
    """All that the figures are drawn from."""

    comparisons: list[Comparison]
    of_larger: dict[tuple[str, str], tuple[float, ...]]  # (metric, language) -> a value a larger model
    mono: dict[Group, dict[int, Run]]
    joint: dict[Group, dict[int, Run]]
    larger: dict[Group, dict[int, Run]]
    scores: list[Scores]
    distance: dict[str, np.ndarray]
    languages: tuple[str, ...]
    epochs: dict[str, dict[str, float]]  # run's place -> language -> how often its training text was seen
    data: str  # what was evaluated, for captions
    notes: list[str]


def pair_distances(found: Findings, each: Comparison) -> dict[str, float]:
    """The distances of a language and its partner; nothing for a joint model of more."""
    if len(each.others) != 1:
        return {}
    row, column = found.languages.index(each.language), each.others[0]
    if column not in found.languages:
        return {}
    return {name: float(matrix[row, found.languages.index(column)]) for name, matrix in found.distance.items()}


def pairs(comparisons: Sequence[Comparison], languages: tuple[str, ...]) -> dict[str, np.ndarray]:
    """variant -> (language, partner) interference of joint models of two; NaN where there is none."""
    panels: dict[str, np.ndarray] = {}
    for each in comparisons:
        if len(each.others) == 1 and each.others[0] in languages:
            empty = np.full((len(languages), len(languages)), math.nan)
            place = languages.index(each.language), languages.index(each.others[0])
            panels.setdefault(each.group[1], empty)[place] = each.difference
    return panels


def epochs_of(found: Findings, each: Comparison) -> tuple[float, float]:
    """How often the mono and the joint model had seen the language's training text; NaN if the runs are not given."""
    alone = {run.languages[0]: run for seeds in found.mono.values() for run in seeds.values()}
    together = found.joint.get(each.group, {}).get(each.seeds[0])
    runs = (alone.get(each.language), together)
    mono, joint = (found.epochs[run.place][each.language] if run else math.nan for run in runs)
    return mono, joint
