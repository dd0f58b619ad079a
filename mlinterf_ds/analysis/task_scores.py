"""Scores of fine-tunings, read from their summary.json: mono against joint models, and zero-shot transfer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.data.files import read_json
from mlinterf_ds.errors import UserError


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
    def group(self) -> tuple[tuple[str, ...], str]:
        return self.languages, self.variant

    @property
    def within(self) -> list[str]:
        """Languages tested that were trained on."""
        return [code for code in self.scores if code in self.trained]


def read_scores(place: str) -> Scores:
    """The summary.json of a fine-tuning's output folder. UserError if it is missing, unfinished or of another kind."""
    path = Path(place) / "summary.json"
    try:
        found: Any = read_json(path)
        if not found["finished"]:
            raise UserError(f"{place}: the fine-tuning has not finished: go on with --set resume=auto")
        seeds = [int(seed) for seed in found["seeds"]]
        return Scores(
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
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; expected the output folder of a finished launch/finetune.py"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not the summary of a fine-tuning ({type(error).__name__}: {error})") from None


def compare_scores(
    found: Sequence[Scores],
    larger: Sequence[str],
    languages: Sequence[str],
    of_larger: dict[tuple[str, str], tuple[float, ...]],
) -> list[tuple[Any, ...]]:
    """Within-language scores, joint against mono, paired by the seeds of pretraining and fine-tuning.

    A comparison is (metric, language, joint group, seeds, fine-tuning seeds, mono by seed, joint by seed, difference, table);
    difference = mono - joint in percent; table (pretraining seeds, fine-tuning seeds) of it. Scores of models in the folders
    `larger` go to `of_larger`. UserError if test sets differ or a model was fine-tuned twice.
    """
    tables: dict[tuple[str, str], dict[Any, dict[int, Scores]]] = {}  # (metric, language) -> group -> seed -> scores
    for each in found:
        for code in (code for code in each.within if code in languages):
            seeds = tables.setdefault((each.metric, code), {}).setdefault(_kind(each, larger), {})
            if each.pretraining_seed in seeds:
                raise UserError(
                    f"{each.place} and {seeds[each.pretraining_seed].place}: both fine-tune {each.variant} on "
                    f"{'-'.join(each.languages)} of pretraining seed {each.pretraining_seed} for {each.metric} in {code}: "
                    "give each once"
                )
            seeds[each.pretraining_seed] = each
    rows = []
    for (metric, code), groups in tables.items():
        _one_test([scores for seeds in groups.values() for scores in seeds.values()], code)
        big = [scores for group, seeds in groups.items() if group == "larger" for scores in seeds.values()]
        if big:
            of_larger[metric, code] = tuple(float(np.mean(list(scores.scores[code].values()))) for scores in big)
        alone = next((seeds for group, seeds in groups.items() if len(group[0]) == 1), {})
        for group, seeds in groups.items():
            common = sorted(alone.keys() & seeds.keys())
            if group == "larger" or len(group[0]) == 1 or not common:
                continue
            pairs = [(alone[seed].scores[code], seeds[seed].scores[code]) for seed in common]
            both = sorted(set.intersection(*(set(side) for pair in pairs for side in pair)))
            if not both:
                raise UserError(f"{metric} in {code}: the fine-tunings have no seed in common (finetune.seeds)")
            mono, joint = (np.array([[pair[side][seed] for seed in both] for pair in pairs]) for side in (0, 1))
            means = tuple(mono.mean(axis=1).tolist()), tuple(joint.mean(axis=1).tolist())
            table = mono - joint
            rows.append((metric, code, group, tuple(common), len(both), *means, float(table.mean()), table))
    return rows


def _kind(each: Scores, larger: Sequence[str]) -> Any:
    """The group, or "larger"."""
    path = Path(each.checkpoint).resolve()
    return "larger" if any(path.is_relative_to(Path(place).resolve()) for place in larger) else each.group


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
