"""The plan of a study: its grid of models as jobs, and the hash that names a job's folder.

The hash covers everything that decides the job's results: configuration, DeepSpeed's JSON, data, code, and the jobs it needs. A
complete folder is therefore the answer for every study that asks for this job, and any change leads to another folder.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mlinterf_ds.errors import refusing
from mlinterf_ds.files import read_json
from mlinterf_ds.study.code import code_hash
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.study.corpora import Corpora
from mlinterf_ds.study.grid import Model, models
from mlinterf_ds.study.jobs import Job, Kind, Unit
from mlinterf_ds.study.units import all_models, analyses, comparisons, finetunings, is_compared, pretraining


def expand(config: StudyConfig, corpora: Corpora, deepspeed_config: str) -> list[Job]:
    """All jobs of the study, none twice, each after the jobs it needs. UserError for a setting that a recipe refuses."""
    jobs: list[Job] = []
    with refusing(f"--deepspeed_config {deepspeed_config}: not JSON"):
        deepspeed_json = read_json(Path(deepspeed_config))

    def add(kind: Kind, model: Model, units: list[Unit], needs: tuple[Job, ...]) -> Job:
        jobs.append(_job(kind, model, units, needs, [deepspeed_json, config.ranks]))
        return jobs[-1]

    for model in models(config):
        unit, run = pretraining(config, model, corpora)
        pretrained = add("pretrain", model, [unit], ())
        if units := [*finetunings(config, model, run)]:
            add("finetune", model, units, (pretrained,))
        if units := [*analyses(config, model)]:
            add("analyze", model, units, (pretrained,))
    compared = tuple(job for job in jobs if is_compared(job.model) and job.kind != "analyze")
    if units := [*comparisons(config, compared)]:
        add("analyze", all_models(config), units, compared)
    return jobs


def _job(kind: Kind, model: Model, units: list[Unit], needs: tuple[Job, ...], launched_with: Any) -> Job:
    identity = [
        kind,
        [[unit.name, unit.identity] for unit in units],
        [job.digest for job in needs],
        launched_with,
        code_hash(kind),
    ]
    text = json.dumps(identity, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Job(f"{kind}.{model.name}", kind, model, tuple(units), needs, digest)
