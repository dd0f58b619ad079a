"""The search over a fine-tuning job's grid, the test of the best point with every seed, and the job's records."""

from __future__ import annotations

import gc
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mlinterf_ds.config import REMOVED, decisive, differences
from mlinterf_ds.engine import checkpoint
from mlinterf_ds.errors import UserError, refusing, resumption
from mlinterf_ds.files import read_json, sha256, write_json, write_text
from mlinterf_ds.finetune.config import FinetuneConfig
from mlinterf_ds.finetune.report import show, summarise, table
from mlinterf_ds.finetune.trial import FinetuneJob, Stopped, Trial
from mlinterf_ds.pretrained import Point
from mlinterf_ds.ranks import from_first
from mlinterf_ds.runtime.output import hushed
from mlinterf_ds.runtime.session import Session
from mlinterf_ds.runtime.signals import Signals
from mlinterf_ds.tracking import Tracker, dataset, environment_facts


class Search:
    """All fine-tunings of one command: the grid with the first seed, then its best point with every other seed."""

    def __init__(self, job: FinetuneJob, session: Session):
        self.job, self.output, self.log = job, session.output, session.log
        self.tracker = Tracker.off()

    def run(self) -> dict[str, Any]:
        """Train, test and report; the summary, or {"finished": False} if the job was asked to end before."""
        run_id = self._check_resumed()
        if self.job.first:
            self.output.mkdir(parents=True, exist_ok=True)
            self._open_tracker(run_id)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        try:
            with Signals() as signals:
                tested = [self._test(point, signals) for point in self._search(signals)]
            status = "FINISHED"
        except Stopped as reason:
            status = "KILLED"
            if self.job.first:
                print(f"stopped by {reason}; {resumption(self.output)}", flush=True)
        finally:
            if status != "FINISHED":
                self.tracker.close(status)
        return self._finish(tested) if status == "FINISHED" else {"task": self.job.task.name, "finished": False}

    def _search(self, signals: Signals) -> list[Point]:
        """The grid's best point by the dev set, for every seed."""
        settings = self.job.config.finetune
        grid = [
            Point(settings.seeds[0], batch, lr, head_lr)
            for batch, lr in itertools.product(settings.batch, settings.lr)
            for head_lr in settings.head_lr or [lr]
        ]
        best = grid[0]
        if len(grid) > 1:
            scores = []
            for point in grid:
                trial = self._train(point, signals)
                self._close(trial, "FINISHED")
                scores.append(trial.progress.best)
                del trial  # else its engine would stay beside the next point's
            best = grid[scores.index(max(scores))]
            if self.job.first:
                print(f"best of the grid by dev {self.job.task.metric}: {best.name}", flush=True)
        return [replace(best, seed=seed) for seed in settings.seeds]

    def _train(self, point: Point, signals: Signals) -> Trial:
        gc.collect()  # frees the last engine, which holds reference cycles
        trial = Trial(self.job, point, self.output / point.name, self._tracker_of(point))
        try:
            if not trial.trained:  # else it is trained already
                with hushed(self.log):
                    _ = trial.engine
            trial.train(signals)
        except BaseException as error:
            self._close(trial, "KILLED" if isinstance(error, Stopped) else "FAILED")
            raise
        return trial

    def _test(self, point: Point, signals: Signals) -> dict[str, Any]:
        """Predict and score every test set with the best epoch's weights; predictions are written."""
        trial = self._train(point, signals)
        with hushed(self.log):
            trial.load_best()
        facts: dict[str, Any] = {"point": vars(point), "progress": vars(trial.progress), "test": {}}
        report = []
        for language in self.job.rows["test"]:
            predictions, task = trial.predict("test", language), self.job.task
            if self.job.first:
                examples = self.job.sets.examples["test"][language]
                path = self.output / "predictions" / f"seed{point.seed}" / f"{language}{task.suffix(examples)}"
                task.write(examples, predictions, path)
                facts["test"][language] = task.score(examples, predictions)
                counts = [f"{a:.10g},{b:.10g},{c:.10g}\n" for a, b, c in task.counts(examples, predictions)]
                table = self.output / "counts" / f"seed{point.seed}" / f"{language}.csv"
                write_text(table, "right,predicted,gold\n" + "".join(counts))
                known = {"the model": facts["test"][language]} | self.job.baselines.get(language, {})
                scored = "; ".join(f"{name} {scores[task.metric]:.1f}" for name, scores in known.items() if scores)
                heading = f"## {language}\n\n{task.metric}: {scored or 'not scored'}\n\n"
                report.append(heading + task.report(examples, predictions))
                scores = {f"test/{name}/{language}": value for name, value in facts["test"][language].items()}
                trial.tracker.log(self.job.logged(scores), 0)
        if self.job.first and point.seed == self.job.config.finetune.seeds[0]:
            write_text(self.output / "report.md", f"# Errors of {point.name}\n\n" + "\n".join(report))
        self._close(trial, "FINISHED")
        return facts

    def _finish(self, tested: list[dict[str, Any]]) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        if self.job.first:
            summary = summarise(self.job, tested)
            write_json(self.output / "summary.json", summary)
            write_text(self.output / "table.md", table(summary))
            for name in ("summary.json", "table.md", "report.md", "predictions"):
                self.tracker.artifact(self.output / name)
            values = {
                f"{baseline}/{name}/{code}": value
                for code, baselines in summary["baselines"].items()
                for baseline, scores in baselines.items()
                for name, value in scores.items()
            }
            if not self.job.config.finetune.single:
                for code, scores in summary["metrics"].items():
                    values |= {f"test/{name}/{code}": score["mean"] for name, score in scores.items()}
            self.tracker.log(self.job.logged(values), 0)
            self.tracker.describe(table(summary))
            self.tracker.close("FINISHED")
            print(show(summary, self.output), flush=True)
        return from_first(summary)

    # -- records -----------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """The settings that a resumed job must not change."""
        kept = decisive(FinetuneConfig, self.job.config.model_dump())
        return kept | {
            "data": self.job.sets.origin,
            "pretrained weights": sha256(self.job.pretrained.path / "complete.json"),
        }

    def _check_resumed(self) -> str | None:
        """Returns MLflow's run id of the job that is resumed. UserError if the folder holds another job."""
        path = self.output / "job.json"
        text = from_first(path.read_text("utf-8") if self.job.config.resume and path.is_file() else "")
        if not text:
            return None
        now = json.loads(json.dumps(self._identity()))
        with refusing(f"{path}: not what a fine-tuning writes", "; choose another output"):
            saved = json.loads(text)
            defaults = FinetuneConfig.model_validate({"checkpoint": "-"}).model_dump()  # for keys newer than the job
            kept = {key: value for key, value in saved["identity"].items() if key not in REMOVED}
            before = decisive(FinetuneConfig, defaults) | kept
            run_id = saved["run_id"]
        if changed := differences(now, before):
            raise UserError(
                f"cannot resume {self.output} with other settings: {'; '.join(changed)}. Choose another output"
            )
        return run_id

    def _tracker_of(self, point: Point) -> Tracker:
        """The tracker of a fine-tuning: the job's, or of several a run of its own under the job's, with the same metrics."""
        job, folder = self.job, self.output / point.name
        if job.config.finetune.single or not job.first:
            return self.tracker
        saved = checkpoint.find(folder) / "run.json" if checkpoint.begun(folder) else None
        return Tracker.start(
            enabled=job.config.tracking.enabled,
            experiment=job.config.tracking.experiment,
            name=f"{self.output.name}/{point.name}",
            folder=folder,
            parameters=vars(point) | {"checkpoint": job.config.checkpoint, "task": job.task.name},
            tags=self._tags(),
            run_id=read_json(saved)["run_id"] if saved else None,
            parent_id=self.tracker.run_id,
        )

    def _close(self, trial: Trial, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Ends the run of one of several fine-tunings."""
        if trial.tracker is not self.tracker:
            trial.tracker.close(status)

    def _tags(self) -> dict[str, str]:
        job = self.job
        variant = job.pretrained.saved["config"]["variant"]
        return environment_facts() | {"task": job.task.name, "variant": variant} | job.config.tracking.tags

    def _open_tracker(self, run_id: str | None) -> None:
        job = self.job
        self.tracker = Tracker.start(
            enabled=job.config.tracking.enabled,
            experiment=job.config.tracking.experiment,
            name=self.output.name,
            folder=self.output,
            parameters=job.config.model_dump() | {"data": job.options},
            tags=self._tags(),
            run_id=run_id,
            parent_id=job.pretrained.saved.get("run_id") or job.config.tracking.parent,
            about=f"Fine-tuning of {job.pretrained.path} ({job.pretrained.run_variant}) on {job.task.name}",
            datasets=[
                dataset(
                    Path(source),
                    job.sets.origin.get(f"{split} {language}", "").removeprefix(f"{Path(source).name}, sha256 "),
                    split,
                )
                for split, sources in job.options.items()
                for language, source in sources.items()
            ],
        )
        record = {"identity": self._identity(), "run_id": self.tracker.run_id, "config": job.config.model_dump()}
        write_json(self.output / "job.json", record)
