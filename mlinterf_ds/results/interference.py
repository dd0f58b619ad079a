"""What an interference analysis measured, as rows for its summary, its table and its figures."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlinterf_ds.results.comparison import BITS, Comparison, Groups
from mlinterf_ds.results.runs import FineTunedRun
from mlinterf_ds.tasks.metrics import rank_correlation

MIN_PAIRS = 4  # pairs of languages from which a rank correlation is told


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
                "epochs": [known(value) for value in self.epochs_of(comparison)],
                "distance": {name: known(value) for name, value in self.partner_distances(comparison).items()},
            }
            for comparison in self.comparisons
        ]

    def pair_matrices(self, metric: str) -> dict[str, np.ndarray]:
        """Variant -> (language, partner) interference in joint models of two; NaN where there is none."""
        matrices: dict[str, np.ndarray] = {}
        for comparison in self.comparisons:
            partners = comparison.partners
            if comparison.metric == metric and len(partners) == 1 and partners[0] in self.languages:
                empty = np.full((len(self.languages),) * 2, math.nan)
                cell = self.languages.index(comparison.language), self.languages.index(partners[0])
                matrices.setdefault(comparison.setup.variant, empty)[cell] = comparison.effect.mean
        return matrices

    def correlations(self) -> dict[str, dict[str, Any]]:
        """Variant -> distance -> Spearman's rho of the interference of pairs (bits per character) with that distance.

        Both directions of a pair count, though they share models: read rho as a description, not as a test.
        """
        table: dict[str, dict[str, Any]] = {}
        of_bits = [comparison for comparison in self.comparisons if comparison.metric == BITS]
        for variant, name in itertools.product(sorted({c.setup.variant for c in of_bits}), self.distances):
            points = [
                (comparison.effect.mean, self.partner_distances(comparison).get(name, math.nan))
                for comparison in of_bits
                if comparison.setup.variant == variant
            ]
            points = [point for point in points if math.isfinite(point[1])]
            if len(points) >= MIN_PAIRS:
                rho = float(rank_correlation(*zip(*points, strict=True)))
                table.setdefault(variant, {})[name] = {"rho": known(rho), "pairs": len(points)}
        return table

    def shown(self) -> str:
        """The comparisons as a table for the screen, and the notes."""
        head = f"{'metric':<20}{'language':<10}{'joint model':<24}{'mono':>9}{'joint':>9}{'interference':>14}   95% interval"
        lines = [head]
        for comparison in self.comparisons:
            name, effect = f"{comparison.setup.joined} ({comparison.setup.variant})", comparison.effect
            interval = f"   {effect.low:+.3f} to {effect.high:+.3f}" if effect.has_interval else ""
            lines.append(
                f"{comparison.metric:<20}{comparison.language:<10}{name:<24}{np.mean(comparison.mono):>9.3f}"
                f"{np.mean(comparison.joint):>9.3f}{effect.mean:>+14.3f}{interval}"
            )
        return "\n".join([*lines, "positive: joint training hurts", *(f"note: {note}" for note in self.notes)])
