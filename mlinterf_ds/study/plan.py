"""A study's grid as jobs: which processes are started, what each runs, and what it needs finished before.

A job is one set of processes: it pretrains a model, or fine-tunes it on all tasks, or runs all its analyses. Its folder's
name ends in a hash of all that decides its results (configuration, DeepSpeed's JSON, data, code, the jobs it needs), so a
folder that is complete is the answer, whichever study asked first, and a change of any of these makes another folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlinterf_ds.analysis.config import AnalyzeConfig
from mlinterf_ds.config import decisive, load_config
from mlinterf_ds.engine.throughput import flops_per_row
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import read_json
from mlinterf_ds.finetune.config import FinetuneConfig
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.study.code import code_hash
from mlinterf_ds.study.config import SYNTHETIC, StudyConfig, TaskSection
from mlinterf_ds.study.corpora import Corpora, sha256
from mlinterf_ds.study.grid import Model, models

Kind = Literal["pretrain", "finetune", "analyze"]
FROZEN = "finetune.freeze=language"
FILE_EXAMPLES = 3000  # of a file that was not counted, for the estimated cost
WINDOWS = {"qa": 6}  # rows of 64 pieces that an example of a file makes (TyDiQA), for the estimated cost


@dataclass(frozen=True)
class Unit:
    """One run of a recipe: a folder with a summary.json."""

    name: str
    arguments: tuple[str, ...]  # of the launcher, but for output, checkpoint and tracking
    facts: dict[str, Any]
    identity: Any = field(repr=False, default=None)  # what decides its results


@dataclass(frozen=True)
class Job:
    """One set of processes."""

    name: str
    kind: Kind
    model: Model
    units: tuple[Unit, ...]
    needs: tuple[Job, ...]
    digest: str

    @property
    def folder(self) -> str:
        """Below the study's output."""
        return f"jobs/{self.name}-{self.digest[:10]}"


def expand(config: StudyConfig, corpora: Corpora, deepspeed_config: str) -> list[Job]:
    """All jobs, each after those it needs; none twice. UserError for a setting that a recipe would refuse."""
    found: list[Job] = []
    with refusing(f"--deepspeed_config {deepspeed_config}: not JSON"):
        deepspeed = read_json(Path(deepspeed_config))
    for model in models(config):
        unit, run = _pretraining(config, model, corpora)
        pretrain = _job("pretrain", model, [unit], (), deepspeed, config.ranks)
        found.append(pretrain)
        parts: dict[Kind, list[Unit]] = {
            "finetune": [*_finetunings(config, model, run)],
            "analyze": [*_analyses(config, model)],
        }
        for kind, units in parts.items():
            if units:
                found.append(_job(kind, model, units, (pretrain,), deepspeed, config.ranks))
    compared = tuple(job for job in found if _is_compared(job.model) and job.kind != "analyze")
    if units := [*_of_all(config, compared)]:
        found.append(_job("analyze", _everything(config), units, compared, deepspeed, config.ranks))
    return found


@contextlib.contextmanager
def _naming(where: str, settings: Sequence[str]) -> Iterator[None]:
    """A mistake in a study's settings is told as one of the study's recipe, not of a command line that nobody typed."""
    try:
        yield
    except UserError as error:
        said = str(error)
        if any(f"--set {setting}" in said for setting in settings):
            said = f"in the study's {where}: {said.replace('--set ', '')}"
        raise UserError(said) from None


# --- units -------------------------------------------------------------------------------------------------------------
def _pretraining(config: StudyConfig, model: Model, corpora: Corpora) -> tuple[Unit, RunConfig]:
    folder, manifest = corpora.of(dict(model.limits))
    settings = [*config.settings, *model.settings, f"variant={model.variant}", f"train.seed={model.seed}"]
    settings += [f"languages={','.join(model.languages)}", f"corpus={folder}"]
    with _naming("settings", config.settings):
        run = load_config(RunConfig, [*config.recipes], settings)
    if config.ranks % run.parallel.tensor:
        raise UserError(
            f"ranks={config.ranks} is not a multiple of parallel.tensor={run.parallel.tensor}: change one of them"
        )
    length, rows = run.data.sequence_length, run.train.steps * run.train.batch
    facts = model.facts | {
        "tokens": rows * length,
        "steps": run.train.steps,
        "flops": rows * _row_flops(run, corpora.vocabulary, round(run.data.mask * length)),
        "warmup": run.train.warmup,
        "conflict_every": run.conflict.every,
    }
    kept = _kept(run) | ({"init": _content(run.init)} if run.init else {})
    unit = Unit(model.name, _arguments(config.recipes, settings), facts, [kept, model.limits, manifest])
    return unit, run


