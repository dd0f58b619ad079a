"""The analysis recipe: open the checkpoint and its corpus, run one analysis on all ranks, record what it found.

<output>/analysis.json   configuration and MLflow run
<output>/summary.json    what the analysis found
<output>/*.csv, *.png, *.svg
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mlinterf_ds.analysis.config import AnalyzeConfig
from mlinterf_ds.analysis.job import AnalysisJob
from mlinterf_ds.config import load_config
from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.engine.precision import choose_precision, read_json
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_json
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.pretrain.main import open_corpus
from mlinterf_ds.pretrained import Pretrained
from mlinterf_ds.ranks import agreed, from_first
from mlinterf_ds.runtime import parallel, session
from mlinterf_ds.tracking import Tracker, environment_facts


def main(arguments: Sequence[str]) -> int:
    """`deepspeed launch/analyze.py --deepspeed_config ... --set checkpoint=... --set analysis=...`."""
    parser = session.parser("Measure why languages interfere in a pretrained model.", AnalyzeConfig)
    found = parser.parse_args(arguments)
    run(load_config(AnalyzeConfig, found.recipe, found.set), read_json(found.deepspeed_config))
    return 0


def run(config: AnalyzeConfig, deepspeed_json: dict[str, Any]) -> dict[str, Any]:
    """Run the analysis; its summary (also written to summary.json by rank 0)."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        session.remove_stale_locks()
    with session.hushed():
        layout = parallel.start(config.parallel.tensor, timeout=config.parallel.timeout)
    try:
        output = Path(config.output or from_first(f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"))
        log = output / "log" / f"rank-{layout.rank}.log"
        agreed(lambda: session.forget(log))
        if from_first((output / "summary.json").is_file()):
            raise UserError(f"{output} holds an analysis: choose another output")
        precision, why = choose_precision(config.train.precision, deepspeed_json)
        session.quiet(log)
        with session.noted(log):
            pretrained = Pretrained.open(config.checkpoint) if config.checkpoint else None
            corpus, languages = material(config, pretrained)
        tracker = Tracker.off()
        if layout.rank == 0:
            where = f" of {pretrained.path} ({pretrained.variant})" if pretrained else ""
            print(f"{config.analysis}{where}, {precision} ({why}); output {output}", flush=True)
            tracker = open_tracker(config, pretrained, output)
        with session.noted(log), tracker:
            device = torch.device(_accelerator().current_device_name())
            job = AnalysisJob(
                config, pretrained, corpus, languages, layout, device, deepspeed_json, precision, output, tracker.log
            )
            summary = analyse(job)
            if layout.rank == 0:
                record(output, summary, tracker)
        return from_first(summary)
    finally:
        parallel.stop()


def analyse(job: AnalysisJob) -> dict[str, Any]:
    """Run the analysis that the configuration names; its summary. Only that analysis's code is imported."""
    if job.config.analysis == "conflict":
        from mlinterf_ds.analysis import conflict

        return conflict.run(job)
    if job.config.analysis == "prune":
        from mlinterf_ds.analysis.masks import main as masks

        return masks.run(job)
    from mlinterf_ds.analysis import interference

    return interference.run(job)


def _accelerator() -> Any:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def material(config: AnalyzeConfig, pretrained: Pretrained | None) -> tuple[Corpus | None, tuple[str, ...]]:
    """The corpus and the languages to analyse; (None, those named) without a checkpoint."""
    if pretrained is None:
        return None, tuple(config.languages or ())
    languages = tuple(config.languages or pretrained.languages)
    if unknown := [language for language in languages if language not in pretrained.languages]:
        raise UserError(
            f"languages: the model at {pretrained.path} has no {', '.join(unknown)}, it knows "
            f"{', '.join(pretrained.languages)}: name some of those"
        )
    place = config.corpus or pretrained.saved["config"]["corpus"]
    data = pretrained.saved["config"]["data"]
    trained_on = {"corpus": place, "languages": pretrained.languages, "data": data}
    try:
        corpus = open_corpus(RunConfig.model_validate(trained_on))
    except UserError as error:
        remedy = "" if config.corpus else f" (the corpus that {pretrained.path} names; --set corpus= names another)"
        raise UserError(f"{error}{remedy}") from None
    check_vocabulary(corpus.folder, pretrained)
    return corpus, languages


def check_vocabulary(corpus: Path, pretrained: Pretrained) -> None:
    """UserError unless the corpus was prepared with the checkpoint's vocabulary."""
    if (corpus / "tokenizer.model").read_bytes() != (pretrained.path / "tokenizer.model").read_bytes():
        raise UserError(
            f"{corpus}: its vocabulary is not that of {pretrained.path}: prepare the text with that vocabulary or leave "
            "corpus out"
        )


def open_tracker(config: AnalyzeConfig, pretrained: Pretrained | None, output: Path) -> Tracker:
    """The analysis's run, nested under the pretraining run; rank 0 only."""
    tracker = Tracker.start(
        enabled=config.tracking.enabled,
        experiment=config.tracking.experiment,
        name=output.name,
        folder=output,
        parameters=config.model_dump(),
        tags=environment_facts() | {"analysis": config.analysis} | config.tracking.tags,
        parent_id=(pretrained and pretrained.run_id) or config.tracking.parent,
    )
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "analysis.json", {"config": config.model_dump(), "run_id": tracker.run_id})
    return tracker


def record(output: Path, summary: dict[str, Any], tracker: Tracker) -> None:
    """summary.json, and everything of the output folder to the tracker; rank 0 only."""
    write_json(output / "summary.json", summary)
    for path in sorted(output.iterdir()):
        if path.suffix in (".csv", ".json", ".png", ".svg", ".md"):
            tracker.artifact(path)
        if path.suffix == ".md":
            tracker.describe(path.read_text(encoding="utf-8"))
    print(f"{output}/summary.json")
