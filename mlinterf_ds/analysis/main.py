"""The analysis command: open the checkpoint and its corpus, run one analysis on all ranks, record its results.

<output>/analysis.json   configuration and MLflow run
<output>/summary.json    results of the analysis
<output>/*.csv, *.png, *.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mlinterf_ds.analysis.config import AnalyzeConfig
from mlinterf_ds.analysis.job import AnalysisJob
from mlinterf_ds.config import load_config, parser
from mlinterf_ds.data.corpus import Corpus, open_corpus
from mlinterf_ds.engine.precision import choose_precision, read_deepspeed_json
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_json
from mlinterf_ds.pretrained import Pretrained
from mlinterf_ds.ranks import from_first
from mlinterf_ds.runtime.parallel import Group
from mlinterf_ds.runtime.session import session
from mlinterf_ds.tracking import Tracker, dataset, environment_facts


def main(arguments: Sequence[str], group: Group | None = None) -> int:
    """Analyse as the command line says; `group` is the process group that this process has joined, if it has."""
    options = parser("Measure why languages interfere in a pretrained model.", AnalyzeConfig).parse_args(arguments)
    run(load_config(AnalyzeConfig, options.recipe, options.set), read_deepspeed_json(options.deepspeed_config), group)
    return 0


def run(config: AnalyzeConfig, deepspeed_json: dict[str, Any], group: Group | None = None) -> dict[str, Any]:
    """Run the analysis; its summary, which rank 0 also writes to summary.json in the output folder."""

    def refuse(output: Path) -> None:
        if (output / "summary.json").is_file():
            raise UserError(f"{output} holds an analysis: choose another output")

    from deepspeed.accelerator import get_accelerator  # after `runtime.parallel`, which imports DeepSpeed its own way

    with session(config.name, config.output, config.parallel, refuse, group) as here:
        precision, reason = choose_precision(config.train.precision, deepspeed_json)
        pretrained = Pretrained.open(config.checkpoint) if config.checkpoint else None
        corpus, languages = material(config, pretrained)
        tracker = Tracker.off()
        if here.first:
            model = f" of {pretrained.path} ({pretrained.run_variant})" if pretrained else ""
            print(f"{config.analysis}{model}, {precision} ({reason}); output {here.output}", flush=True)
            tracker = open_tracker(config, pretrained, corpus, here.output)
        with tracker:
            job = AnalysisJob(
                config=config,
                pretrained=pretrained,
                corpus=corpus,
                languages=languages,
                layout=here.layout,
                device=torch.device(get_accelerator().current_device_name()),
                deepspeed_json=deepspeed_json,
                precision=precision,
                output=here.output,
                log=tracker.log,
            )
            summary = analyse(job)
            if here.first:
                record(here.output, summary, tracker)
        return from_first(summary)


def analyse(job: AnalysisJob) -> dict[str, Any]:
    """Run the analysis that the configuration names; its summary. Only that analysis's code is imported."""
    if job.config.analysis == "conflict":
        from mlinterf_ds.analysis.conflict import run as measure
    elif job.config.analysis == "prune":
        from mlinterf_ds.analysis.masks.main import run as measure
    elif job.config.analysis == "probe":
        from mlinterf_ds.analysis.probe import run as measure
    else:
        from mlinterf_ds.analysis.interference import run as measure
    return measure(job)


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
    saved = pretrained.saved["config"]
    sentences, limits = saved["data"]["synthetic_sentences"], saved["data"].get("synthetic_limit")
    try:
        corpus = open_corpus(config.corpus or saved["corpus"], pretrained.languages, sentences, limits)
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


def open_tracker(config: AnalyzeConfig, pretrained: Pretrained | None, corpus: Corpus | None, output: Path) -> Tracker:
    """The analysis's run, nested under the pretraining run; rank 0 only."""
    tracker = Tracker.start(
        enabled=config.tracking.enabled,
        experiment=f"{config.tracking.experiment}-analyses",
        name=output.name,
        folder=output,
        parameters=config.model_dump(),
        tags=environment_facts() | {"analysis": config.analysis} | config.tracking.tags,
        parent_id=(pretrained and pretrained.saved.get("run_id")) or config.tracking.parent,
        about=f"Analysis {config.analysis}"
        + (f" of {pretrained.path} ({pretrained.run_variant})" if pretrained else ""),
        datasets=[dataset(corpus.folder, corpus.manifest_hash, "analysis")] if corpus else [],
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
