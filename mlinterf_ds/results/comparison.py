"""Mono against joint models, paired by their pretraining seeds; and zero-shot transfer between languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from mlinterf_ds.errors import UserError
from mlinterf_ds.results.runs import FineTunedRun, PretrainedRun, Setup, by_setup
from mlinterf_ds.results.statistics import Effect, bootstrap_effect

BITS = "bits per character"  # the one metric that is better the lower it is
Left = TypeVar("Left")
Right = TypeVar("Right")
Groups = dict[Setup, dict[int, PretrainedRun]]  # setup -> pretraining seed -> run


def paired(left: Mapping[int, Left], right: Mapping[int, Right]) -> dict[int, tuple[Left, Right]]:
    """Seed -> (left, right) at the pretraining seeds that both sides have, ascending."""
    return {seed: (left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())}


@dataclass(frozen=True)
class Comparison:
    """One language in the joint models of a setup against its mono models. A positive effect: joint training hurts."""

    metric: str  # "bits per character", or a task's, such as "ner f1"
    language: str
    setup: Setup  # of the joint models
    seeds: tuple[int, ...]  # of pretraining
    rows: int  # scored for each seed: rows of text, or fine-tuning seeds
    mono: tuple[float, ...]  # by seed
    joint: tuple[float, ...]
    effect: Effect

    @classmethod
    def of(
        cls, metric: str, language: str, setup: Setup, seeds: Sequence[int], mono: np.ndarray, joint: np.ndarray
    ) -> Comparison:
        """From two tables (seeds, rows) of the same seeds and rows."""
        effect = bootstrap_effect(joint - mono if metric == BITS else mono - joint)
        means = tuple(mono.mean(axis=1).tolist()), tuple(joint.mean(axis=1).tolist())
        return cls(metric, language, setup, tuple(seeds), mono.shape[1], *means, effect)

    @property
    def partners(self) -> tuple[str, ...]:
        return self.setup.partners(self.language)


def compare_bits(
    mono: Groups, joint: Groups, bits: Mapping[str, Mapping[str, np.ndarray]], languages: Sequence[str]
) -> tuple[list[Comparison], list[str]]:
    """Bits per character of every language of every joint model, and notes on what has no partner or another setting.

    bits: run's folder -> language -> (rows,). UserError if mono runs of one language are of several variants.
    """
    alone: dict[str, dict[int, PretrainedRun]] = {}
    for ((language,), variant), seeds in mono.items():
        if language in alone:
            raise UserError(f"interference.mono: {language} has runs of several variants, {variant} too: give one")
        alone[language] = seeds
    comparisons, notes = [], []
    for setup, seeds in joint.items():
        for code in (code for code in setup.languages if code in languages):
            name = f"{code} in {setup.joined} ({setup.variant})"
            pairs = paired(alone.get(code, {}), seeds)
            if not pairs:
                notes.append(f"{name}: no mono run of {code} with one of the seeds {sorted(seeds)}: left out")
                continue
            if single := sorted(seeds.keys() ^ alone[code].keys()):
                notes.append(f"{name}: seeds {', '.join(map(str, single))} have no partner: left out")
            first, together = next(iter(pairs.values()))
            if unlike := first.settings_unlike(together):
                notes.append(f"{name}: mono and joint differ in {', '.join(unlike)}")
            tables = [np.stack([bits[run.folder][code] for run in side]) for side in zip(*pairs.values(), strict=True)]
            comparisons.append(Comparison.of(BITS, code, setup, [*pairs], *tables))
    return comparisons, notes


def compare_scores(
    runs: Sequence[FineTunedRun], languages: Sequence[str], larger: Sequence[str] = ()
) -> tuple[list[Comparison], dict[tuple[str, str], tuple[float, ...]]]:
    """Within-language scores of joint against mono models; and of models in the folders `larger`, by (score name, language).

    Fine-tuning seeds are paired too: of each pretraining seed the first ones that both sides have, as many as all have.
    UserError if test sets differ, a model was fine-tuned twice, or two fine-tunings have no seed in common.
    """
    comparisons: list[Comparison] = []
    of_larger: dict[tuple[str, str], tuple[float, ...]] = {}
    tables: dict[tuple[str, str], list[FineTunedRun]] = {}
    for run in runs:
        for code in (code for code in run.within if code in languages):
            tables.setdefault((run.score_name, code), []).append(run)
    for (metric, code), members in tables.items():
        _check_test_sets(members, code)
        large = [run for run in members if _inside(run.checkpoint, larger)]
        if large:
            of_larger[metric, code] = tuple(float(np.mean(list(run.scores[code].values()))) for run in large)
        groups = by_setup([run for run in members if run not in large], f"score {metric} of")
        alone = next((seeds for setup, seeds in groups.items() if len(setup.languages) == 1), {})
        for setup, seeds in groups.items():
            pairs = paired(alone, seeds)
            if len(setup.languages) > 1 and pairs:
                scores = [(mono.scores[code], joint.scores[code]) for mono, joint in pairs.values()]
                comparisons.append(Comparison.of(metric, code, setup, [*pairs], *_same_seeds(metric, code, scores)))
    return comparisons, of_larger


def _same_seeds(
    metric: str, language: str, scores: Sequence[tuple[dict[int, float], dict[int, float]]]
) -> list[np.ndarray]:
    """Mono and joint tables (pretraining seeds, fine-tuning seeds); a study tunes every model with a seed of its own."""
    pairs = [list(paired(mono, joint).values()) for mono, joint in scores]
    if not all(pairs):
        raise UserError(f"{metric} in {language}: the fine-tunings have none of finetune.seeds in common")
    count = min(map(len, pairs))
    return [np.array([[scores[side] for scores in seeds[:count]] for seeds in pairs]) for side in (0, 1)]


def _inside(path: str, folders: Sequence[str]) -> bool:
    return any(Path(path).resolve().is_relative_to(Path(folder).resolve()) for folder in folders)


def _check_test_sets(runs: Sequence[FineTunedRun], language: str) -> None:
    for run in runs:
        if run.tests[language] != runs[0].tests[language]:
            raise UserError(
                f"{run.folder} and {runs[0].folder}: tested {language} on different data ({run.tests[language]}; "
                f"{runs[0].tests[language]}): fine-tune with the same --test {language}=..."
            )


def transfer(runs: Sequence[FineTunedRun], languages: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Score name -> kind of model -> (trained on, tested on) mean scores of fine-tunings on one language each.

    A kind is a variant, and of three languages or more their number. A cell is the mean over seeds and over the models that
    have both languages, NaN without any. Kinds in which nothing was tested zero-shot are left out.
    """
    cells: dict[str, dict[str, dict[tuple[int, int], list[float]]]] = {}
    for run in runs:
        if len(run.train) != 1 or run.train[0] not in languages:
            continue
        count = len(run.setup.languages)
        kind = run.setup.variant if count < 3 else f"{run.setup.variant} of {count} languages"
        for code in (code for code in run.scores if code in languages):
            cell = languages.index(run.train[0]), languages.index(code)
            kinds = cells.setdefault(run.score_name, {}).setdefault(kind, {})
            kinds.setdefault(cell, []).extend(run.scores[code].values())
    tables: dict[str, dict[str, np.ndarray]] = {}
    for name, kinds_of_name in cells.items():
        for kind, scores in kinds_of_name.items():
            if any(row != column for row, column in scores):
                matrix = np.full((len(languages), len(languages)), np.nan)
                for cell, values in scores.items():
                    matrix[cell] = np.mean(values)
                tables.setdefault(name, {})[kind] = matrix
    return tables