def _finetunings(config: StudyConfig, model: Model, pretrained: RunConfig) -> Iterator[Unit]:
    for task in config.tasks:
        for source in _trained_on(config, model, task):
            targets = [source]
            if source == config.source:  # beside the source itself, zero-shot; the monolingual model shows the floor
                targets = config.languages if model.kind == "mono" else list(model.languages)
            files = {
                "train": {source: _data(config, task, "train", source)},
                "dev": {source: _data(config, task, "dev", source)},
            }
            places = {code: _data(config, task, "test", code) for code in targets}
            for code in [code for code, place in places.items() if place == "split" and code != source]:
                places[code] = _data(config, task, "train", code)  # nothing of it was trained on here: all of it tests
            files["test"] = {code: place for code, place in places.items() if place}
            settings = [*task.settings, f"task={task.task}", f"finetune.seeds={model.seed}"]
            settings += [f"finetune.unseen={source}"] * (model.kind == "mono")
            yield _finetuning(task, source, files, settings, model, "", pretrained)
            routed = model.variant not in ("mono", "joint", "share_adpt")
            if routed and model.kind == "pair" and not model.control and task.task in config.controls.freeze:
                yield _finetuning(task, source, files, [*settings, FROZEN], model, "freeze", pretrained)


def _trained_on(config: StudyConfig, model: Model, task: TaskSection) -> list[str]:
    """The languages whose training data the model is fine-tuned on, one at a time."""
    wanted = model.languages[:2] if model.kind == "triple" else model.languages
    wanted = tuple(code for code in wanted if code == config.source or task.within)
    return [code for code in wanted if _data(config, task, "train", code) and _data(config, task, "test", code)]


def _data(config: StudyConfig, task: TaskSection, split: str, language: str) -> str:
    """File, 'synthetic' or 'split'; '' where there are no such data."""
    given: dict[str, str] = getattr(task, split)
    if language in given:
        return given[language]
    if config.corpus.folder == SYNTHETIC and not config.corpus.text:
        return SYNTHETIC
    return "split" if split == "dev" and language in task.train else ""


def _finetuning(
    task: TaskSection, source: str, files: dict[str, dict[str, str]], settings: list[str], model: Model, control: str,
    pretrained: RunConfig,
) -> Unit:  # fmt: skip
    with _naming(f"[[tasks]] {task.task}: settings", task.settings):
        run = load_config(FinetuneConfig, [*task.recipes], [*settings, "checkpoint=model"])
    arguments = _arguments(task.recipes, settings)
    for split, chosen in files.items():
        arguments += tuple(word for code, place in chosen.items() for word in (f"--{split}", f"{code}={place}"))
    facts = model.facts | {"task": task.task, "train": source, "control": control or model.control}
    facts |= _work(run, files, pretrained)
    data = {f"{split} {code}": _digest(place) for split, chosen in files.items() for code, place in chosen.items()}
    label = f"{task.task}-{source}{'-' + control if control else ''}.{model.name}"
    return Unit(label, arguments, facts, [_kept(run), data])


def _work(run: FinetuneConfig, files: dict[str, dict[str, str]], pretrained: RunConfig) -> dict[str, float]:
    """What a fine-tuning computes, roughly; an evaluated row costs a third of a trained one."""
    own = run.finetune
    of_file = (own.limit or FILE_EXAMPLES) * WINDOWS.get(run.task, 1)
    known = {split: own.synthetic_train if split == "train" else own.synthetic_eval for split in files}
    counts = {
        split: sum(known[split] if place == SYNTHETIC else of_file for place in places.values())
        for split, places in files.items()
    }
    trained = own.epochs * counts["train"]
    rows = trained + (own.epochs * counts["dev"] + counts["test"]) / 3
    return {
        "steps": trained / own.batch[0],
        "tokens": rows * pretrained.data.sequence_length,
        "flops": rows * _row_flops(pretrained, 0, 0),
    }


def _row_flops(run: RunConfig, vocabulary: int, masked: int) -> float:
    """FLOPs of training the run's model on one row."""
    adapters = run.variant.endswith("adpt")
    return flops_per_row(run.model, run.data.sequence_length, vocabulary, masked, adapters=adapters)


