"""The plan of a study: its grid of models as jobs, and the hash that names a job's folder.

The hash covers everything that decides the job's results: configuration, DeepSpeed's JSON, data, code, and the jobs it needs. A
complete folder is therefore the answer for every study that asks for this job, and any change leads to another folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from mlinterf_ds.errors import refusing
from mlinterf_ds.files import read_json
from mlinterf_ds.pretrain.config import load_run
from mlinterf_ds.sections import architecture, is_meta
from mlinterf_ds.study.code import code_hash
from mlinterf_ds.study.config import SetSection, StudyConfig
from mlinterf_ds.study.corpora import Corpora
from mlinterf_ds.study.jobs import Job, Kind, Model, Unit
from mlinterf_ds.study.units import all_models, analyses, comparisons, finetunings, is_compared, pretraining


def expand(config: StudyConfig, corpora: Corpora, deepspeed_config: str) -> list[Job]:
    """All jobs of the study, none twice, each after the jobs it needs. UserError for a setting that a recipe refuses."""
    jobs: list[Job] = []
    with refusing(f"--deepspeed_config {deepspeed_config}: not JSON"):
        deepspeed_json = read_json(Path(deepspeed_config))

    def add(kind: Kind, model: Model, units: list[Unit], needs: tuple[Job, ...]) -> Job:
        identities, digests = [[unit.name, unit.identity] for unit in units], [job.digest for job in needs]
        identity = [kind, identities, digests, [deepspeed_json, config.ranks], code_hash(kind)]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        jobs.append(Job(f"{kind}.{model.name}", kind, model, tuple(units), needs, digest))
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


# --- the grid ----------------------------------------------------------------------------------------------------------
def models(config: StudyConfig) -> list[Model]:
    """Every model of the grid. Sets share their monolingual models, so names decide which models are the same."""
    grid: dict[str, Model] = {}
    for seed in config.seeds:
        for group in config.sets:
            for model in [*_monolingual(config, group, seed), *_multilingual(config, group, seed)]:
                grid.setdefault(model.name, model)
    return list(grid.values())


def _monolingual(config: StudyConfig, group: SetSection, seed: int) -> Iterator[Model]:
    """A model of each language of a pair, with as much text as the pair's models have of it."""
    if config.mono and group.kind in ("pair", "low"):
        for language in group.languages:
            limit = group.limits.get(language)
            limits = ((language, limit),) if limit else ()
            yield Model(f"{language}@{limit}" if limit else language, "mono", (language,), "mono", seed, (), limits)
            if config.controls.text and not limit:
                shorter = (f"train.steps={max(1, _steps(config) // 2)}",)
                yield Model(language, "mono", (language,), "mono", seed, shorter, (), "text")
    if group.kind == "null":
        for language in group.languages:
            of_half = f"{language}-in-{group.name}"
            yield Model(of_half, "null", (language,), "mono", seed, tuple(group.settings), half=group.languages[1])


def _multilingual(config: StudyConfig, group: SetSection, seed: int) -> Iterator[Model]:
    """A model of each variant of a set, and the controls of the meta variants of two languages."""
    limits, settings = tuple(sorted(group.limits.items())), tuple(group.settings)
    common = (group.name, group.kind, tuple(group.languages))
    if group.kind == "null":
        yield Model(*common, "joint", seed, settings, half=group.languages[1])
        return
    for variant in group.variants or (config.variants if group.kind == "pair" else ["joint"]):
        yield Model(*common, variant, seed, settings, limits)
        if is_meta(variant) and group.kind in ("pair", "low"):
            if config.controls.direct:
                yield Model(*common, variant, seed, (*settings, "meta.terms=direct"), limits, "direct")
            if config.controls.compute:
                longer = (*settings, f"train.steps={round(_steps(config, *settings) * config.controls.compute)}")
                yield Model(*common, architecture(variant), seed, longer, limits, "compute")


def _steps(config: StudyConfig, *settings: str) -> int:
    """The training steps of a model with these further settings."""
    return load_run(config.recipes, [*config.settings, *settings]).train.steps
