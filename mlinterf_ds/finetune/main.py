"""The fine-tuning recipe: read the task, search the grid, train every seed, test, report.

<output>/job.json                 configuration, data and MLflow run
<output>/seed0-batch16-lr0.0005/  a fine-tuning: checkpoints, result.json
<output>/predictions/seed0/sw.tsv in the task's own format
<output>/counts/seed0/sw.csv      right, predicted and gold per example: any sample's score follows from their sums
<output>/report.md, table.md      errors of the first seed; scores
<output>/summary.json
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlinterf_ds.config import decisive, differences, load_config
from mlinterf_ds.data.tokenizer import MANY_UNKNOWN, UNK
from mlinterf_ds.engine.precision import choose_precision, read_json
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import write_json, write_text
from mlinterf_ds.finetune.config import FinetuneConfig
from mlinterf_ds.finetune.report import show, summarise, table
from mlinterf_ds.finetune.trial import Finetuning, Job, Point, Stopped
from mlinterf_ds.pretrained import Pretrained
from mlinterf_ds.ranks import agreed, from_first
from mlinterf_ds.runtime import parallel, session
from mlinterf_ds.tasks import TASKS, Limits
from mlinterf_ds.tasks.sources import SPLITS, Sets, load, parse
from mlinterf_ds.tracking import Tracker, environment_facts

Options = dict[str, dict[str, str]]  # split -> language -> file, 'synthetic' or 'split'


def main(arguments: Sequence[str]) -> int:
    """`deepspeed launch/finetune.py --deepspeed_config ... --set checkpoint=... --train en=... --dev ... --test ...`."""
    parser = session.parser("Fine-tune a pretrained model on a task, and test it.", FinetuneConfig)
    for split in SPLITS:
        parser.add_argument(
            f"--{split}", action="append", default=[], metavar="LANG=FILE", help="or LANG=synthetic; repeatable"
        )
    parser.epilog = "--dev and --test also take LANG=split: a share of --train LANG.\n\n" + (parser.epilog or "")
    found = parser.parse_args(arguments)
    config = load_config(FinetuneConfig, found.recipe, found.set)
    options = {split: parse(getattr(found, split), split) for split in SPLITS}
    run(config, options, read_json(found.deepspeed_config))
    return 0


def run(config: FinetuneConfig, options: Options, deepspeed_json: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune and test as configured; the summary (also written to summary.json by rank 0)."""
    first = os.environ.get("RANK", "0") == "0"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        session.remove_stale_locks()
    with session.hushed():
        layout = parallel.start(config.parallel.tensor, timeout=config.parallel.timeout)
    try:
        output = Path(config.output or from_first(f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"))
        log = output / "log" / f"rank-{layout.rank}.log"
        agreed(lambda: session.forget(log))
        if from_first(not config.resume and (output / "job.json").is_file()):
            raise UserError(f"{output} holds a fine-tuning: continue with --set resume=auto, or choose another output")
        precision, why = choose_precision(config.train.precision, deepspeed_json)
        session.quiet(log)
        with session.noted(log):
            job, sets = prepare(config, options, deepspeed_json, precision, layout)
            if first:
                print(_greeting(job, sets, f"{precision} ({why})", output), flush=True)
            return Search(job, sets, options, output).run()
    finally:
        parallel.stop()


def prepare(
    config: FinetuneConfig, options: Options, deepspeed_json: dict[str, Any], precision: str, layout: parallel.Layout
) -> tuple[Job, Sets]:
    """Read checkpoint and data; every mistake in them is found here, before anything is trained."""
    settings, task = config.finetune, TASKS[config.task]
    for batch in settings.batch:
        if batch % layout.data or (settings.micro_batch and batch // layout.data % settings.micro_batch):
            raise UserError(
                f"finetune.batch={batch} must be divisible by {layout.data} data-parallel ranks, and a rank's rows by "
                f"finetune.micro_batch={settings.micro_batch}"
            )
    pretrained = Pretrained.open(config.checkpoint)
    pretrained.check(layout.tensor)
    length = settings.max_length or pretrained.positions
    if length > pretrained.positions:
        raise UserError(f"finetune.max_length={length}: the model has {pretrained.positions} positions")
    limits = Limits(length, settings.stride or length // 2, settings.max_question or length // 4, settings.max_answer)
    modules = {
        split: {code: serving(config, pretrained, options, split, code) for code in options[split]} for split in SPLITS
    }
    sets = load(
        task,
        options,
        shares={"dev": settings.dev_share, "test": settings.test_share},
        synthetic={"train": settings.synthetic_train, "dev": settings.synthetic_eval, "test": settings.synthetic_eval},
        limit=settings.limit,
    )
    labels = task.labels(list(itertools.chain(*sets.train.values())))
    tokenizer = pretrained.tokenizer()
    rows: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        for language, found in sets.of(split).items():
            rows[split][language], notes = task.rows(found, tokenizer, labels, limits)
            read = rows[split][language]
            share = sum(row.tokens.count(UNK) for row in read) / sum(len(row.tokens) for row in read)
            if share >= MANY_UNKNOWN:
                notes = [*notes, f"{share:.0%} of the pieces are <unk>, not in the vocabulary"]
            sets.notes += [f"{split} {language}: {note}" for note in notes]
    examples = {split: sets.of(split) for split in SPLITS}
    job = Job(config, deepspeed_json, precision, layout, pretrained, task, labels, limits, examples, rows, modules)
    return job, sets


def serving(config: FinetuneConfig, pretrained: Pretrained, options: Options, split: str, language: str) -> int:
    """The index of the language whose modules read this language's rows."""
    settings, known = config.finetune, pretrained.languages
    if settings.unseen and settings.unseen not in known:
        raise UserError(
            f"finetune.unseen={settings.unseen}: the model at {pretrained.path} has no modules for it, it knows "
            f"{', '.join(known)}; choose one of them"
        )
    if split != "train" and settings.route == "source":  # what chooses the epoch is what is tested
        if len(options["train"]) > 1:
            raise UserError(
                f"finetune.route=source needs one training language, --train names {', '.join(options['train'])}: use target"
            )
        split, language = "train", next(iter(options["train"]))
    if language not in known and settings.unseen:
        language = settings.unseen
    if language not in known:
        raise UserError(
            f"--{split} {language}: the model at {pretrained.path} has no modules for {language!r}, it knows "
            f"{', '.join(known)}; choose one of them with --set finetune.unseen=LANG"
            + (", or use the training language's with --set finetune.route=source" if split != "train" else "")
        )
    return known.index(language)


def _greeting(job: Job, sets: Sets, precision: str, output: Path) -> str:
    counts = [
        f"{split} {', '.join(f'{language} {len(examples)}' for language, examples in sets.of(split).items())}"
        for split in SPLITS
    ]
    lines = [f"{job.task.name} from {job.pretrained.path} ({job.pretrained.variant}), {precision}; output {output}"]
    return "\n".join([*lines, "examples: " + "; ".join(counts), *(f"note: {note}" for note in sets.notes)])


class Search:
    """All fine-tunings of one command: the grid with the first seed, then its best point with every other seed."""

    def __init__(self, job: Job, sets: Sets, options: Options, output: Path):
        self.job, self.sets, self.options, self.output = job, sets, options, output
        self.tracker = Tracker.off()

    def run(self) -> dict[str, Any]:
        run_id = self._check_resumed()
        if self.job.first:
            self.output.mkdir(parents=True, exist_ok=True)
            self._open_tracker(run_id)
        status, finished = "FAILED", True
        tested: list[dict[str, Any]] = []
        try:
            with session.Signals() as signals:
                points = self._search(signals)
                tested = [self._test(point, signals) for point in points]
            status = "FINISHED"
        except Stopped as reason:
            status, finished = "KILLED", False
            if self.job.first:
                print(f"stopped by {reason}; go on with --set output={self.output} --set resume=auto", flush=True)
        finally:
            if status != "FINISHED":
                self.tracker.close("KILLED" if status == "KILLED" else "FAILED")
        return self._finish(tested) if finished else {"task": self.job.task.name, "finished": False}

    def _search(self, signals: session.Signals) -> list[Point]:
        """The grid's best point by the dev set, for every seed."""
        settings = self.job.config.finetune
        head_rates: list[float | None] = [*settings.head_lr] if settings.head_lr else [None]
        grid = [
            Point(settings.seeds[0], batch, lr, lr if head_lr is None else head_lr)
            for batch, lr, head_lr in itertools.product(settings.batch, settings.lr, head_rates)
        ]
        best = grid[0]
        if len(grid) > 1:
            scores = [self._train(point, signals).progress.best for point in grid]
            best = grid[scores.index(max(scores))]
            if self.job.first:
                print(f"best of the grid by dev {self.job.task.metric}: {best.name}", flush=True)
        return [Point(seed, best.batch, best.lr, best.head_lr) for seed in settings.seeds]

    def _train(self, point: Point, signals: session.Signals) -> Finetuning:
        gc.collect()  # the last engine's cycles
        found = Finetuning(self.job, point, self.output / point.name, self.tracker)
        with session.hushed(self.output / "log" / f"rank-{self.job.layout.rank}.log"):
            found.prepare()
        found.train(signals)
        return found

    def _test(self, point: Point, signals: session.Signals) -> dict[str, Any]:
        """Predict and score every test set with the best epoch's weights; predictions are written."""
        found = self._train(point, signals)
        with session.hushed(self.output / "log" / f"rank-{self.job.layout.rank}.log"):
            found.load_best()
        facts: dict[str, Any] = {"point": vars(point), "progress": vars(found.progress), "test": {}}
        report = []
        for language in self.job.rows["test"]:
            predictions, task = found.predict("test", language), self.job.task
            if self.job.first:
                examples = self.job.examples["test"][language]
                path = self.output / "predictions" / f"seed{point.seed}" / f"{language}{task.suffix(examples)}"
                task.write(examples, predictions, path)
                facts["test"][language] = task.score(examples, predictions)
                counts = [f"{a:.10g},{b:.10g},{c:.10g}\n" for a, b, c in task.counts(examples, predictions)]
                table = self.output / "counts" / f"seed{point.seed}" / f"{language}.csv"
                write_text(table, "right,predicted,gold\n" + "".join(counts))
                report.append(f"## {language}\n\n{task.report(examples, predictions)}")
                scores = {f"test/{name}/{language}": value for name, value in facts["test"][language].items()}
                self.tracker.log(self.job.logged(point, scores), 0)
        if self.job.first and point.seed == self.job.config.finetune.seeds[0]:
            write_text(self.output / "report.md", f"# Errors of {point.name}\n\n" + "\n".join(report))
        found.close()
        return facts

    def _finish(self, tested: list[dict[str, Any]]) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        if self.job.first:
            summary = summarise(self.job, self.sets, self.options, tested)
            write_json(self.output / "summary.json", summary)
            write_text(self.output / "table.md", table(summary))
            for name in ("summary.json", "table.md", "report.md", "predictions"):
                self.tracker.artifact(self.output / name)
            if not self.job.config.finetune.single:
                name = f"{summary['task']}/test/{summary['metric']}"
                self.tracker.log({f"{name}/{code}": found["mean"] for code, found in summary["scores"].items()}, 0)
            self.tracker.describe(table(summary))
            self.tracker.close("FINISHED")
            print(show(summary, self.output), flush=True)
        return from_first(summary)

    # -- records -----------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a resumed job must not change."""
        kept = decisive(FinetuneConfig, self.job.config.model_dump())
        return kept | {"data": self.sets.origin, "pretrained weights": self.job.pretrained.digest}

    def _check_resumed(self) -> str | None:
        """MLflow's run id of the job that is continued; UserError if it was another job."""
        path = self.output / "job.json"
        text = from_first(path.read_text() if self.job.config.resume and path.is_file() else "")
        if not text:
            return None
        ours = json.loads(json.dumps(self._identity()))
        with refusing(f"{path}: not what a fine-tuning writes", "; choose another output"):
            saved = json.loads(text)
            theirs, run_id = dict(saved["identity"]), saved["run_id"]
        differ = differences(ours, theirs)
        if differ:
            raise UserError(
                f"cannot resume {self.output} with other settings: {'; '.join(differ)}. Choose another output"
            )
        return run_id

    def _open_tracker(self, run_id: str | None) -> None:
        job = self.job
        self.tracker = Tracker.start(
            enabled=job.config.tracking.enabled,
            experiment=job.config.tracking.experiment,
            name=self.output.name,
            folder=self.output,
            parameters=job.config.model_dump() | {"data": self.options},
            tags=environment_facts()
            | {"task": job.task.name, "variant": job.pretrained.saved["config"]["variant"]}
            | job.config.tracking.tags,
            run_id=run_id,
            parent_id=job.pretrained.run_id or job.config.tracking.parent,
        )
        record = {"identity": self._identity(), "run_id": self.tracker.run_id, "config": job.config.model_dump()}
        write_json(self.output / "job.json", record)
