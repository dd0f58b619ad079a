"""Which effect a claim could tell from none, before a study starts: from the spread over seeds that an earlier study had."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from mlinterf_ds.errors import refusing
from mlinterf_ds.files import read_json


def detectable(spread: float, seeds: int, confidence: float, power: float = 0.8) -> float:
    """The least mean of paired differences that a two-sided t test tells from 0 with this power; inf with one seed.

    spread: the standard deviation of the differences over seeds. The test's power is that of the noncentral t distribution
    (Cohen, Statistical Power Analysis, 1988, chapter 2).
    """
    if seeds < 2:
        return math.inf
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    freedom, border = seeds - 1, t.ppf((1 + confidence) / 2, seeds - 1)

    def lacking(shift: float) -> float:
        return power - float(nct.sf(border, freedom, shift))

    return float(brentq(lacking, 0.0, 10.0 + 2.0 * float(border))) * spread / math.sqrt(seeds)


def spreads(findings: Path) -> dict[str, float]:
    """Claim -> standard deviation of its effect over the seeds, from the findings.json of a study; {} where there is none yet."""
    from statistics import stdev

    if not findings.is_file():
        return {}
    with refusing(f"{findings}: not a study's findings", "; run the study with --report to make them anew"):
        effects = {row["name"]: row["effect"]["values"] for row in read_json(findings)}
        return {name: stdev(values) for name, values in effects.items() if len(values) > 1}


def show(known: Mapping[str, float], seeds: int, confidence: float) -> str:
    """A line for each claim with the effect that the study could detect, in the claim's unit."""
    lines = [f"with {seeds} seeds an effect of this size is told from none in 80 of 100 studies (before correction):"]
    lines += [
        f"  {name:<40}{detectable(spread, seeds, confidence):>10.3g}   (spread {spread:.3g})"
        for name, spread in known.items()
    ]
    return "\n".join(lines)
