"""The plan of a study: its grid of models as jobs, and the hash that names a job's folder.

The hash covers everything that decides the job's results: configuration, DeepSpeed's JSON, data, code, and the jobs it needs. A
complete folder is therefore the answer for every study that asks for this job, and any change leads to another folder.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import read_json
from mlinterf_ds.pretrain.config import RunConfig, load_run
from mlinterf_ds.sections import TrainConfig, architecture, is_meta
from mlinterf_ds.study.config import SetSection, StudyConfig
from mlinterf_ds.study.corpora import Corpora
from mlinterf_ds.study.jobs import COMMANDS, VOCABULARY, Job, Kind, Model, Unit
from mlinterf_ds.study.units import all_models, analyses, comparisons, finetunings, is_compared, pretraining

PACKAGE = Path(__file__).resolve().parents[1]
# These files start a run, watch it and show what it measured: no number depends on them.
IRRELEVANT = (
    "plots",
    "tracking",
    *(f"runtime/{name}.py" for name in ("launchers", "output", "program", "restarts", "signals")),
)


def expand(config: StudyConfig, corpora: Corpora, deepspeed_config: str) -> list[Job]:
    """All jobs of the study, none twice, each after the jobs it needs. UserError for a setting that a command refuses."""
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
                shorter = (f"train.steps={max(1, _train(config).steps // 2)}",)
                yield Model(language, "mono", (language,), "mono", seed, shorter, (), "text")
            if config.controls.vocabulary and not limit:
                yield Model(language, "mono", (language,), "mono", seed, control=VOCABULARY)
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
            if config.controls.held_out:
                yield Model(*common, variant, seed, (*settings, "meta.text=held_out"), limits, "held_out")
            if config.controls.compute:
                longer = (*settings, f"train.steps={round(_train(config, *settings).steps * config.controls.compute)}")
                yield Model(*common, architecture(variant), seed, longer, limits, "compute")
            if config.controls.batch:
                more = (*settings, f"train.batch={_rows_read(load_run(config.recipes, [*config.settings, *settings]))}")
                yield Model(*common, architecture(variant), seed, more, limits, "batch")
            if config.controls.rows:
                yield Model(
                    *common, architecture(variant), seed, (*settings, *_meta_rows(config, *settings)), limits, "rows"
                )


def _train(config: StudyConfig, *settings: str) -> TrainConfig:
    """The section `train` of a model with these further settings."""
    return load_run(config.recipes, [*config.settings, *settings]).train


def _meta_rows(config: StudyConfig, *settings: str) -> tuple[str, ...]:
    """The settings by which a plain step reads the rows of a meta step of the model with these further settings."""
    run = load_run(config.recipes, [*config.settings, *settings])
    if not (run.data.mixed and run.meta.reuse and run.meta.every == 1):
        raise UserError(
            "controls.rows gives plain steps the rows of meta steps, and trains all modules on all of them: so must the meta steps, by "
            f"data.mixed=true (now {run.data.mixed}), meta.reuse=true (now {run.meta.reuse}) and meta.every=1 (now {run.meta.every})"
        )
    return f"train.batch={_rows_read(run)}", f"data.meta_rows={run.meta.batch or run.train.batch}"


def _rows_read(run: RunConfig) -> int:
    """The rows that a meta step reads: those of training, and those of the validation loss. UserError where steps differ in them."""
    if run.meta.every != 1:
        raise UserError(
            f"controls.batch and controls.rows give plain steps the rows of a meta step: set meta.every=1 (now {run.meta.every})"
        )
    return run.train.batch + (run.meta.batch or run.train.batch)


# --- the code that decides a job's numbers: all files that its command imports, directly or through others, by their syntax trees --
@functools.cache
def code_hash(kind: str) -> str:
    """SHA-256 of the code of a kind of job; comments and layout do not change it."""
    digest = hashlib.sha256()
    for path in imported_files(COMMANDS[kind], without=IRRELEVANT):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\n{ast.dump(_tree(path))}\n".encode())
    return digest.hexdigest()


def imported_files(module: str, without: tuple[str, ...] = ()) -> list[Path]:
    """The package's files that `module` imports, at once or inside functions, itself included, sorted by path.

    without: files and folders below the package that are left out, and not followed.
    """
    reached: set[Path] = set()
    waiting = _files_of(module)
    while waiting:
        path = waiting.pop()
        if path in reached or any(path.is_relative_to(PACKAGE / name) for name in without):
            continue
        reached.add(path)
        for name in _imports(_tree(path)):
            waiting += _files_of(name)
    return sorted(reached)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(node: ast.AST) -> Iterator[str]:
    """The dotted names that a syntax tree imports; names inside `if TYPE_CHECKING` are for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield from (f"{child.module}.{alias.name}" for alias in child.names)  # a module, or a name in one
        elif not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield from _imports(child)


def _files_of(name: str) -> list[Path]:
    """The files of the package that importing a dotted name runs: each package on the way, and the module."""
    root, *parts = name.split(".")
    if root != PACKAGE.name:
        return []
    paths = [PACKAGE.joinpath(*parts[:count]) for count in range(len(parts) + 1)]
    files = [path / "__init__.py" for path in paths] + [path.with_suffix(".py") for path in paths[1:]]
    return [path for path in files if path.is_file()]
