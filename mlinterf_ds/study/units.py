"""The runs of a study: a model's pretraining and fine-tunings, and the analyses of one model or of all.

Every run's configuration is loaded here, so that a setting which its command would refuse is refused before anything starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlinterf_ds.analysis.config import AnalyzeConfig
from mlinterf_ds.config import decisive, load_config
from mlinterf_ds.engine.throughput import flops_per_row
from mlinterf_ds.errors import UserError
from mlinterf_ds.finetune.config import FinetuneConfig
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.sections import is_routed
from mlinterf_ds.study.config import SYNTHETIC, StudyConfig, TaskSection
from mlinterf_ds.study.corpora import Corpora, file_hash
from mlinterf_ds.study.jobs import VOCABULARY, Job, Model, Unit

SPLIT = "split"  # stands for a share of the training data, where a file of examples is expected
FROZEN = "finetune.freeze=language"
FILE_EXAMPLES = 3000  # examples of a data file, for the cost estimate: files are not read before they are needed
FAR = 1000  # between the seeds of a model's fine-tunings, so that those of different models differ
WINDOWS = {"qa": 6}  # rows of 64 pieces that one example of a TyDiQA file makes, for the cost estimate
EVALUATED = 1 / 3  # cost of an evaluated row, in trained rows


# --- pretraining -------------------------------------------------------------------------------------------------------
def pretraining(config: StudyConfig, model: Model, corpora: Corpora) -> tuple[Unit, RunConfig]:
    """The pretraining of a model, and its configuration."""
    folder, manifest_hash = corpora.of(
        dict(model.limits), model.half, model.languages[0] if model.control == VOCABULARY else ""
    )
    settings = [*config.settings, *model.settings, f"variant={model.variant}", f"train.seed={model.seed}"]
    settings += [f"languages={','.join(model.languages)}", f"corpus={folder}"]
    with _blaming("settings", config.settings):
        run = load_config(RunConfig, [*config.recipes], settings)
    if config.ranks % run.parallel.tensor:
        raise UserError(
            f"ranks={config.ranks} is not a multiple of parallel.tensor={run.parallel.tensor}: change one of them"
        )
    length, rows = run.data.sequence_length, run.train.steps * run.train.batch
    facts = model.facts | {
        "tokens": run.rows_seen(run.train.steps) * length,
        # without the validation rows of meta steps, whose cost is a factor (study/cost.py)
        "step_tokens": rows * length,
        "steps": run.train.steps,
        "flops": rows * _row_flops(run, corpora.vocabulary, round(run.data.mask * length)),
        "warmup": run.train.warmup,
        "conflict_every": run.conflict.every,
    }
    initial = {"init": _folder_hash(run.init)} if run.init else {}
    identity = [_deciding(run) | initial, model.limits, manifest_hash]
    return Unit(model.name, _arguments(config.recipes, settings), facts, identity), run


# --- fine-tuning -------------------------------------------------------------------------------------------------------
def finetunings(config: StudyConfig, model: Model, pretrained: RunConfig) -> Iterator[Unit]:
    """The fine-tunings of a model on every task, once for each language that has training data."""
    for task in config.tasks:
        for language in _training_languages(config, model, task):
            data = _splits(config, model, task, language)
            seeds = ",".join(str(model.seed + FAR * repeat) for repeat in range(task.repeats))
            settings = [*task.settings, f"task={task.task}", f"finetune.seeds={seeds}"]
            settings += [f"finetune.limit={task.limits[language]}"] if language in task.limits else []
            settings += [f"finetune.unseen={language}"] * (model.kind == "mono")
            yield _finetuning(task, language, data, settings, model, "", pretrained)
            frozen = is_routed(model.variant) and task.task in config.controls.freeze
            if frozen and model.kind == "pair" and not model.control:
                yield _finetuning(task, language, data, [*settings, FROZEN], model, "freeze", pretrained)


def _training_languages(config: StudyConfig, model: Model, task: TaskSection) -> list[str]:
    """The languages on whose training data the model is fine-tuned, one at a time."""
    languages = model.languages[:2] if model.kind == "triple" else model.languages
    languages = tuple(code for code in languages if code in config.languages)  # without the half of a null control
    languages = tuple(code for code in languages if code == config.source or task.within)
    return [code for code in languages if _data(config, task, "train", code) and _data(config, task, "test", code)]


def _splits(config: StudyConfig, model: Model, task: TaskSection, language: str) -> dict[str, dict[str, str]]:
    """The data of a fine-tuning on one language: {split: {language: data}}.

    A model fine-tuned on the source of transfer is also tested zero-shot on its other languages. A monolingual model is tested
    on all languages of the study, of which it knows one: that score is the floor of transfer.
    """
    tested = [language]
    if language == config.source:
        tested = config.languages if model.kind == "mono" else [c for c in model.languages if c in config.languages]
    test = {code: _data(config, task, "test", code) for code in tested}
    for code, data in test.items():
        if data == SPLIT and code != language:  # nothing trains on this language's file, so all of it is tested
            test[code] = _data(config, task, "train", code)
    return {
        "train": {language: _data(config, task, "train", language)},
        "dev": {language: _data(config, task, "dev", language)},
        "test": {code: data for code, data in test.items() if data},
    }


def _data(config: StudyConfig, task: TaskSection, split: str, language: str) -> str:
    """The data of a language's split: a file, 'synthetic' or 'split'; '' if there are none."""
    files: dict[str, str] = getattr(task, split)
    if language in files:
        return files[language]
    if config.corpus.folder == SYNTHETIC and not config.corpus.text:
        return SYNTHETIC
    return SPLIT if split == "dev" and language in task.train else ""


