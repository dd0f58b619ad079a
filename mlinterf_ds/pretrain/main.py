"""The pretraining recipe: processes, corpus, job."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mlinterf_ds.data.corpus import SYNTHETIC_LANGUAGES, Corpus, synthetic_folder
from mlinterf_ds.data.prepare.synthetic import prepare_synthetic
from mlinterf_ds.engine.precision import choose_precision, read_json, rows_per_rank
from mlinterf_ds.errors import UserError
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.pretrain.job import Job
from mlinterf_ds.ranks import agreed, from_first
from mlinterf_ds.runtime import parallel, session
from mlinterf_ds.runtime.launchers import local_world
from mlinterf_ds.runtime.restarts import resuming


def main(arguments: Sequence[str]) -> int:
    """`deepspeed launch/pretrain.py --deepspeed_config ... [--recipe ...] [--set key=value]`."""
    options = session.parser(session.PRETRAIN).parse_args(arguments)
    config = session.configuration(options)
    found = read_json(options.deepspeed_config)
    run(resuming(config), found)
    return 0


def run(config: RunConfig, deepspeed_json: dict[str, Any]) -> dict[str, Any]:
    """Pretrain as configured; the summary (also written to summary.json by rank 0)."""
    first = os.environ.get("RANK", "0") == "0"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        session.remove_stale_locks()
    with session.hushed():
        layout = parallel.start(config.parallel.tensor, timeout=config.parallel.timeout)
    output = Path(config.output or from_first(f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"))
    log = output / "log" / f"rank-{layout.rank}.log"
    agreed(lambda: session.forget(log))
    again = f"go on with --set output={output} --set resume=auto"
    if not config.resume and any((output / "checkpoints").glob("step-*")):
        raise UserError(f"{output} holds checkpoints: continue with --set resume=auto, or choose another output")
    precision, why = choose_precision(config.train.precision, deepspeed_json)
    rows_per_rank(config.train, layout.data)  # refused before anything is built
    session.quiet(log)
    with session.noted(log):
        corpus = open_corpus(config)
        with session.hushed(log):
            job = Job(config, deepspeed_json, precision, layout, corpus, output)
    if first:
        stage, languages = job.engine.stage, ", ".join(job.languages)
        print(
            f"{config.variant} on {languages}: {job.parameters / 1e6:.1f}M parameters, {layout.data} x {layout.tensor} "
            f"ranks (data x tensor), ZeRO {stage}, {precision} ({why}); output {output}",
            flush=True,
        )
        if job.resumed:
            print(job.resumed, flush=True)
    try:
        with session.noted(log), session.Signals(again) as signals:
            return job.train(signals)
    except Exception as error:  # whatever it is, the way on belongs to it
        if any((output / "checkpoints").glob("step-*")):
            error.add_note(again)
        raise
    finally:
        if job.tracker_open:
            job.tracker.close("FAILED")
        parallel.stop()


def open_corpus(config: RunConfig) -> Corpus:
    """The prepared corpus of the run; the embedded synthetic one is prepared on first use."""
    languages = config.languages
    folder = Path(config.corpus)
    if config.corpus == "synthetic":
        languages, sentences = languages or SYNTHETIC_LANGUAGES, config.data.synthetic_sentences
        limits = config.data.synthetic_limit
        folder = synthetic_folder(languages, sentences, limits)
        agreed(lambda: prepare_synthetic(languages, sentences, limits))
    corpus = Corpus.open(folder, languages)
    _verify(corpus)
    return corpus


def _verify(corpus: Corpus) -> None:
    """Read all shards once on every host: a run learns from the text that was prepared, or does not start."""
    problem = None
    try:
        corpus.verify(int(os.environ["LOCAL_RANK"]), local_world())
    except UserError as error:
        problem = str(error)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    if problem := next(filter(None, found), None):
        raise UserError(problem)
