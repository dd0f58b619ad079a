"""One fine-tuning (a pretrained model, a task, a point of the grid, a seed): its training, its resume, its predictions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.weights import CheckpointReader
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import write_json
from mlinterf_ds.finetune.config import FinetuneConfig
from mlinterf_ds.model.encoder import SHARED
from mlinterf_ds.pretrained import Point, Pretrained
from mlinterf_ds.ranks import agreed, from_first
from mlinterf_ds.runtime.parallel import Layout
from mlinterf_ds.runtime.signals import Signals, StopVote
from mlinterf_ds.sections import TrainConfig
from mlinterf_ds.tasks import Limits, Row, Task
from mlinterf_ds.tasks.batches import TrainBatches, best, outputs
from mlinterf_ds.tasks.heads import CLASSIFIER, TaskModel
from mlinterf_ds.tasks.sources import Options, Sets
from mlinterf_ds.tracking import Tracker

LOSSES = 500  # points of the training loss in MLflow's chart, at least; fewer steps have one each


class Stopped(Exception):
    """The job was asked to end; what it has done is saved."""


@dataclass(frozen=True)
class FinetuneJob:
    """What all fine-tunings of one command share on this rank."""

    config: FinetuneConfig
    options: Options
    deepspeed_json: dict[str, Any]
    precision: str
    layout: Layout
    pretrained: Pretrained
    task: Task
    labels: list[str]
    limits: Limits
    sets: Sets
    rows: dict[str, dict[str, list[Row]]]  # split -> language -> rows
    modules: dict[str, dict[str, int]]  # split -> language -> index of the language whose modules serve it

    @cached_property
    def baselines(self) -> dict[str, dict[str, dict[str, float]]]:
        """The scores of each test language without a model: language -> baseline -> metrics; only where labels are known."""
        train = list(itertools.chain(*self.sets.examples["train"].values()))
        tests = self.sets.examples["test"].items()
        return {lang: self.task.baselines(train, test) for lang, test in tests if any(map(self.task.labelled, test))}

    @property
    def first(self) -> bool:
        return self.layout.rank == 0

    @property
    def source(self) -> dict[str, Any]:
        """The facts of the pretraining that a model card tells."""
        saved = self.pretrained.saved
        return {
            "checkpoint": str(self.pretrained.path),
            "steps": saved.get("updates"),
            "rows": saved["config"].get("train", {}).get("batch"),
            "corpus": saved["config"].get("corpus"),
            "manifest": saved.get("manifest"),
        }

    def logged(self, values: dict[str, float]) -> dict[str, float]:
        """Names values for the tracker: every fine-tuning has the same names, so that runs share charts."""
        return {f"{self.task.name}/{name}": value for name, value in values.items()}


@dataclass
class Progress:
    """The scores and losses of a fine-tuning so far, saved in its checkpoints."""

    dev: list[dict[str, float]] = field(default_factory=list)  # after each epoch: the metric by language
    losses: list[float] = field(default_factory=list)  # mean training loss of each epoch
    best: float = -1.0  # mean over dev languages; scores are 0 to 100
    best_epoch: int = 0
    best_step: int = 0
    epoch_loss: list[float] = field(default_factory=list)  # losses of the steps in the present epoch


class Trial:
    """One point of the grid with one seed, in `folder`."""

    def __init__(self, job: FinetuneJob, point: Point, folder: Path, tracker: Tracker):
        self.job, self.point, self.folder, self.tracker = job, point, folder, tracker
        self.result = folder / "result.json"  # written when trained to the end
        rows = [row for rows in job.rows["train"].values() for row in rows]
        languages = [job.modules["train"][language] for language, rows in job.rows["train"].items() for _ in rows]
        self.batches = TrainBatches(rows, np.array(languages), point.batch, point.seed)
        self.steps = job.config.finetune.epochs * self.batches.epoch_steps
        self.progress = Progress()

    @cached_property
    def engine(self) -> Engine:
        """Built when first needed, with the pretrained weights and a fresh classifier."""
        job, settings, pretrained = self.job, self.job.config.finetune, self.job.pretrained
        training = {
            "batch": self.point.batch,
            "micro_batch": settings.micro_batch,
            "lr": self.point.lr,
            "warmup": round(settings.warmup * self.steps),
            "schedule": "constant",  # the engine's part of the schedule is the warm-up
            "weight_decay": settings.weight_decay,
            "clip": settings.clip,
            "beta2": 0.999,
            "seed": self.point.seed,
            "spike": None,  # near the end a hard batch has many times the usual loss and still must count
        }
        shape = pretrained.architecture(settings.dropout)
        model = TaskModel(
            kind=job.task.kind, classes=len(job.labels), seed=self.point.seed, word=settings.word, **shape
        )
        names = {name for name, _ in model.named_parameters() if not name.startswith("classifier.")}
        known = set(CheckpointReader(pretrained.path).names)
        if missing := sorted(names - known):
            raise UserError(f"{pretrained.path}: has no parameter {missing[0]} ({len(missing)} in all)")
        engine = Engine(model, TrainConfig.model_validate(training), job.deepspeed_json, job.precision, job.layout)
        checkpoint.load(pretrained.path, engine, moments=False, missing=True)
        return engine

    # -- training ----------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> bool:
        """Whether it has been trained to the end, as the first rank sees it; all ranks ask together."""
        return bool(from_first(self.result.is_file()))

    def _read_result(self) -> Progress:
        remedy = "; remove it, and the run goes on from its checkpoint"
        with refusing(f"{self.result}: not what a fine-tuning writes", remedy):
            progress = Progress(**json.loads(self.result.read_bytes()))
        return progress

    def train(self, signals: Signals) -> Progress:
        """Train to the end (from the newest checkpoint, if there is one); `Stopped` if asked to end before."""
        if self.trained:
            self.progress = agreed(self._read_result)
            return self.progress
        engine = self.engine
        self._resume()
        bar = tqdm(total=self.steps, initial=engine.step, disable=not self.job.first, unit="step", mininterval=1)
        bar.set_description(self.point.name)
        vote = StopVote(signals, engine.device)
        recent: list[float] = []  # losses that the tracker does not have yet
        while engine.step < self.steps:
            step = engine.step
            micro = [self.batches.at(step, *slice_) for slice_ in engine.slices(self.point.batch)]
            facts = engine.train_step(micro, self._rates(micro[0].step_languages))
            loss = facts["loss"] / self.batches.filled(step)  # the rows that fill a batch have none
            self.progress.epoch_loss.append(loss)
            recent.append(loss)
            if len(recent) * LOSSES >= self.steps:
                self.tracker.log(self.job.logged({"train/loss": float(np.mean(recent))}), engine.step)
                recent = []
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            if engine.step % self.batches.epoch_steps == 0:
                self._end_epoch()
            if stopped := vote.reason():
                self._save()
                bar.close()
                raise Stopped(stopped)
        bar.close()
        if self.job.first:
            write_json(self.result, vars(self.progress))
        dist.barrier()
        return self.progress

    def _rates(self, step_languages: Sequence[int]) -> dict[str, float]:
        """The learning rate of every group that the next step trains: the classifier has its own, frozen groups none."""
        engine, settings = self.engine, self.job.config.finetune
        rate, number, warmup = engine.learning_rate, engine.updates + 1, engine.training.warmup
        if settings.schedule == "linear" and number > warmup:  # the engine's rate is constant after the warm-up
            rate *= (self.steps - number + 1) / (self.steps - warmup + 1)
        names = [] if settings.freeze == "shared" else [SHARED]
        if settings.freeze != "language":
            names += [engine.languages[index] for index in step_languages]
        rates = {name: rate for name in names if name in engine.spaces}
        return rates | {CLASSIFIER: rate * (self.point.head_lr / self.point.lr)}

    def _end_epoch(self) -> None:
        """Scores the dev sets, saves a checkpoint and logs both."""
        progress, epoch = self.progress, len(self.progress.dev) + 1
        scores = {language: self.score("dev", language)[self.job.task.metric] for language in self.job.rows["dev"]}
        progress.dev.append(scores)
        progress.losses.append(float(np.mean(progress.epoch_loss)))
        progress.epoch_loss = []
        mean = sum(scores.values()) / len(scores)
        best = mean > progress.best
        if best:
            progress.best, progress.best_epoch, progress.best_step = mean, epoch, self.engine.step
        path = self._save()
        if best and self.job.first:
            checkpoint.mark_best(self.folder, path)
        task = self.job.task
        values = {f"dev/{task.metric}/{language}": value for language, value in scores.items()}
        self.tracker.log(self.job.logged(values), self.engine.step)
        if self.job.first:
            shown = ", ".join(f"{language} {value:.2f}" for language, value in scores.items())
            tqdm.write(
                f"{self.point.name}: epoch {epoch}, loss {progress.losses[-1]:.3f}, dev {self.job.task.metric} {shown}"
            )

    def _save(self) -> Path:
        job = self.job
        state = {
            "config": job.config.model_dump(),
            "languages": job.pretrained.languages,
            "vocabulary": job.pretrained.saved["vocabulary"],
            "labels": job.labels,
            "origin": job.pretrained.origin,
            "point": vars(self.point),
            "trained_on": list(job.options["train"]),
            "pretrained": {key: job.pretrained.saved["config"][key] for key in ("variant", "model", "data")},
            "source": job.source,
            "progress": vars(self.progress),
            "run_id": self.tracker.run_id,
        }
        files = {"tokenizer.model": job.pretrained.path / "tokenizer.model"}
        keep = job.config.finetune.keep
        return checkpoint.save(self.folder, self.engine, state, files, keep, output=self.folder.parent)

    def _resume(self) -> None:
        """Go on from the newest checkpoint of the folder."""
        path = agreed(lambda: checkpoint.find(self.folder) if checkpoint.begun(self.folder) else None)
        if path is None:
            return
        self.progress = Progress(**checkpoint.load(path, self.engine)["progress"])
        if self.job.first:
            if self.progress.best_step == self.engine.step:
                checkpoint.mark_best(self.folder, path)  # the job may have been killed between the two writes
            tqdm.write(f"{self.point.name}: resumed from {path} at step {self.engine.step} of {self.steps}")

    # -- answers -----------------------------------------------------------------------------------------------------

    def load_best(self) -> None:
        """Loads the weights of the epoch with the best dev score."""
        checkpoint.load(checkpoint.path_of(self.folder, self.progress.best_step), self.engine, moments=False)

    def score(self, split: str, language: str) -> dict[str, float]:
        """The metrics of a dev or test set, the same on all ranks."""
        predictions, examples = self.predict(split, language), self.job.sets.examples[split][language]
        return from_first(self.job.task.score(examples, predictions) if self.job.first else None)

    def predict(self, split: str, language: str) -> list[Any]:
        """A prediction for each example on rank 0; an empty list on other ranks."""
        job, rows = self.job, self.job.rows[split][language]
        engine = self.engine
        scores = outputs(engine.model, job.task.kind, rows, job.modules[split][language], job.layout, engine.device)
        if not job.first:
            return []
        answers = best(job.task.kind, scores)
        return job.task.predict(job.sets.examples[split][language], rows, answers, job.labels, job.limits)
