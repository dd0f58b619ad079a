"""What a study will cost and what it can tell, before it starts.

Its time is estimated from jobs that have finished if there are some, else from figures that were measured once; the effects that it
could tell from none, from the spread that an earlier study had over seeds and, where it is known, over test examples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import median, stdev
from typing import Any, NamedTuple

from mlinterf_ds.errors import refusing
from mlinterf_ds.files import read_json
from mlinterf_ds.results.statistics import detectable
from mlinterf_ds.sections import is_meta
from mlinterf_ds.study.folders import is_finished, read_record
from mlinterf_ds.study.jobs import Job, Unit

UNIT = 2.0  # seconds to build a model and to write its results
# seconds of each analysis
ANALYSES = {
    "conflict": 15.0,
    "prune": 60.0,
    "probe": 15.0,
    "interference": 60.0,
    "interference-null": 20.0,
    "conflict-training": 5.0,
}


@dataclass(frozen=True)
class Rates:
    """Seconds of a step's overhead, of a token and of a FLOP."""

    step: float
    token: float
    flop: float


CPU = Rates(0.012, 12e-6, 7e-12)  # fitted to the recipe `tiny`, widths 64 and 128, one idle core
GPU = Rates(0.005, 0, 3.3e-15)  # the recipes `paper` and `paper_8heads` on an H100 (RESULTS.md): 30% of its peak


@dataclass
class Calibration:
    """Seconds of each kind of work; the defaults were measured on one idle core, or with `rates` on a GPU."""

    rates: Rates = CPU
    startup: float = 12.0  # a job's launcher, imports and process group
    factor: dict[str, float] = field(default_factory=lambda: {"meta": 4.0})  # by kind of unit: seconds / `_work`
    analysis: dict[str, float] = field(default_factory=lambda: dict(ANALYSES))
    measured: int = 0  # finished jobs that these figures come from

    @classmethod
    def of(cls, jobs: Sequence[Job], output: Path, rates: Rates = CPU) -> Calibration:
        """Medians over the finished jobs; the defaults for kinds of which none has finished."""
        startups, factors, analyses = [], defaultdict(list), defaultdict(list)
        for job in jobs:
            record = read_record(output / job.folder)
            if "startup" in record:
                startups.append(record["startup"])
            for unit in job.units:
                facts = record["units"].get(unit.name, {})
                if facts.get("state") != "finished":
                    continue
                if job.kind == "analyze":
                    analyses[unit.facts["analysis"]].append(facts["seconds"])
                else:
                    factors[_kind(unit)].append(facts["seconds"] / _work(unit, rates))
        costs = cls(rates, median(startups or [cls.startup]), measured=len(startups))
        costs.factor |= {name: median(values) for name, values in factors.items()}
        costs.analysis |= {name: median(values) for name, values in analyses.items()}
        return costs

    def seconds(self, job: Job) -> float:
        """The seconds of one job, on cores of its own."""
        if job.kind == "analyze":
            return self.startup + sum(self.analysis.get(unit.facts["analysis"], 60.0) for unit in job.units)
        return self.startup + sum(_work(unit, self.rates) * self.factor.get(_kind(unit), 1.0) for unit in job.units)


def _work(unit: Unit, rates: Rates) -> float:
    """The seconds of a unit by its steps, tokens and FLOPs, as if it were plain training."""
    steps, tokens, flops = (unit.facts[name] for name in ("steps", "step_tokens", "flops"))
    return UNIT + rates.step * steps + rates.token * tokens + rates.flop * flops


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 10 * 3600 else f"{seconds / 3600:,.0f} hours"


def _kind(unit: Unit) -> str:
    """The kind of a unit: units of one kind cost the same for the same work."""
    if "task" in unit.facts:
        return str(unit.facts["task"])
    return "meta" if is_meta(unit.facts["variant"]) else "plain"


def show(
    jobs: Sequence[Job], output: Path, slots: int, by_job: bool = False, rates: Rates = CPU, elsewhere: bool = False
) -> str:
    """The plan as text: launches by kind, how many have finished, and the estimated cost of the rest.

    slots: jobs that run at once. by_job: also list every job. rates: of the device, for as long as no job has finished. elsewhere:
    the rest is to run on another machine than the finished jobs did, so that their times say nothing.
    """
    costs = Calibration(rates) if elsewhere else Calibration.of(jobs, output, rates)
    left = [job for job in jobs if not is_finished(job, output)]
    device = "GPU" if rates is GPU else "core"
    lines = [f"{'':<10}{'launches':>9}{'units':>7}{'finished':>10}{f'left, {device}-minutes':>20}"]
    for kind in ("pretrain", "finetune", "analyze"):
        units_of_kind = [len(job.units) for job in jobs if job.kind == kind]
        seconds = [costs.seconds(job) for job in left if job.kind == kind]
        launches, finished = len(units_of_kind), len(units_of_kind) - len(seconds)
        lines.append(f"{kind:<10}{launches:>9}{sum(units_of_kind):>7}{finished:>10}{sum(seconds) / 60:>20.1f}")
    total = sum(costs.seconds(job) for job in left)
    source = (
        f"{costs.measured} finished jobs"
        if costs.measured
        else "default figures" + ": no job has finished yet" * (not elsewhere)
    )
    lines.append(
        f"{len(jobs)} launches, {len(left)} to do, about {_duration(total / slots)} with {slots} at once (by {source})"
    )
    for job in jobs if by_job else ():
        names = job.needs[0].name if len(job.needs) == 1 else f"{len(job.needs)} jobs"
        state = f"{costs.seconds(job):.0f} s" if job in left else "finished"
        lines.append(f"  {job.name:<48}{len(job.units):>3} units  {state:>9}{f'  after {names}' if job.needs else ''}")
    return "\n".join(lines)


# --- power -------------------------------------------------------------------------------------------------------------
class Spread(NamedTuple):
    """How much a claim's effect varies, as standard deviations in the claim's unit."""

    of_seeds: float  # of the effect from seed to seed
    of_examples: float | None = None  # that the sample of test examples gives the mean over any seeds; None: not known


def spreads(findings: Path) -> dict[str, Spread]:
    """Claim -> its spread, from the findings.json of a study; {} where there is none yet."""
    if not findings.is_file():
        return {}
    with refusing(f"{findings}: not a study's findings", "; run the study with --report to make them anew"):
        effects = {row["name"]: row["effect"] for row in read_json(findings)}
        return {
            name: Spread(stdev(effect["values"]), _of_examples(effect))
            for name, effect in effects.items()
            if len(effect["values"]) > 1
        }


def _of_examples(effect: Mapping[str, Any]) -> float | None:
    """The square root of B - AB (`results/statistics.py`); None where no test examples are known."""
    return sqrt(max(0.0, effect["of_examples"] - effect["of_both"])) if effect["examples"] else None


def show_power(known: Mapping[str, Spread], seeds: int, confidence: float) -> str:
    """A line for each claim with the effect that the study could detect, in the claim's unit."""
    lines = [f"with {seeds} seeds an effect of this size is told from none in 80 of 100 studies (before correction):"]
    for name, (of_seeds, of_examples) in known.items():
        least = detectable(of_seeds, seeds, confidence, of_examples=of_examples or 0.0)
        told = f"spread {of_seeds:.3g}" + (f" over seeds, {of_examples:.3g} over test examples" if of_examples else "")
        told += (
            "; by seeds alone; the sample of test examples or rows of text comes on top" if of_examples is None else ""
        )
        lines.append(f"  {name:<40}{least:>10.3g}   ({told})")
    return "\n".join(lines)