def _finetuning(
    task: TaskSection, language: str, data: dict[str, dict[str, str]], settings: list[str], model: Model, control: str,
    pretrained: RunConfig,
) -> Unit:  # fmt: skip
    run = task_config(task, settings)
    sources = [(split, code, path) for split, files in data.items() for code, path in files.items()]
    arguments = _arguments(task.recipes, settings)
    arguments += tuple(word for split, code, path in sources for word in (f"--{split}", f"{code}={path}"))
    facts = model.facts | {"task": task.task, "train": language, "control": control or model.control}
    facts |= _finetuning_work(run, data, pretrained)
    identity = [_deciding(run), {f"{split} {code}": _data_hash(path) for split, code, path in sources}]
    name = f"{task.task}-{language}{'-' + control if control else ''}.{model.name}"
    return Unit(name, arguments, facts, identity)


def task_config(task: TaskSection, settings: Sequence[str]) -> FinetuneConfig:
    """The configuration of a task's fine-tuning with these settings."""
    with _blaming(f"[[tasks]] {task.task}: settings", task.settings):
        return load_config(FinetuneConfig, [*task.recipes], [*settings, "checkpoint=model"])


def _finetuning_work(run: FinetuneConfig, data: dict[str, dict[str, str]], pretrained: RunConfig) -> dict[str, float]:
    """Roughly what a fine-tuning computes: steps, tokens and FLOPs."""
    section = run.finetune
    file_rows = (section.limit or FILE_EXAMPLES) * WINDOWS.get(run.task, 1)
    synthetic_rows = {split: section.synthetic_train if split == "train" else section.synthetic_eval for split in data}
    counts = {
        split: sum(synthetic_rows[split] if path == SYNTHETIC else file_rows for path in files.values())
        for split, files in data.items()
    }
    grid = len(section.batch) * len(section.lr) * len(section.head_lr or [0])
    trainings = grid + len(section.seeds) - 1  # the first seed searches the grid
    trained = trainings * section.epochs * counts["train"]
    rows = trained + (trainings * section.epochs * counts["dev"] + len(section.seeds) * counts["test"]) * EVALUATED
    return {
        "steps": trained / section.batch[0],
        "step_tokens": rows * pretrained.data.sequence_length,
        "flops": rows * _row_flops(pretrained, 0, 0),
    }


def _row_flops(run: RunConfig, vocabulary: int, masked: int) -> float:
    """FLOPs of training the run's model on one row."""
    return flops_per_row(run.model, run.data.sequence_length, vocabulary, masked, run.variant)


# --- analyses ----------------------------------------------------------------------------------------------------------
def analyses(config: StudyConfig, model: Model) -> Iterator[Unit]:
    """The analyses of one model."""
    for section in config.analyses:
        if section.analysis == "interference":
            continue  # `comparisons` runs it on all models together
        if model.kind == "pair" and not model.control and model.variant in section.variants:
            settings = [*section.settings, f"analysis={section.analysis}"]
            with _blaming(f"[[analyses]] {section.analysis}: settings", section.settings):
                run = load_config(AnalyzeConfig, [], [*settings, "checkpoint=model"])
            facts = model.facts | {"analysis": section.analysis}
            yield Unit(f"{section.analysis}.{model.name}", _arguments([], settings), facts, [_deciding(run)])


def is_compared(model: Model) -> bool:
    """Whether the interference analysis reads a model: the monolingual and joint ones with all their text."""
    return not model.limits and not model.control and model.kind != "triple" and model.variant in ("mono", "joint")


def all_models(config: StudyConfig) -> Model:
    """A stand-in for all models together, to which the job of `comparisons` belongs."""
    return Model("all", "study", tuple(config.languages), "all", config.seeds[0])


