"""Scores of fine-tunings, read from their summary.json: mono against joint models, and zero-shot transfer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.results.comparison import Comparison
from mlinterf_ds.results.runs import Group


@dataclass(frozen=True)
class Scores:
    """One fine-tuning: a task, trained on some languages of a pretrained model, tested on some."""

    place: str
    metric: str  # "ner f1"
    languages: tuple[str, ...]  # of the pretrained model, sorted
    variant: str
    checkpoint: str
    pretraining_seed: int
    trained: tuple[str, ...]
    scores: dict[str, dict[int, float]]  # tested language -> fine-tuning seed -> score, in percent
    tests: dict[str, str]  # tested language -> what its test set is

    @property
    def group(self) -> Group:
        return self.languages, self.variant

    @property
    def within(self) -> list[str]:
        """Languages tested that were trained on."""
        return [code for code in self.scores if code in self.trained]


def read_scores(place: str) -> Scores:
    """The summary.json of a fine-tuning's output folder. UserError if it is missing, unfinished or of another kind."""
    path = Path(place) / "summary.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; expected the output folder of a finished launch/finetune.py"
        ) from None
    with refusing(f"{path}: not the summary of a fine-tuning"):
        found: Any = json.loads(data)
        if not found["finished"]:
            raise UserError(f"{place}: the fine-tuning has not finished: go on with --set resume=auto")
        seeds = [int(seed) for seed in found["seeds"]]
        scores = Scores(
            place=place,
            metric=f"{found['task']} {found['metric']}",
            languages=tuple(sorted(found["languages"])),
            variant=found["variant"],
            checkpoint=found["checkpoint"],
            pretraining_seed=int(found["pretraining_seed"]),
            trained=tuple(found["examples"]["train"]),
            scores={code: dict(zip(seeds, of, strict=True)) for code, of in found["per_seed"].items()},
            tests={code: found["data"][f"test {code}"] for code in found["per_seed"]},
        )
        checked: Scores = TypeAdapter(Scores).validate_json(json.dumps(scores.__dict__), strict=True)
        return checked


def compare_scores(
    found: Sequence[Scores], languages: Sequence[str], larger: Sequence[str] = ()
) -> tuple[list[Comparison], dict[tuple[str, str], tuple[float, ...]]]:
    """Within-language scores, joint against mono, paired by the seeds of pretraining and, for each, of fine-tuning (the first
    ones that both have, as many as all pretraining seeds have).

    Also the mean scores of models in the folders `larger`, by (metric, language). UserError if test sets differ, a model was
    fine-tuned twice, or two fine-tunings have no seed in common.
    """
    rows: list[Comparison] = []
    of_larger: dict[tuple[str, str], list[float]] = {}
    tables: dict[tuple[str, str], list[Scores]] = {}  # by metric and language
    for each in found:
        for code in (code for code in each.within if code in languages):
            tables.setdefault((each.metric, code), []).append(each)
    for (metric, code), every in tables.items():
        _one_test(every, code)
        groups: dict[Group, dict[int, Scores]] = {}
        for each in every:
            if _inside(each.checkpoint, larger):
                of_larger.setdefault((metric, code), []).append(float(np.mean(list(each.scores[code].values()))))
                continue
            seeds = groups.setdefault(each.group, {})
            if each.pretraining_seed in seeds:
                raise UserError(
                    f"{each.place} and {seeds[each.pretraining_seed].place}: both fine-tune {each.variant} on "
                    f"{'-'.join(each.languages)} of train.seed={each.pretraining_seed} for {metric} in {code}: give each once"
                )
            seeds[each.pretraining_seed] = each
        rows += _paired(metric, code, groups)
    return rows, {key: tuple(values) for key, values in of_larger.items()}


def _paired(metric: str, language: str, groups: dict[Group, dict[int, Scores]]) -> Iterator[Comparison]:
    """Every joint model against the mono one."""
    alone = next((seeds for group, seeds in groups.items() if len(group[0]) == 1), {})
    for group, seeds in groups.items():
        common = sorted(alone.keys() & seeds.keys())
        if len(group[0]) == 1 or not common:
            continue
        pairs = [(alone[seed].scores[language], seeds[seed].scores[language]) for seed in common]
        # of each pretraining seed: a study tunes each model with a seed of its own
        tuned = [sorted(mono.keys() & joint.keys()) for mono, joint in pairs]
        if not all(tuned):
            raise UserError(f"{metric} in {language}: the fine-tunings have none of finetune.seeds in common")
        count = min(map(len, tuned))
        mono, joint = (
            np.array([[pair[side][seed] for seed in own[:count]] for pair, own in zip(pairs, tuned, strict=True)])
            for side in (0, 1)
        )
        yield Comparison.of(metric, language, group, common, mono, joint)


def _inside(path: str, folders: Sequence[str]) -> bool:
    return any(Path(path).resolve().is_relative_to(Path(folder).resolve()) for folder in folders)


def _one_test(found: Sequence[Scores], language: str) -> None:
    for each in found:
        if each.tests[language] != found[0].tests[language]:
            raise UserError(
                f"{each.place} and {found[0].place}: tested {language} on different data ({each.tests[language]}; "
                f"{found[0].tests[language]}): fine-tune with the same --test {language}=..."
            )


def transfer(found: Sequence[Scores], languages: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """metric -> kind of model -> (trained on, tested on) mean scores; NaN where there is none.

    Of fine-tunings on one language each. Models of two languages are "joint", of more "joint of 3 languages": a cell is the
    mean over seeds and over the models that have both; the diagonal, over all that have the language.
    """
    cells: dict[str, dict[str, dict[tuple[int, int], list[float]]]] = {}
    for each in found:
        if len(each.trained) != 1 or each.trained[0] not in languages:
            continue
        count = len(each.languages)
        kind = each.variant if count < 3 else f"{each.variant} of {count} languages"
        for code in (code for code in each.scores if code in languages):
            place = languages.index(each.trained[0]), languages.index(code)
            found_cells = cells.setdefault(each.metric, {}).setdefault(kind, {})
            found_cells.setdefault(place, []).extend(each.scores[code].values())
    tables: dict[str, dict[str, np.ndarray]] = {}
    for metric, kinds in cells.items():
        for kind, values in kinds.items():
            if all(row == column for row, column in values):
                continue  # nothing was transferred
            matrix = np.full((len(languages), len(languages)), np.nan)
            for place, scores in values.items():
                matrix[place] = np.mean(scores)
            tables.setdefault(metric, {})[kind] = matrix
    return tables
