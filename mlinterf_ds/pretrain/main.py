"""The pretraining command: open the corpus, build the run, train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlinterf_ds.data.corpus import open_corpus
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.precision import choose_precision, read_deepspeed_json, rows_per_rank
from mlinterf_ds.errors import UserError, resumption
from mlinterf_ds.pretrain.config import RunConfig, read_arguments
from mlinterf_ds.pretrain.job import PretrainingRun
from mlinterf_ds.runtime.output import hushed
from mlinterf_ds.runtime.parallel import Group
from mlinterf_ds.runtime.session import session
from mlinterf_ds.runtime.signals import Signals


def main(arguments: Sequence[str], group: Group | None = None) -> int:
    """Pretrain as the command line says; `group` is the process group that this process has joined, if it has."""
    config, deepspeed_config = read_arguments(arguments)
    run(resuming(config), read_deepspeed_json(deepspeed_config), group)
    return 0


def resuming(config: RunConfig) -> RunConfig:
    """With `restarts`, a run goes on from the newest checkpoint in its output as soon as there is one."""
    begun = config.output and checkpoint.begun(Path(config.output))
    return config.model_copy(update={"resume": "auto"}) if config.restarts and (begun or not config.resume) else config


def run(config: RunConfig, deepspeed_json: dict[str, Any], group: Group | None = None) -> dict[str, Any]:
    """Pretrain; the summary, which rank 0 also writes to summary.json in the output folder."""

    def refuse(output: Path) -> None:
        if not config.resume and checkpoint.begun(output):
            raise UserError(f"{output} holds checkpoints: continue with --set resume=auto, or choose another output")

    with session(config.name, config.output, config.parallel, refuse, group) as here:
        precision, reason = choose_precision(config.train.precision, deepspeed_json)
        rows_per_rank(config.train, here.layout.data)  # refuses a batch that does not divide, before anything is built
        data = config.data
        corpus = open_corpus(config.corpus, config.languages, data.synthetic_sentences, data.synthetic_limit)
        with hushed(here.log):
            training = PretrainingRun(config, deepspeed_json, precision, here, corpus)
        if here.first:
            print(training.greeting(reason), flush=True)
        remedy = resumption(here.output)
        try:
            with Signals(remedy) as signals:
                return training.train(signals)
        except Exception as error:  # errors of any kind, because the message must end with the remedy
            if checkpoint.begun(here.output):
                error.add_note(remedy)
            raise
        finally:
            training.records.tracker.close("FAILED")  # unless it was closed before
