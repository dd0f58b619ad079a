"""What an interference analysis measured: mono against joint models, paired by their pretraining seeds, and zero-shot transfer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlinterf_ds.errors import UserError
from mlinterf_ds.results.runs import FineTunedRun, PretrainedRun, Setup, by_setup, read_counts
from mlinterf_ds.results.statistics import Effect, example_shares, paired
from mlinterf_ds.tasks.metrics import rank_correlation

BITS = "bits per character"  # the one metric that is better the lower it is
MIN_PAIRS = 4  # pairs of languages from which a rank correlation is told
Groups = dict[Setup, dict[int, PretrainedRun]]  # setup -> pretraining seed -> run


@dataclass(frozen=True)
class Comparison:
    """One language in the joint models of a setup against its mono models. A positive effect: joint training hurts."""

    metric: str  # "bits per character", or a task's, such as "ner f1"
    language: str
    setup: Setup  # the setup of the joint models
    seeds: tuple[int, ...]  # the seeds of pretraining
    rows: int  # scored for each seed: rows of text, or fine-tuning seeds
    mono: tuple[float, ...]  # the scores by seed
    joint: tuple[float, ...]
    effect: Effect
    floors: dict[str, float] = field(default_factory=dict)  # "majority" and, if the task has it, "lexical"

    @classmethod
    def of(
        cls, metric: str, language: str, setup: Setup, seeds: Sequence[int], mono: np.ndarray, joint: np.ndarray,
        shares: np.ndarray | None = None, floors: dict[str, float] | None = None,
    ) -> Comparison:  # fmt: skip
        """From two tables (seeds, rows) of the same seeds and rows.

        shares: of a task (seeds, rows, examples), what each test example contributes to mono minus joint; None if not known.
        """
        differences = joint - mono if metric == BITS else mono - joint
        values, tests = differences.mean(axis=1), []
        if metric == BITS:
            tests = [differences / differences.shape[1]]
        elif len(seeds) == 1:  # one pretraining seed: what varies is fine-tuning
            values, tests = differences[0], [] if shares is None else [shares[0]]
        elif shares is not None:
            tests = [shares.mean(axis=1)]
        means = tuple(mono.mean(axis=1).tolist()), tuple(joint.mean(axis=1).tolist())
        effect = Effect.of(values.tolist(), tests)
        return cls(metric, language, setup, tuple(seeds), mono.shape[1], *means, effect, floors or {})

    @property
    def partners(self) -> tuple[str, ...]:
        return self.setup.partners(self.language)


def compare_bits(
    mono: Groups, joint: Groups, bits: Mapping[str, Mapping[str, np.ndarray]], languages: Sequence[str]
) -> tuple[list[Comparison], list[str]]:
    """Compares bits per character of every language of every joint model; notes what has no partner or other settings.

    bits: run's folder -> language -> (rows,). UserError if mono runs of one language are of several variants.
    """
    alone: dict[str, dict[int, PretrainedRun]] = {}
    for ((language,), variant), seeds in mono.items():
        if language in alone:
            raise UserError(f"interference.mono: {language} has runs of several variants, {variant} too: give one")
        alone[language] = seeds
    comparisons, notes = [], []
    for setup, seeds in joint.items():
        seed, *others = seeds
        for other in others:
            if unlike := seeds[seed].settings_unlike(seeds[other]):
                notes.append(
                    f"{setup.variant} on {setup.joined}: seeds {seed} and {other} differ in {', '.join(unlike)}"
                )
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
            alone_bits, joint_bits = (
                np.stack([bits[run.folder][code] for run in side]) for side in zip(*pairs.values(), strict=True)
            )
            comparisons.append(Comparison.of(BITS, code, setup, [*pairs], alone_bits, joint_bits))
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
        if unlike := [run for run in members if run.tests[code] != members[0].tests[code]]:
            raise UserError(
                f"{unlike[0].folder} and {members[0].folder}: tested {code} on different data ({unlike[0].tests[code]}; "
                f"{members[0].tests[code]}): fine-tune with the same --test {code}=..."
            )
        folders = [Path(folder).resolve() for folder in larger]
        large = [run for run in members if any(Path(run.checkpoint).resolve().is_relative_to(f) for f in folders)]
        if large:
            of_larger[metric, code] = tuple(float(np.mean(list(run.scores[code].values()))) for run in large)
        groups = by_setup([run for run in members if run not in large], f"score {metric} of")
        alone = next((seeds for setup, seeds in groups.items() if len(setup.languages) == 1), {})
        for setup, seeds in groups.items():
            pairs = paired(alone, seeds)
            if len(setup.languages) > 1 and pairs:
                comparisons.append(_compared(metric, code, setup, pairs))
    return comparisons, of_larger


def _compared(
    metric: str, code: str, setup: Setup, runs: Mapping[int, tuple[FineTunedRun, FineTunedRun]]
) -> Comparison:
    """Compares the mono and joint fine-tunings of each pretraining seed; a study tunes every model with a seed of its own."""
    common = [sorted(mono.scores[code].keys() & joint.scores[code].keys()) for mono, joint in runs.values()]
    if not all(common):
        raise UserError(f"{metric} in {code}: the fine-tunings have none of finetune.seeds in common")
    count = min(map(len, common))  # fine-tuning seeds that are used of each pretraining seed
    tables, shares = [], []
    for side in zip(*runs.values(), strict=True):
        chosen = [(run, seed) for run, seeds in zip(side, common, strict=True) for seed in seeds[:count]]
        tables.append(np.array([run.scores[code][seed] for run, seed in chosen]).reshape(len(runs), count))
        counts = read_counts([run.counts_file(code, seed) for run, seed in chosen])
        if counts is not None:
            shares.append(example_shares(counts).reshape(len(runs), count, -1))
    known = len(shares) == 2 and shares[0].shape == shares[1].shape
    first = next(iter(runs.values()))[0]
    floors = {"majority": first.majority[code]} | ({"lexical": first.lexical[code]} if code in first.lexical else {})
    differences = shares[0] - shares[1] if known else None
    return Comparison.of(metric, code, setup, [*runs], tables[0], tables[1], differences, floors)


def transfer(runs: Sequence[FineTunedRun], languages: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Score name -> kind of model -> (trained on, tested on) mean scores of fine-tunings on one language each.

    A kind is a variant, and of three languages or more their number. A cell is the mean over seeds and over the models that
    have both languages, NaN without any. Kinds in which nothing was tested zero-shot are left out.
    """
    kinds: dict[tuple[str, str], dict[tuple[int, int], list[float]]] = {}
    for run in runs:
        count = len(run.setup.languages)
        kind = run.setup.variant if count < 3 else f"{run.setup.variant} of {count} languages"
        for code in (code for code in run.scores if len(run.train) == 1 and {code, *run.train} <= {*languages}):
            cell = languages.index(run.train[0]), languages.index(code)
            kinds.setdefault((run.score_name, kind), {}).setdefault(cell, []).extend(run.scores[code].values())
    tables: dict[str, dict[str, np.ndarray]] = {}
    for (name, kind), scores in kinds.items():
        if any(row != column for row, column in scores):
            matrix = np.full((len(languages), len(languages)), np.nan)
            for cell, values in scores.items():
                matrix[cell] = np.mean(values)
            tables.setdefault(name, {})[kind] = matrix
    return tables


