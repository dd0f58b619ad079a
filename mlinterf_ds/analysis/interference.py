"""Interference itself (paper, sections 2 and 3.3): monolingual against joint models, and how far the languages are apart.

Positive interference means harm: in bits per character it is joint minus mono, in a task's score mono minus joint.

<output>/interference.csv      every comparison, with its 95% interval and the languages' distances
<output>/bars-*                the paper's figure 1: mono, joint and larger models, by metric
<output>/differences-*         the same as differences with their intervals
<output>/pairs-*               language by partner: interference of joint models of two
<output>/transfer-*            zero-shot: fine-tuned on a language, tested on another
<output>/distance              of the languages
<output>/validation            figure 2: validation perplexity during pretraining
<output>/training              figure 4c: training loss after the warm-up
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlinterf_ds.analysis.distance import distances
from mlinterf_ds.analysis.interference_figures import draw
from mlinterf_ds.analysis.job import AnalysisJob
from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.data.stream import EvaluationSet
from mlinterf_ds.errors import UserError
from mlinterf_ds.evaluate import ROWS, Model
from mlinterf_ds.ranks import from_first
from mlinterf_ds.results.interference import BITS, InterferenceResults, compare_bits, compare_scores
from mlinterf_ds.results.runs import FineTunedRun, PretrainedRun, by_setup, common_corpus


def run(job: AnalysisJob) -> dict[str, Any]:
    """Compares the runs that the configuration names and returns the summary. All ranks evaluate; the first one draws."""
    settings = job.config.interference
    if not (settings.mono and settings.joint) and not settings.tasks:
        raise UserError(
            "nothing to compare: give runs (--set interference.mono=runs/en,runs/sw --set interference.joint=runs/en-sw), "
            "or fine-tunings (--set interference.tasks=runs/ner-en,...)"
        )
    results = measure(job)
    if not results.comparisons and not results.tuned:
        raise UserError(
            "nothing to compare: " + ("; ".join(results.notes) or "no language has a mono and a joint model")
        )
    if job.first:
        draw(job.output, results)
        step = max([seeds[min(seeds)].step for seeds in results.joint.values()], default=0)
        for comparison in results.comparisons:
            name = f"interference/{comparison.metric}/{comparison.language} in {comparison.setup.joined}"
            job.log({name: comparison.effect.mean}, step)
        print(results.shown(), flush=True)
    return {
        "analysis": "interference",
        "sign": "positive: joint training hurts",
        "interval": "95%, over seeds and test examples or rows of text, paired",
        "split": settings.split,
        "precision": job.precision,
        "data": results.data,
        "languages": list(results.languages),
        "comparisons": results.rows(),
        "intervals that include zero": results.with_zero,
        "rank correlation with distance": results.correlations(),
        "notes": [*results.notes, *results.cautions()],
    }


def measure(job: AnalysisJob) -> InterferenceResults:
    """Opens, checks, evaluates and compares the runs; every mistake of the user is reported before anything is evaluated."""
    settings = job.config.interference
    mono, joint, larger = (open_runs(kind, getattr(settings, kind)) for kind in ("mono", "joint", "larger"))
    every = [*mono, *joint, *larger]
    tuned = [FineTunedRun.open(folder) for folder in settings.tasks]
    known = sorted({code for run in every or tuned for code in run.setup.languages})
    if unknown := [code for code in job.languages if code not in known]:
        raise UserError(f"languages: no run knows {', '.join(unknown)}; the runs' languages are {', '.join(known)}")
    languages = tuple(job.languages or known)
    comparisons, of_larger = compare_scores(tuned, languages, settings.larger)
    results = InterferenceResults(
        comparisons, of_larger, by_setup(mono), by_setup(joint), by_setup(larger), tuned, languages
    )
    if every:
        corpus = common_corpus(every, job.config.corpus)
        results.distances |= from_first(distances(corpus, languages) if job.first else None)
        bits = {run.folder: bits_per_character(job, run, corpus, languages) for run in every}
        of_text, notes = compare_bits(results.mono, results.joint, bits, languages)
        results.comparisons.extend(of_text)
        results.notes.extend(notes)
        for code in languages:
            if large_bits := [bits[run.folder][code] for run in larger if code in bits[run.folder]]:
                results.of_larger[BITS, code] = tuple(float(rows.mean()) for rows in large_bits)
        results.epochs |= {run.folder: run.epochs(corpus) for run in every}
        results.data = description(every, corpus, languages)
    results.comparisons.sort(key=lambda c: (c.metric != BITS, c.metric, c.language, c.setup.languages))
    return results


def open_runs(kind: str, names: Sequence[str]) -> list[PretrainedRun]:
    """Opens the runs of `interference.<kind>`. UserError if a mono model has several languages or another one has one."""
    runs = [PretrainedRun.open(name) for name in names]
    wanted = "one language" if kind == "mono" else "two languages or more"
    for member in runs:
        if (len(member.setup.languages) == 1) != (kind == "mono"):
            codes = ", ".join(member.setup.languages)
            raise UserError(
                f"interference.{kind} {member.folder}: that model's languages are {codes}; expected {wanted}"
            )
    return runs


def bits_per_character(
    job: AnalysisJob, run: PretrainedRun, corpus: Corpus, languages: Sequence[str]
) -> dict[str, np.ndarray]:
    """Language -> (rows,) bits per character of held-out text; its rows and masks do not depend on the model."""
    settings = job.config.interference
    model = Model(run.folder, job.layout, job.precision)
    bits = {}
    for code in (code for code in languages if code in model.languages):
        rows = EvaluationSet(
            corpus, code, settings.split, languages=model.languages, row_format=model.row_format, max_rows=settings.rows,
        )  # fmt: skip
        bits[code] = row_losses(model, rows) * rows.bits_per_character(1.0)
    return bits


def row_losses(model: Model, rows: EvaluationSet) -> np.ndarray:
    """(rows,) float64 mean loss of the predictions in each row, in nats; the same on all ranks."""
    layout, losses = model.layout, np.zeros(rows.rows)
    size = min(ROWS, -(-rows.rows // layout.data))  # rows of a rank's batch, as `EvaluationSet.batches` shares them out
    for number, batch in enumerate(rows.batches(ROWS, layout.data_rank, layout.data)):
        first = (number * layout.data + layout.data_rank) * size
        of_batch = model.surprisals(batch).double().mean(dim=1).numpy()[: max(0, rows.rows - first)]
        losses[first : first + len(of_batch)] = of_batch
    return np.array(model.summed(losses.tolist()))


def description(runs: Sequence[PretrainedRun], corpus: Corpus, languages: Sequence[str]) -> str:
    """The data, steps and seeds of the runs in words."""
    sizes = ", ".join(f"{code} {corpus.sentences(code, 'train'):,}" for code in languages)
    facts = [(member.step, member.config["train"]["batch"], member.seed) for member in runs]
    steps, batch, seeds = ("/".join(map(str, sorted(set(values)))) for values in zip(*facts, strict=True))
    return (
        f"{corpus.folder.name} (training sentences: {sizes}); best checkpoints at step {steps}, {batch} rows of "
        f"{runs[0].pretrained.row_format.length} tokens a step, pretraining seeds {seeds}"
    )
