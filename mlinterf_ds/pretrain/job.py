"""One pretraining run on one rank: its parts, how it resumes, its training loop, its evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mlinterf_ds.config import decisive, differences, flat, with_present_keys
from mlinterf_ds.data.batch import Batch
from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.data.evaluation import EvaluationSet
from mlinterf_ds.data.stream import prefetch
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.fitting import fit_micro_batch
from mlinterf_ds.engine.meta_step import AGREEMENT, MetaStep
from mlinterf_ds.engine.passes import make_fast
from mlinterf_ds.engine.pcgrad import pcgrad_step
from mlinterf_ds.engine.precision import DTYPES
from mlinterf_ds.engine.throughput import flops_per_row, peak_flops, peak_memory, rows_passed
from mlinterf_ds.errors import UserError, warn
from mlinterf_ds.files import read_json
from mlinterf_ds.gradients.measure import Draws, Monitor
from mlinterf_ds.model.encoder import Encoder, partition_dim
from mlinterf_ds.pretrain import initial
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.pretrain.report import Records
from mlinterf_ds.ranks import agreed
from mlinterf_ds.runtime.session import Session
from mlinterf_ds.runtime.signals import Signals, StopVote
from mlinterf_ds.sections import is_meta

LOG_STEPS = 10  # steps between points of the training curves
VECTORS = {"plain": 2, "meta": 5}  # fp32 vectors as long as the shared parameters that a step may hold at once


class PretrainingRun:
    """One pretraining run on this rank."""

    def __init__(
        self, config: RunConfig, deepspeed_json: dict[str, Any], precision: str, session: Session, corpus: Corpus
    ):
        self.config, self.session, self.corpus, self.precision = config, session, corpus, precision
        self.layout, self.first = session.layout, session.first
        self.languages = tuple(config.languages or corpus.languages)
        if config.variant == "mono" and len(self.languages) > 1:
            known = ", ".join(self.languages)
            raise UserError(f"variant=mono takes one language, the corpus has {known}: --set languages=...")
        self._open_streams()
        model = self._build_model()
        copies = [self.layout.tensor if partition_dim(p) is not None else 1 for p in model.parameters()]
        self.parameters = sum(n * p.numel() for n, p in zip(copies, model.parameters(), strict=True))
        self.engine = Engine(model, config.train, deepspeed_json, precision, self.layout)
        self.meta = MetaStep(self.engine, config.meta, self.stream.together) if self.validation else None
        # (step, validation perplexity) of each language
        self.history: dict[str, list[tuple[int, float]]] = {language: [] for language in self.languages}
        self.best = math.inf  # mean validation loss of the best checkpoint, in nats
        self.seconds = 0.0  # seconds of training, those before a resume included
        self.warned_of_spike = False
        self._unrecorded: tuple[Mapping[str, float], int] | None = None  # the newest step's facts, and its number
        self._meta_facts: dict[str, float] = {}  # of the newest meta step, until they are logged
        self.saver = checkpoint.Saver(session.output, config.train.keep)
        self.saved_step = -1  # the step of the newest checkpoint that this process began to write
        self.run_id: str | None = None  # MLflow's, of a run that is resumed
        self.origin: dict[str, Any] = {}  # what a model from a transformers folder keeps of it (`Folder.origin`)
        self.old_pieces: int | None = None  # size of the vocabulary that this run's extends
        self.tried_from = self.engine.micro  # rows of the largest micro-batch that train.micro_batch=auto tries
        self.start = self._restore()  # how the run starts, for the user; '' from random weights
        self.records = Records(config, session)
        self.conflict = self._monitor() if config.conflict.every else None
        self._measure_speed()
        self._fit_micro_batch()
        # after it: each size that is tried would be compiled
        make_fast(self.engine, config.model.compile, config.train.graphs, self.first)

    # -- parts -------------------------------------------------------------------------------------------------------

    def _open_streams(self) -> None:
        """The batches of training and, for the meta variants, of the validation loss; the rows that are evaluated."""
        config, data = self.config, self.config.data
        self.meta_rows = config.meta.batch or config.train.batch
        if is_meta(config.variant) and len(self.languages) < 2:
            raise UserError(f"variant={config.variant} needs two languages or more, here is only {self.languages[0]}")
        if is_meta(config.variant) and self.meta_rows % self.layout.data:
            raise UserError(f"meta.batch={self.meta_rows} is not divisible by {self.layout.data} data-parallel ranks")
        self.stream, self.validation = config.streams(self.corpus, self.languages)
        rows: dict[str, Any] = {"languages": self.languages, "max_rows": data.eval_rows, "row_format": data.row_format}
        self.evaluation = {code: EvaluationSet(self.corpus, code, "valid", **rows) for code in self.languages}
        self.unigrams = {language: rows.unigram_perplexity() for language, rows in self.evaluation.items()}
        if self.first and self.validation and (crowded := self.validation.crowded()):
            warn(
                f"{', '.join(crowded)}: a step trains on {config.train.batch} rows, over half of the text: rows of its validation "
                "loss may overlap them. A smaller train.batch, a shorter data.sequence_length or meta.text=half keeps them apart"
            )

    def _build_model(self) -> Encoder:
        config = self.config
        model = Encoder(
            config.model,
            variant=config.routing,
            languages=self.languages,
            vocabulary=self.corpus.vocabulary_size,
            positions=config.data.sequence_length,
            seed=config.train.seed,
        )
        if config.model.output_bias == "frequency":
            counts = np.stack([self.evaluation[language].counts for language in self.languages]) + 1.0
            frequencies = self.stream.probabilities @ (counts / counts.sum(axis=1, keepdims=True))
            model.head.start_at(torch.from_numpy(np.log(frequencies)))
        return model

    def _monitor(self) -> Monitor:
        config = self.config
        draws = Draws(
            self.corpus, self.languages, self.languages, config=config.conflict,
            row_format=config.data.row_format, seed=config.train.seed, engine=self.engine,
        )  # fmt: skip
        return Monitor(
            self.engine, draws, self.session.output, every=config.conflict.every, sketch=config.conflict.sketch,
            name=f"{config.name}: {config.variant}", seed=config.train.seed, text=Path(config.corpus).name,
        )  # fmt: skip

    def _measure_speed(self) -> None:
        """The FLOPs of an average step's passes and the peak of all ranks, which model FLOPs utilisation compares."""
        config = self.config
        masked = self.stream.batch(0, 0, 1).positions.shape[1]
        length, vocabulary = config.data.sequence_length, self.corpus.vocabulary_size
        row = flops_per_row(config.model, length, vocabulary, masked, config.variant)
        rows, apart = config.train.batch, 1.0
        if config.treatment == "pcgrad":  # a pass for each language that has rows in a step: so many on average
            apart = float(np.sum(1 - (1 - self.stream.probabilities) ** rows))
        self.step_flops = row * rows_passed(config.variant, config.meta, rows, apart=apart, frozen=self.engine.frozen)
        self.peak = peak_flops(self.engine.device, DTYPES[self.precision]) * self.layout.world

    def _fit_micro_batch(self) -> None:
        """Decides how many rows of a pass fit this device, where train.micro_batch=auto leaves it open."""
        if self.config.train.micro_batch != "auto":
            return

        def batches(rows: int) -> list[Batch]:
            train = self.stream.batch(0, 0, rows)
            if not self.validation:
                return [train]
            return [train, self.validation.batch(0, self.stream.language(0), 0, min(rows, self.meta_rows))]

        said = fit_micro_batch(self.engine, self.tried_from, batches, VECTORS["meta" if self.meta else "plain"])
        self.start = "; ".join(filter(None, [self.start, said]))

    def _mfu(self, tokens_per_second: float) -> float:
        """The share of the peak that the products of all passes take, those over validation rows and displaced weights included."""
        steps = self.config.meta.every  # steps of which one is a meta step
        tokens = self.config.rows_seen(steps) / steps * self.config.data.sequence_length
        return tokens_per_second / tokens * self.step_flops / self.peak

    def greeting(self, reason: str) -> str:
        """Describes the run in words, for the screen; `reason`: why it has this precision."""
        return (
            f"{self.config.variant} on {', '.join(self.languages)}: {self.parameters / 1e6:.1f}M parameters, "
            f"{self.layout.data} x {self.layout.tensor} ranks (data x tensor), ZeRO {self.engine.stage}, "
            f"{self.precision} ({reason}); output {self.session.output}\n{self.start}"
        ).rstrip()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _restore(self) -> str:
        """Resume from a checkpoint, or start from the weights of `init`; returns in words which of them it did."""
        config, output = self.config, self.session.output

        def newest() -> Path | None:
            if not config.resume or (config.resume == "auto" and not checkpoint.begun(output)):
                return None
            return checkpoint.find(output if config.resume == "auto" else config.resume)

        path = agreed(newest)  # a shared file system may still list an older one to another host
        if path is None:
            return self._start_from(config.init) if config.init else ""
        saved = checkpoint.verify(path)
        self._refuse_other_settings(path, saved)
        if saved.get("old_pieces"):
            self.engine.train_new_rows(saved["old_pieces"])
        state = checkpoint.load(path, self.engine, state=saved)
        self.history = {language: [tuple(p) for p in points] for language, points in state["history"].items()}
        self.best, self.seconds, self.run_id = state["best"], state["seconds"], state["run_id"]
        self.old_pieces, self.origin = state.get("old_pieces"), state.get("origin", {})
        # a resumed run keeps its size
        self.tried_from = min(self.tried_from, state.get("micro_batch") or self.tried_from)
        if self.meta and not self.meta.radius.fixed:
            self.meta.radius.radius = state["radius"]
        note = ""
        if path.parent.parent.resolve() == output.resolve():
            self.saved_step = self.engine.step
            later = agreed(lambda: checkpoint.set_aside_later(path))
            note = f"; checkpoints of later steps are set aside: {', '.join(p.name for p in later)}" if later else ""
            if self.first and self._mean_loss() == self.best < math.inf:
                checkpoint.mark_best(output, path)  # it may have been killed between saving and marking
        return f"resumed from {path} at step {self.engine.step}{note}"

    def _start_from(self, init: str) -> str:
        """Start from the weights that `init` names; returns in words what is new or left out."""
        config = self.config
        source = initial.weights(init, config.model, self.corpus.tokenizer, self.languages, config.data.only)
        checkpoint.fill(self.engine, source, missing=True)
        if source.new:
            self.old_pieces = source.old
            self.engine.train_new_rows(source.old)
        self.origin = source.start.origin
        note = f"; {source.new} new pieces start at the mean of its {source.old}" if source.new else ""
        if lost := source.left_out(name for name, _ in self.engine.model.named_parameters()):
            note += f"; {len(lost)} of its tensors have no place in this model: {', '.join(lost[:3])}{', ...' * (len(lost) > 3)}"
        return f"starts from the weights of {init}{note}"

    def _refuse_other_settings(self, path: Path, saved: dict[str, Any]) -> None:
        """UserError where a key that decides the data, the model or a step is not as it was in the checkpoint."""
        defaults = flat(RunConfig().model_dump())  # for keys that are newer than the checkpoint
        before = decisive(RunConfig, defaults | flat(with_present_keys(saved["config"])))
        now = decisive(RunConfig, self.config.model_dump())
        if not self.config.reads_meta_rows:  # keys that the run never reads
            now, before = ({k: v for k, v in keys.items() if not k.startswith("meta.")} for keys in (now, before))
        now["languages"], before["languages"] = list(self.languages), saved["languages"]
        now["corpus manifest"], before["corpus manifest"] = self.corpus.manifest_hash, saved["manifest"]
        if changed := differences(now, before):
            raise UserError(
                f"cannot resume {path} with another configuration: {'; '.join(changed)}. "
                "Set these back, or start a new run from its weights with --set init="
            )

    def save(self) -> None:
        """Begin to save this step, as the best one if it was evaluated and none was better."""
        self.engine.settle()
        best = (mean := self._mean_loss()) < self.best
        self.best = min(self.best, mean)
        state = {
            "config": self.config.model_dump(),
            "languages": list(self.languages),
            "manifest": self.corpus.manifest_hash,
            "vocabulary": self.corpus.vocabulary_size,
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
            "run_id": self.records.tracker.run_id,
            "radius": self.meta.radius.radius if self.meta else None,
            "old_pieces": self.old_pieces,
            "micro_batch": self.engine.micro,
            "origin": self.origin,
        }
        files = {"tokenizer.model": self.corpus.folder / "tokenizer.model"}
        if self.records.losses:
            self.records.losses.file.flush()  # a resumed run goes on from this checkpoint
        self.saved_step = self.engine.step
        self.saver.begin(self.engine, state, files, best)

    # -- training ----------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[list[Batch], list[Batch]]]:
        """This rank's micro-batches of every step to come: training, and in a meta step validation."""
        slices = self.engine.slices(self.config.train.batch)
        for step in range(self.engine.step, self.config.train.steps):
            train = [self.stream.batch(step, start, stop) for start, stop in slices]
            validation: list[Batch] = []
            if self.validation and step % self.config.meta.every == 0:
                rows, language = self.engine.slices(self.meta_rows), self.stream.language(step)
                validation = [self.validation.batch(step, language, start, stop) for start, stop in rows]
            if self.engine.device.type != "cpu":  # pinned here, by the thread that prefetches
                train, validation = ([batch.pinned() for batch in batches] for batches in (train, validation))
            yield train, validation

    def seen(self) -> dict[str, dict[str, float]]:
        """What training has seen of each language: rows, tokens and epochs of its text."""
        return self.stream.seen(self.engine.step, self.validation if self.config.meta.reuse else None)

    def step(self, train: list[Batch], validation: list[Batch]) -> Mapping[str, float]:
        """One step of the run's variant; its facts, which the device may still be computing."""
        if self.meta:
            return self.meta.step(train, validation)
        if self.config.treatment == "pcgrad":
            return pcgrad_step(self.engine, train, self.config.train.seed)
        return self.engine.train_step(train)

    def train(self, signals: Signals) -> dict[str, Any]:
        """Train until the last step or until asked to stop, with evaluations and checkpoints; the summary."""
        train, engine = self.config.train, self.engine
        self.records.open(self.languages, self.corpus, self.run_id, engine.step)
        if not self.history[self.languages[0]]:
            self.evaluate()
        bar = tqdm(total=train.steps, initial=engine.step, disable=not self.first, unit="step", mininterval=1)
        rows, before = self.config.rows_seen(engine.step), self.seconds
        with self.saver:
            stopped = self._train_steps(signals, bar)
            bar.close()
            self._record_newest()
            if not stopped:
                self._measure_conflict()
            if self.saved_step != engine.step:
                self.save()
        tokens = (self.config.rows_seen(engine.step) - rows) * self.config.data.sequence_length
        return self._finish(stopped, tokens / (self.seconds - before) if tokens else self._earlier_rate())

    def _earlier_rate(self) -> float:
        """Tokens per second by the output's summary, for a run that had no step left; 0 if it has none."""
        path = self.session.output / "summary.json"
        return float(read_json(path)["tokens_per_second"]) if path.is_file() else 0.0

    def _train_steps(self, signals: Signals, bar: Any) -> str:
        """The steps to come; returns what stopped them before the last one."""
        train, engine = self.config.train, self.engine
        rows, before, clock = self.config.rows_seen(engine.step), self.seconds, time.perf_counter()
        hours, vote = f"train.max_hours={train.max_hours}", StopVote(signals, engine.device)
        for batches, validation in prefetch(self.batches()):
            self._measure_conflict()
            facts = self.step(batches, validation)
            spent = time.perf_counter() - clock
            self.seconds = before + spent
            rate = (self.config.rows_seen(engine.step) - rows) * self.config.data.sequence_length / spent
            if loss := self._after_step(facts, rate):
                bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
            bar.update()
            late = train.max_hours is not None and spent > train.max_hours * 3600
            if stopped := vote.reason({hours: late, "a failed save": self.saver.failed}):
                return stopped
        return ""

    def _after_step(self, facts: Mapping[str, float], rate: float) -> float | None:
        """Record the step before; log, evaluate and save where this one is due. rate: tokens per second.

        A step's facts are read when the next one is launched, so that the device need not wait for the host. Returns the
        loss of the newest step that was read.
        """
        train, step = self.config.train, self.engine.step
        last, loss = step == train.steps, None
        logged = step % LOG_STEPS == 0 or last or "meta/self_check" in facts
        evaluated, saved = (step % n == 0 or last for n in (train.epoch_steps, train.save_steps or train.epoch_steps))
        if self._unrecorded:
            loss = self._record(*self._unrecorded)
        self._unrecorded = (facts, step)
        if logged or evaluated or saved:
            loss = self._record_newest()
        if logged:
            self._log_step(facts, step, rate)
        if evaluated:
            self.evaluate()
        if saved:
            self.save()
        return loss

    def _record_newest(self) -> float | None:
        """Record the newest step, for which this waits."""
        if not self._unrecorded:
            return None
        newest, self._unrecorded = self._unrecorded, None
        return self._record(*newest)

    def _record(self, facts: Mapping[str, float], step: int) -> float:
        self.records.add_losses(facts, step)
        self._meta_facts |= {name: value for name, value in facts.items() if name.startswith("meta/")}
        self._warn(facts, step)
        return facts["loss"]

    def _measure_conflict(self) -> None:
        """Log the similarity of languages' gradients, if it is due at this step; it does not change the training."""
        if self.conflict and self.conflict.due:
            facts = {f"train/{name}": value for name, value in self.conflict.measure().items()}
            self.records.tracker.log(facts, self.engine.step)

    def _warn(self, facts: Mapping[str, float], step: int) -> None:
        """Warn of the first skipped spike, and of finite differences that are noise."""
        if not self.first:
            return
        if self.engine.spiked and not self.warned_of_spike:
            self.warned_of_spike = True
            tqdm.write(
                f"warning: step {step} was skipped: {self.engine.spiked} (train.spike={self.config.train.spike:g}); further "
                "ones are counted in train/skipped"
            )
        if facts.get("meta/self_check", 1.0) < AGREEMENT:
            tqdm.write(
                f"warning: step {step}: the finite difference is noise (two radii agree to a cosine of "
                f"{facts['meta/self_check']:.2f} only): see meta/radius and meta/change in MLflow"
            )

    def _log_step(self, facts: Mapping[str, float], step: int, rate: float) -> None:
        """Log the step's facts, the speed (`rate` in tokens per second) and how much text was seen."""
        if not self.first:
            return
        newest = {**self._meta_facts, **facts}  # those of the last meta step, which need not be this one
        metrics, self._meta_facts = {f"train/{name}": value for name, value in newest.items()}, {}
        metrics["system/tokens_per_second"] = rate
        metrics["system/mfu"] = self._mfu(rate)
        metrics["system/peak_gib"] = peak_memory(self.engine.device) / 2**30
        for language, seen in self.seen().items():
            metrics |= {f"seen/{name}/{language}": seen[name] for name in ("tokens", "epochs")}
        self.records.tracker.log(metrics, step)

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Score every language's validation rows: perplexity and bits per character."""
        step = self.engine.step
        metrics: dict[str, float] = {}
        for language, rows in self.evaluation.items():
            at_once = max(1, min(self.engine.micro, 64))
            loss = self.engine.evaluate(rows.batches(at_once, self.layout.data_rank, self.layout.data))
            perplexity = math.exp(min(loss, 80.0))
            self.history[language].append((step, perplexity))
            metrics[f"eval/perplexity/{language}"] = perplexity
            metrics[f"eval/bits_per_character/{language}"] = rows.bits_per_character(loss)
            metrics[f"eval/unigram_perplexity/{language}"] = self.unigrams[language]
        # The first section of MLflow's charts: it sorts them by name, and puts names without a slash behind all others.
        metrics["eval/mean_perplexity"] = math.exp(self._mean_loss())
        self.records.evaluated(metrics, self.history, self.unigrams, step)

    def _mean_loss(self) -> float:
        """The mean over the languages of this step's validation loss, in nats; infinite if the step was not evaluated."""
        if any(not points or points[-1][0] != self.engine.step for points in self.history.values()):
            return math.inf
        return sum(math.log(points[-1][1]) for points in self.history.values()) / len(self.history)

    def _finish(self, stopped: str, rate: float) -> dict[str, Any]:
        """The summary of the run, recorded; `stopped`: what ended it before its last step. rate: tokens per second."""
        losses = {language: math.log(points[-1][1]) for language, points in self.history.items()}
        summary = {
            "variant": self.config.variant,
            "languages": list(self.languages),
            "steps": self.engine.step,
            "skipped": self.engine.skipped,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": rate,
            "mfu": self._mfu(rate),
            "valid_perplexity": {language: points[-1][1] for language, points in self.history.items()},
            "valid_bits_per_character": {
                language: rows.bits_per_character(losses[language]) for language, rows in self.evaluation.items()
            },
            "unigram_perplexity": self.unigrams,
            "history": self.history,
            "finished": not stopped,
            "stopped_by": stopped,
        }
        figures = self.conflict.draw() if self.conflict else []
        self.records.finish(summary, self.seen(), figures)
        return summary