def comparisons(config: StudyConfig, jobs: Sequence[Job]) -> Iterator[Unit]:
    """The analyses of all models together, from these jobs' output.

    `interference` compares the monolingual models with the joint ones. `conflict-training` draws figure 3 from the conflict that
    was measured while the joint models of the first seed were trained.
    """
    settings_of: dict[str, list[str]] = {section.analysis: section.settings for section in config.analyses}
    pretrained = {
        kind: [j for j in jobs if j.kind == "pretrain" and j.model.kind == kind] for kind in ("mono", "pair", "many")
    }
    null = [job for job in jobs if job.model.kind == "null"]
    if "interference" in settings_of:
        tasks = [job for job in jobs if job.kind == "finetune" and job.model.kind in pretrained]
        inputs = {"mono": pretrained["mono"], "joint": pretrained["pair"], "larger": pretrained["many"], "tasks": tasks}
        if any(inputs.values()):  # else the study holds null controls alone
            yield _interference(config, "interference", settings_of["interference"], inputs)
    for half in dict.fromkeys(
        job.model.half for job in null if "interference" in settings_of
    ):  # each has a corpus of its own
        of_half = [job for job in null if job.model.half == half]
        models = [job for job in of_half if job.kind == "pretrain"]
        mono, joint = ([job for job in models if (job.model.variant == "mono") == alone] for alone in (True, False))
        inputs = {"mono": mono, "joint": joint, "tasks": [job for job in of_half if job.kind == "finetune"]}
        unit = _interference(config, "interference-null", settings_of["interference"], inputs)
        facts = {name: joint[0].model.facts[name] for name in ("set", "languages")}
        yield dataclasses.replace(unit, name=f"interference-null.{facts['set']}", facts=unit.facts | facts)
    if "conflict" in settings_of:
        first = [job for job in pretrained["pair"] if job.model.seed == config.seeds[0]]
        if measured := [job for job in first if job.units[0].facts["conflict_every"]]:
            settings = ["analysis=conflict", f"conflict.runs={_folders(measured)}"]
            yield _comparison(config, "conflict-training", settings)


def _interference(config: StudyConfig, name: str, settings: list[str], inputs: Mapping[str, Sequence[Job]]) -> Unit:
    """The analysis `interference` of these jobs, by its keys."""
    folders = [f"interference.{key}={_folders(chosen)}" for key, chosen in inputs.items()]
    with _blaming("[[analyses]] interference: settings", settings):
        return _comparison(config, name, [*settings, "analysis=interference", *folders])


def _comparison(config: StudyConfig, name: str, settings: list[str]) -> Unit:
    given = [setting for setting in settings if not setting.endswith("=")]
    load_config(AnalyzeConfig, [], given)
    return Unit(f"{name}.all", _arguments([], given), all_models(config).facts | {"analysis": name}, settings)


def _folders(jobs: Sequence[Job]) -> str:
    """The units' folders, comma-separated; `launch.write_job` puts the study's output for {output}."""
    return ",".join(f"{{output}}/{job.folder}/{unit.name}" for job in jobs for unit in job.units)


# --- arguments, mistakes and hashes ------------------------------------------------------------------------------------
def _arguments(recipes: Sequence[str], settings: Sequence[str]) -> tuple[str, ...]:
    """The launcher's arguments for these recipes and settings."""
    words = [word for recipe in recipes for word in ("--recipe", recipe)]
    return (*words, *(word for setting in settings for word in ("--set", setting)))


@contextlib.contextmanager
def _blaming(key: str, settings: Sequence[str]) -> Iterator[None]:
    """A mistake in settings that come from the study's recipe is reported under the recipe's key, not as `--set`."""
    try:
        yield
    except UserError as error:
        message = str(error)
        if any(f"--set {setting}" in message for setting in settings):
            message = f"in the study's {key}: {message.replace('--set ', '')}"
        raise UserError(message) from None


def _deciding(run: Any) -> dict[str, Any]:
    """The keys of a configuration that decide numbers."""
    return decisive(type(run), run.model_dump(), ("address",))


@functools.cache
def _data_hash(data: str) -> str:
    """The hash of a data file; the words 'synthetic' and 'split' stand for themselves."""
    return data if data in (SYNTHETIC, SPLIT) else file_hash("tasks", data)


@functools.cache
def _folder_hash(folder: str) -> str:
    """The hash of all files' names and bytes in the folder of a model that `init` names."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    if not files:
        raise UserError(f"init={folder}: no such folder, or an empty one; name a checkpoint or a transformers folder")
    listing = "".join(f"{path.relative_to(folder)} {file_hash('init', str(path))}\n" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()
