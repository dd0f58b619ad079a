"""One pretraining run on one rank: state, loop, evaluation, records."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from mlinterf_ds.analysis.conflict import Monitor
from mlinterf_ds.config import decisive, differences, flat, without_removed
from mlinterf_ds.data.batch import Batch
from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.data.evaluation import EvaluationSet
from mlinterf_ds.data.stream import TrainStream, ValidationStream, prefetch
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.engine.engine import Engine
from mlinterf_ds.engine.meta_step import AGREEMENT, MetaStep
from mlinterf_ds.engine.pcgrad import pcgrad_step
from mlinterf_ds.engine.precision import DTYPES
from mlinterf_ds.engine.space import NewRows
from mlinterf_ds.engine.throughput import flops_per_row, peak_flops, peak_memory
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_text
from mlinterf_ds.model.encoder import SHARED
from mlinterf_ds.plots.curves import perplexity_curves
from mlinterf_ds.pretrain import initial, report
from mlinterf_ds.pretrain.config import RunConfig
from mlinterf_ds.pretrain.losses import LossTable
from mlinterf_ds.ranks import agreed
from mlinterf_ds.runtime import parallel, session
from mlinterf_ds.tracking import Tracker, environment_facts

LOG_STEPS = 10  # steps between points of the training curves


class Job:
    """One pretraining run on this rank."""

    def __init__(
        self,
        config: RunConfig,
        deepspeed_json: dict[str, Any],
        precision: str,
        layout: parallel.Layout,
        corpus: Corpus,
        output: Path,
    ):
        from mlinterf_ds.model.encoder import Encoder, partition_dim

        self.config, self.layout, self.corpus, self.output = config, layout, corpus, output
        self.first = layout.rank == 0
        data, train = config.data, config.train
        self.languages = tuple(config.languages or corpus.languages)
        if config.variant == "mono" and len(self.languages) > 1:
            raise UserError(
                f"variant=mono takes one language, the corpus has {', '.join(self.languages)}: --set languages=..."
            )
        self.stream = TrainStream(
            corpus,
            self.languages,
            rows=train.batch,
            length=data.sequence_length,
            seed=train.seed,
            temperature=data.temperature,
            mixed=data.mixed,
            mask_share=data.mask,
            only=data.only,
        )
        self.evaluation = {
            language: EvaluationSet(
                corpus,
                language,
                "valid",
                languages=self.languages,
                length=data.sequence_length,
                max_rows=data.eval_rows,
                mask_share=data.mask,
            )
            for language in self.languages
        }
        model = Encoder(
            config.model,
            variant=config.routing,
            languages=self.languages,
            vocabulary=corpus.vocabulary_size,
            positions=data.sequence_length,
            seed=train.seed,
        )
        if config.model.output_bias == "frequency":
            counts = np.stack([self.evaluation[language].counts for language in self.languages]) + 1.0
            frequencies = self.stream.probabilities @ (counts / counts.sum(axis=1, keepdims=True))
            model.head.start_at(torch.from_numpy(np.log(frequencies)))
        split = [partition_dim(parameter) is not None for parameter in model.parameters()]
        copies = [layout.tensor if cut else 1 for cut in split]
        self.parameters = sum(n * p.numel() for n, p in zip(copies, model.parameters(), strict=True))
        self.engine = Engine(model, train, deepspeed_json, precision, layout)
        self._prepare_meta()
        self.history: dict[str, list[tuple[int, float]]] = {language: [] for language in self.languages}
        self.best, self.seconds, self.run_id = math.inf, 0.0, None
        self.tracker, self.tracker_open, self.resumed = Tracker.off(), False, ""
        self.losses: LossTable | None = None
        self.old_pieces: int | None = None  # of the vocabulary that this run's extends
        self._restore()
        if train.freeze == "shared" and self.old_pieces:
            self.engine.new_rows = NewRows(self.engine.spaces[SHARED], self.old_pieces, layout.tensor_rank)
        self.conflict = None
        if config.conflict.every:
            self.conflict = Monitor(
                self.engine,
                corpus,
                self.languages,
                config.conflict,
                output,
                name=f"{config.name}: {config.variant}",
                length=data.sequence_length,
                mask_share=data.mask,
                seed=train.seed,
                text=Path(config.corpus).name,
            )
        masked = self.stream.batch(0, 0, 1).positions.shape[1]
        self.row_flops = flops_per_row(
            config.model,
            data.sequence_length,
            corpus.vocabulary_size,
            masked,
            adapters=config.variant.endswith("adpt"),
        )
        self.peak = peak_flops(self.engine.device, DTYPES[precision]) * layout.world

    def _prepare_meta(self) -> None:
        """The meta variants' step, and the stream of their validation loss."""
        config = self.config
        self.meta: MetaStep | None = None
        if not config.variant.startswith("meta_"):
            return
        if len(self.languages) < 2:
            raise UserError(f"variant={config.variant} needs two languages or more, here is only {self.languages[0]}")
        self.meta = MetaStep(self.engine, config.meta)
        self.meta_rows = config.meta.batch or config.train.batch
        if self.meta_rows % self.layout.data:
            raise UserError(f"meta.batch={self.meta_rows} is not divisible by {self.layout.data} data-parallel ranks")
        self.validation = ValidationStream(
            self.corpus,
            self.languages,
            rows=self.meta_rows,
            length=config.data.sequence_length,
            seed=config.train.seed,
            languages_per_step=config.meta.languages_per_step,
            mask_share=config.data.mask,
        )

    # -- state ---------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        config = self.config
        begun = any((self.output / "checkpoints").glob("step-*"))  # else it was stopped before its first checkpoint
        if not config.resume or (config.resume == "auto" and not begun):
            if config.init:
                source = initial.weights(config.init, config.model, self.corpus.tokenizer, self.languages)
                checkpoint.fill(self.engine, source, missing=True)
                self.old_pieces = source.old if source.new else None
                grown = f"; {source.new} new pieces start at the mean of its {source.old}" if source.new else ""
                self.resumed = f"starts from the weights of {config.init}{grown}"
            return
        path = checkpoint.find(self.output if config.resume == "auto" else config.resume)
        saved = agreed(lambda: checkpoint.verify(path))
        self._compare(path, saved)
        state = checkpoint.load(path, self.engine, state=saved)
        self.history = {language: [tuple(p) for p in points] for language, points in state["history"].items()}
        self.best, self.seconds, self.run_id = state["best"], state["seconds"], state["run_id"]
        self.old_pieces = state.get("old_pieces")
        if self.meta and not self.meta.radius.fixed:
            self.meta.radius.radius = state["radius"]
        if self.first and path.parent.parent == self.output and self._mean_loss() == self.best < math.inf:
            checkpoint.mark_best(self.output, path)  # it may have been killed between the two
        self.resumed = f"resumed from {path} at step {self.engine.step}"

    def _compare(self, path: Path, saved: dict[str, Any]) -> None:
        """Refuse to continue another run: every key that decides data, model or step must be as it was."""
        now, before = self.config.model_dump(), flat(RunConfig().model_dump()) | flat(without_removed(saved["config"]))  # type: ignore[call-arg]
        ours, theirs = (
            decisive(RunConfig, now),
            decisive(RunConfig, before),
        )  # a key newer than the checkpoint had its default
        ours["languages"], theirs["languages"] = list(self.languages), saved["languages"]
        ours["corpus manifest"], theirs["corpus manifest"] = self.corpus.manifest_hash, saved["manifest"]
        differ = differences(ours, theirs)
        if differ:
            raise UserError(
                f"cannot resume {path} with another configuration: {'; '.join(differ)}. "
                "Set these back, or start a new run from its weights with --set init="
            )

    def save(self) -> None:
        """A checkpoint of this step; the run's best, if this step was evaluated and none was better."""
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
            "run_id": self.tracker.run_id,
            "radius": self.meta.radius.radius if self.meta else None,
            "old_pieces": self.old_pieces,
        }
        files = {"tokenizer.model": self.corpus.folder / "tokenizer.model"}
        if self.losses:
            self.losses.flush()  # a run that goes on from here finds every step before it
        path = checkpoint.save(self.output, self.engine, state, files, self.config.train.keep)
        if best and self.first:
            checkpoint.mark_best(self.output, path)

    # -- training ------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[list[Batch], list[Batch]]]:
        """This rank's micro-batches of every step to come: training, and (in a meta step) validation."""
        slices = self.engine.slices(self.config.train.batch)
        for step in range(self.engine.step, self.config.train.steps):
            train = [self.stream.batch(step, start, stop) for start, stop in slices]
            validation: list[Batch] = []
            if self.meta and step % self.config.meta.every == 0:
                (language,) = train[0].step_languages
                rows = self.engine.slices(self.meta_rows)
                validation = [self.validation.batch(step, language, start, stop) for start, stop in rows]
            yield train, validation

    def step(self, train: list[Batch], validation: list[Batch]) -> dict[str, float]:
        """One step of the run's variant."""
        if self.meta:
            return self.meta.step(train, validation)
        if self.config.treatment == "pcgrad":
            return pcgrad_step(self.engine, train, self.config.train.seed)
        return self.engine.train_step(train)

    def train(self, signals: session.Signals) -> dict[str, Any]:
        """The loop: steps, evaluations, checkpoints; ends with the summary."""
        config, engine = self.config, self.engine
        self._open_tracker()
        if not self.history[self.languages[0]]:
            self.evaluate()
        bar = tqdm(total=config.train.steps, initial=engine.step, disable=not self.first, unit="step", mininterval=1)
        stopped, clock, started_at, saved = "", time.perf_counter(), engine.step, -1
        before, told = self.seconds, False
        for train, validation in prefetch(self.batches()):
            self._measure_conflict()
            facts = self.step(train, validation)
            step, self.seconds = engine.step, before + time.perf_counter() - clock
            self._note_loss(facts, step)
            rate = (step - started_at) * config.train.batch * config.data.sequence_length / (self.seconds - before)
            bar.set_postfix_str(f"loss {facts['loss']:.3f}, {rate:,.0f} tokens/s", refresh=False)
            bar.update()
            if step % LOG_STEPS == 0 or step == config.train.steps or "meta/self_check" in facts:
                self._log_step(facts, step, rate)
            if self.first and engine.spiked and not told:
                told = True
                tqdm.write(
                    f"warning: step {step} was skipped: {engine.spiked} (train.spike={config.train.spike:g}); further ones "
                    "are counted in train/skipped"
                )
            if self.first and facts.get("meta/self_check", 1.0) < AGREEMENT:
                tqdm.write(
                    f"warning: step {step}: the finite difference is noise (two radii agree to a cosine of "
                    f"{facts['meta/self_check']:.2f} only): see meta/radius and meta/change in MLflow"
                )
            if step % config.train.epoch_steps == 0 or step == config.train.steps:
                self.evaluate()
            if step % (config.train.save_steps or config.train.epoch_steps) == 0 or step == config.train.steps:
                saved = step
                self.save()
            stopped = self._stop_reason(signals, self.seconds - before)
            if stopped:
                break
        bar.close()
        if not stopped:
            self._measure_conflict()
        if saved != engine.step:
            self.save()
        return self._finish(stopped, (engine.step - started_at) / max(1e-9, self.seconds - before))

    def _measure_conflict(self) -> None:
        """Languages' gradient similarity at this step, if it is due; training is not touched by it."""
        if self.conflict and self.conflict.due:
            self.tracker.log(self.conflict.measure(), self.engine.step)

    def _stop_reason(self, signals: session.Signals, seconds: float) -> str:
        """Why all ranks stop now, `seconds` after they began ('' to go on); a signal on any rank counts."""
        hours = self.config.train.max_hours
        late = hours is not None and seconds > hours * 3600
        flags = torch.tensor([float(late), float(signals.received is not None)], device=self.engine.device)
        if self.layout.world > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        if flags[1]:
            return signals.received or "a signal to another rank"
        return f"train.max_hours={hours}" if flags[0] else ""

    def evaluate(self) -> None:
        """Validation perplexity and bits per character of every language; warns of rising ones."""
        step = self.engine.step
        metrics: dict[str, float] = {}
        for language, found in self.evaluation.items():
            rows = max(1, min(self.engine.micro, 64))
            loss = self.engine.evaluate(found.batches(rows, self.layout.data_rank, self.layout.data))
            self.history[language].append((step, math.exp(min(loss, 80.0))))
            metrics[f"valid/perplexity/{language}"] = self.history[language][-1][1]
            metrics[f"valid/bits_per_character/{language}"] = found.bits_per_character(loss)
        self.tracker.log(metrics, step)
        if self.first:
            shown = ", ".join(f"{language} {points[-1][1]:.2f}" for language, points in self.history.items())
            tqdm.write(f"step {step}: validation perplexity {shown}")
            for language, points in self.history.items():
                last = [value for _, value in points[-4:]]
                if len(last) == 4 and last == sorted(last) and last[0] < last[-1]:
                    tqdm.write(f"warning: {language} has risen for three evaluations: its corpus is being overfitted")
            baselines = {language: found.unigram_perplexity() for language, found in self.evaluation.items()}
            path = self.output / "perplexity.png"
            title = f"{self.config.name}: {self.config.variant}"
            perplexity_curves(self.history, path, title=title, baselines=baselines)
            self.tracker.artifact(path)

    def _mean_loss(self) -> float:
        """Of this step's evaluation: nats, the mean over the languages; infinite if it was not evaluated."""
        if any(not points or points[-1][0] != self.engine.step for points in self.history.values()):
            return math.inf
        return sum(math.log(points[-1][1]) for points in self.history.values()) / len(self.history)

    # -- records -------------------------------------------------------------------------------------------------

    def _open_tracker(self) -> None:
        if not self.first:
            return
        config = self.config
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "config.json").write_text(json.dumps(config.model_dump(), indent=1) + "\n")
        facts = environment_facts() | {"corpus manifest": self.corpus.manifest_hash}
        self.tracker = Tracker.start(
            enabled=config.tracking.enabled,
            experiment=config.tracking.experiment,
            name=self.output.name,
            folder=self.output,
            parameters=config.model_dump() | {"languages": ",".join(self.languages)},
            tags=facts
            | {"variant": config.variant, "languages": ",".join(self.languages), "seed": str(config.train.seed)}
            | config.tracking.tags,
            run_id=self.run_id,
            parent_id=config.tracking.parent,
        )
        self.tracker_open = True
        self.losses = LossTable(self.output / "train.csv", self.engine.step)
        self.tracker.artifact(self.output / "config.json")
        self.tracker.artifact(self.corpus.folder / "tokenizer.model")

    def _note_loss(self, facts: dict[str, float], step: int) -> None:
        """The step's line of train.csv."""
        if self.losses:
            losses = {name.removeprefix("loss/"): v for name, v in facts.items() if name.startswith("loss/")}
            tokens = step * self.config.train.batch * (self.config.data.sequence_length - 1)
            self.losses.add(step, losses, facts["lr"], tokens)

    def _log_step(self, facts: dict[str, float], step: int, rate: float) -> None:
        if not self.first:
            return
        metrics = {f"train/{name}": value for name, value in facts.items()}
        metrics["speed/tokens_per_second"] = rate
        metrics["speed/mfu"] = rate / self.config.data.sequence_length * self.row_flops / self.peak
        metrics["memory/peak_gib"] = peak_memory(self.engine.device) / 2**30
        for language, seen in self.stream.seen(step).items():
            metrics[f"seen/tokens/{language}"] = seen["tokens"]
            metrics[f"seen/epochs/{language}"] = seen["epochs"]
        self.tracker.log(metrics, step)

    def _finish(self, stopped: str, steps_per_second: float) -> dict[str, Any]:
        config = self.config
        rows = steps_per_second * config.train.batch
        summary = {
            "variant": config.variant,
            "languages": list(self.languages),
            "steps": self.engine.step,
            "skipped": self.engine.skipped,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": rows * config.data.sequence_length,
            "mfu": rows * self.row_flops / self.peak,
            "valid_perplexity": {language: points[-1][1] for language, points in self.history.items()},
            "valid_bits_per_character": {
                language: found.bits_per_character(math.log(self.history[language][-1][1]))
                for language, found in self.evaluation.items()
            },
            "unigram_perplexity": {language: found.unigram_perplexity() for language, found in self.evaluation.items()},
            "history": self.history,
            "finished": not stopped,
            "stopped_by": stopped,
        }
        if self.first:
            write_text(self.output / "summary.json", json.dumps(summary, indent=1) + "\n")
            self.tracker.artifact(self.output / "summary.json")
            if self.losses:
                self.losses.close()
                self.tracker.artifact(self.output / "train.csv")
            for path in self.conflict.draw() if self.conflict else []:
                self.tracker.artifact(path)
            self.tracker.describe(report.description(summary))
            browse = self.tracker.browse() if config.tracking.enabled else ""
            report.show(summary, self.stream.seen(self.engine.step), self.output, browse)
            self.tracker.close("KILLED" if stopped and not stopped.startswith("train.") else "FINISHED")
            self.tracker_open = False
        return summary