# --- all comparisons ------------------------------------------------------------------------------------------------------
def known(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass
class InterferenceResults:
    """All comparisons of an analysis, with the runs and distances that they are seen beside."""

    comparisons: list[Comparison]
    of_larger: dict[tuple[str, str], tuple[float, ...]]  # (metric, language) -> the score of each larger model
    mono: Groups
    joint: Groups
    larger: Groups
    tuned: list[FineTunedRun]
    languages: tuple[str, ...]
    distances: dict[str, np.ndarray] = field(default_factory=dict)  # name -> (languages, languages)
    epochs: dict[str, dict[str, float]] = field(default_factory=dict)  # run's folder -> language -> see `epochs_of`
    data: str = ""  # what was evaluated, for captions
    notes: list[str] = field(default_factory=list)

    def partner_distances(self, comparison: Comparison) -> dict[str, float]:
        """The distances of the language and its partner; empty for a joint model of more than two, or of others."""
        codes = (comparison.language, *comparison.partners)
        if len(codes) != 2 or codes[1] not in self.languages:
            return {}
        cell = self.languages.index(codes[0]), self.languages.index(codes[1])
        return {name: float(matrix[cell]) for name, matrix in self.distances.items()}

    def epochs_of(self, comparison: Comparison) -> tuple[float, float]:
        """How often the mono and the joint model had seen the language's training text; NaN where no run is given."""
        language = comparison.language
        mono = {run.setup.languages[0]: run for seeds in self.mono.values() for run in seeds.values()}.get(language)
        joint = self.joint.get(comparison.setup, {}).get(comparison.seeds[0])
        seen = [self.epochs[run.folder][language] if run else math.nan for run in (mono, joint)]
        return seen[0], seen[1]

    def rows(self) -> list[dict[str, Any]]:
        """A row of plain values for each comparison, with None where nothing is known."""
        return [
            {
                "metric": comparison.metric,
                "language": comparison.language,
                "joint with": list(comparison.partners),
                "variant": comparison.setup.variant,
                "seeds": list(comparison.seeds),
                "rows": comparison.rows,
                "mono": float(np.mean(comparison.mono)),
                "joint": float(np.mean(comparison.joint)),
                "interference": comparison.effect.mean,
                "interval": [known(comparison.effect.low), known(comparison.effect.high)],
                "test examples": comparison.effect.examples,
                "floors": comparison.floors,
                "epochs": [known(value) for value in self.epochs_of(comparison)],
                "distance": {name: known(value) for name, value in self.partner_distances(comparison).items()},
            }
            for comparison in self.comparisons
        ]

    def pair_matrices(self, metric: str, noise: bool = False) -> dict[str, np.ndarray]:
        """Variant -> (language, partner) interference in joint models of two, or half its interval; NaN where there is none."""
        matrices: dict[str, np.ndarray] = {}
        for comparison in self.comparisons:
            partners = comparison.partners
            if comparison.metric == metric and len(partners) == 1 and partners[0] in self.languages:
                empty = np.full((len(self.languages),) * 2, math.nan)
                cell = self.languages.index(comparison.language), self.languages.index(partners[0])
                effect = comparison.effect
                half = effect.high - effect.mean if effect.has_interval else math.nan
                matrices.setdefault(comparison.setup.variant, empty)[cell] = half if noise else effect.mean
        return matrices

    def correlations(self) -> dict[str, dict[str, Any]]:
        """Variant -> distance -> Spearman's rho of the interference of pairs (bits per character) with that distance.

        Both directions of a pair count, though they share models: read rho as a description, not as a test.
        """
        table: dict[str, dict[str, Any]] = {}
        rows = [row for row in self.rows() if row["metric"] == BITS]
        for variant, name in itertools.product(sorted({row["variant"] for row in rows}), self.distances):
            points = [(row["interference"], row["distance"].get(name)) for row in rows if row["variant"] == variant]
            points = [point for point in points if point[1] is not None]
            if len(points) >= MIN_PAIRS:
                rho = float(rank_correlation(*zip(*points, strict=True)))
                table.setdefault(variant, {})[name] = {"rho": known(rho), "pairs": len(points)}
        return table

    @property
    def with_zero(self) -> tuple[int, int]:
        """How many intervals include zero, of how many."""
        effects = [comparison.effect for comparison in self.comparisons if comparison.effect.has_interval]
        return sum(effect.low <= 0 <= effect.high for effect in effects), len(effects)

    def shown(self) -> str:
        """The comparisons as a table for the screen, and the notes."""
        floors = ["majority", "lexical"] if any(comparison.floors for comparison in self.comparisons) else []
        head = f"{'metric':<20}{'language':<10}{'joint model':<24}{'mono':>9}{'joint':>9}"
        lines = [head + "".join(f"{name:>10}" for name in floors) + f"{'interference':>14}   95% interval"]
        for comparison in self.comparisons:
            name, effect = f"{comparison.setup.joined} ({comparison.setup.variant})", comparison.effect
            interval = f"   {effect.low:+.3f} to {effect.high:+.3f}" if effect.has_interval else ""
            beside = (
                f"{comparison.floors[floor]:>10.3f}" if floor in comparison.floors else " " * 10 for floor in floors
            )
            lines.append(
                f"{comparison.metric:<20}{comparison.language:<10}{name:<24}{np.mean(comparison.mono):>9.3f}"
                f"{np.mean(comparison.joint):>9.3f}{''.join(beside)}{effect.mean:>+14.3f}{interval}"
            )
        notes = [*self.notes, *self.cautions()]
        lines += ["positive: joint training hurts", "{} of {} intervals include zero".format(*self.with_zero)]
        return "\n".join([*lines, *(f"note: {note}" for note in notes)])

    def cautions(self) -> list[str]:
        """Warnings against reading too much into the comparisons: scores below the lexical baseline, incomplete intervals."""
        notes = []
        for comparison in self.comparisons:
            name = f"{comparison.metric}, {comparison.language} in {comparison.setup.joined}"
            for side in ("mono", "joint"):
                mean = float(np.mean(getattr(comparison, side)))
                if mean < comparison.floors.get("lexical", -math.inf):
                    notes.append(
                        f"{name}: {side} {mean:.1f} is below the lexical baseline, {comparison.floors['lexical']:.1f}"
                    )
            if comparison.metric != BITS and not comparison.effect.examples:
                notes.append(f"{name}: no counts of the test examples, so that the interval is over seeds alone")
        if any(len(comparison.seeds) == 1 for comparison in self.comparisons):
            notes.append("with one pretraining seed an interval says nothing of how much pretraining anew would change")
        return notes