def _analyses(config: StudyConfig, model: Model) -> Iterator[Unit]:
    for found in config.analyses:
        if found.analysis == "interference":
            continue  # one of the whole study
        if model.kind == "pair" and not model.control and model.variant in found.variants:
            settings = [*found.settings, f"analysis={found.analysis}"]
            with _naming(f"[[analyses]] {found.analysis}: settings", found.settings):
                run = load_config(AnalyzeConfig, [], [*settings, "checkpoint=model"])
            facts = model.facts | {"analysis": found.analysis}
            yield Unit(f"{found.analysis}.{model.name}", _arguments([], settings), facts, [_kept(run)])


def _is_compared(model: Model) -> bool:
    """Whether the interference analysis looks at a model: pairs and their monolingual models; larger ones beside."""
    return not model.limits and not model.control and (model.kind != "triple") and model.variant in ("mono", "joint")


def _everything(config: StudyConfig) -> Model:
    """Stands for all models together, in the job of the analyses that compare them."""
    return Model("all", "study", tuple(config.languages), "all", config.seeds[0])


def _of_all(config: StudyConfig, jobs: tuple[Job, ...]) -> Iterator[Unit]:
    """Interference: all monolingual models against all joint ones. Figure 3: conflict during the joint models' training."""

    def folders(kind: Kind, of: set[str], keep: Callable[[Job], bool] = lambda job: True) -> str:
        chosen = [job for job in jobs if job.kind == kind and job.model.kind in of and keep(job)]
        return ",".join(f"{{output}}/{job.folder}/{unit.name}" for job in chosen for unit in job.units)

    def unit(name: str, settings: list[str]) -> Unit:
        given = [setting for setting in settings if not setting.endswith("=")]
        with _naming(f"[[analyses]] {name}: settings", by_name.get(name, [])):
            load_config(AnalyzeConfig, [], given)
        facts = _everything(config).facts | {"analysis": name}
        return Unit(f"{name}.all", _arguments([], given), facts, settings)

    by_name: dict[str, list[str]] = {found.analysis: found.settings for found in config.analyses}
    if "interference" in by_name:
        settings = [*by_name["interference"], "analysis=interference"]
        settings.append(f"interference.mono={folders('pretrain', {'mono'})}")
        settings.append(f"interference.joint={folders('pretrain', {'pair'})}")
        settings.append(f"interference.larger={folders('pretrain', {'many'})}")
        yield unit("interference", [*settings, f"interference.tasks={folders('finetune', {'mono', 'pair', 'many'})}"])
    if "conflict" in by_name:
        curves = folders(
            "pretrain",
            {"pair"},
            lambda job: job.model.seed == config.seeds[0] and bool(job.units[0].facts["conflict_every"]),
        )
        if curves:
            yield unit("conflict-training", ["analysis=conflict", f"conflict.runs={curves}"])


def _arguments(recipes: Sequence[str], settings: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        word for flag, values in (("--recipe", recipes), ("--set", settings)) for v in values for word in (flag, v)
    )


# --- hashes ------------------------------------------------------------------------------------------------------------
def _job(kind: Kind, model: Model, units: list[Unit], needs: tuple[Job, ...], deepspeed: Any, ranks: int) -> Job:
    identity = [
        kind,
        [[u.name, u.identity] for u in units],
        [job.digest for job in needs],
        deepspeed,
        ranks,
        code_hash(kind),
    ]
    text = json.dumps(identity, sort_keys=True, default=str)
    name = f"{kind}.{model.name}"
    return Job(name, kind, model, tuple(units), needs, hashlib.sha256(text.encode()).hexdigest())


def _kept(run: Any) -> dict[str, Any]:
    return decisive(type(run), run.model_dump(), ("address",))


@functools.cache
def _digest(place: str) -> str:
    """A data file's hash; the words 'synthetic' and 'split' stand for themselves."""
    return place if place in (SYNTHETIC, "split") else sha256("tasks", place)


@functools.cache
def _content(place: str) -> str:
    """A folder's hash (of a model that `init` names): its files' names and bytes."""
    files = sorted(path for path in Path(place).rglob("*") if path.is_file())
    if not files:
        raise UserError(f"init={place}: no such folder, or an empty one; name a checkpoint or a transformers folder")
    listing = "".join(f"{path.relative_to(place)} {sha256('init', str(path))}\n" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()
