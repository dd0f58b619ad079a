"""The study command: plan a grid of models, run it, and report on it.

<output>/corpora/        the text of every model, under one vocabulary
<output>/jobs/NAME-HASH/ a job: job.json, launch.log, done.json, and a folder for each unit with its summary.json
<output>/records.json    the results of all jobs
<output>/tables/         tables 1 to 7: .md, .csv, .tex
<output>/figures/        convergence of plain and meta adapters (figure 4c)
<output>/findings.md, findings.json
<output>/report.html     all of it on one page
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlinterf_ds.config import describe, load_config
from mlinterf_ds.config import parser as launcher_parser
from mlinterf_ds.errors import UserError, refusing
from mlinterf_ds.files import read_json, write_json
from mlinterf_ds.results.findings import Finding
from mlinterf_ds.study import cost, mlflow_run, plan, report, runner, sequential, slurm, worker
from mlinterf_ds.study.config import AnalysisSection, SetSection, StudyConfig, TaskSection
from mlinterf_ds.study.corpora import Corpora
from mlinterf_ds.study.folders import Outcome, last_known, read_outcome, try_lock, write_job
from mlinterf_ds.study.jobs import Job
from mlinterf_ds.tracking import Tracker
from mlinterf_ds.tracking.__main__ import send_rest
from mlinterf_ds.tracking.facts import first_line

LOOKS = "looks.json"  # what the looks of --until-decided have decided
ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str]) -> int:
    """`python launch/study.py --recipe launch/recipes/study_cpu.toml [--dry-run]`; 1 if a job failed."""
    options = _parser().parse_args(arguments)
    if options.job:
        return worker.work(options.job)
    study = Study(load_config(StudyConfig, options.recipe, options.set), options.deepspeed_config)
    if options.gpus is not None and not options.dry_run:
        raise UserError(
            f"--gpus {options.gpus} plans for another machine: add --dry-run, or leave it out to run the study on this one"
        )
    if options.dry_run:
        print(study.show(by_job=True, gpus=options.gpus), study.power(), sep="\n")
        return 0
    if options.report:
        return _as_last_seen(study).report_alone()
    if options.until_decided is not None:
        if options.executor != "local" or not options.until_decided > 0:
            raise UserError(
                f"--until-decided {options.until_decided:g} --executor {options.executor}: give hours above 0, and run the study "
                "on this machine (--executor local): Slurm's queue would hide how long a seed takes"
            )
        return _until_decided(study, options.until_decided)
    if options.executor == "local":
        return study.run()
    own_arguments = [word for recipe in options.recipe for word in ("--recipe", recipe)]
    own_arguments += [word for setting in options.set for word in ("--set", setting)]
    return study.submit([*own_arguments, "--deepspeed_config", study.deepspeed_config])


def _parser() -> argparse.ArgumentParser:
    parser = launcher_parser("Run a grid of models, fine-tunings and analyses, and report on it.", StudyConfig)
    for name, section in (("sets", SetSection), ("tasks", TaskSection), ("analyses", AnalysisSection)):
        parser.epilog = f"{parser.epilog}\n\nkeys of each [[{name}]] in a recipe:\n{describe(section)}"
    parser.set_defaults(deepspeed_config="ds_configs/zero1.json")
    parser.add_argument(
        "--dry-run", action="store_true", help="show the jobs and their estimated cost, and run nothing"
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="with --dry-run: the cost on N GPUs like an H100, wherever this is run"
    )
    parser.add_argument(
        "--report", action="store_true", help="only make tables, findings and report of the jobs that have finished"
    )
    parser.add_argument(
        "--until-decided",
        type=float,
        metavar="HOURS",
        help="add seeds, one at a time, for as long as claims are open that more seeds could decide; every look at the results is held to a stricter level",
    )
    parser.add_argument("--executor", choices=("local", "slurm"), default="local", help="run here, or submit to Slurm")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # given to the processes of a job
    return parser


def _as_last_seen(study: Study) -> Study:
    """The study with the seeds and the level of the last look of --until-decided, and the verdicts so far, if there was one."""
    path = study.output / LOOKS
    if not path.is_file():
        return study
    with refusing(f"{path}: not what --until-decided writes"):
        looks = read_json(path)
        config = study.config.model_copy(update=looks["last"])
        decided: sequential.Decided = looks["decided"]
    return Study(config, study.deepspeed_config, decided)


def _until_decided(study: Study, hours: float) -> int:
    """Runs the study with more and more seeds; 1 if a job failed."""
    failed = 0

    def look(seeds: list[int], confidence: float, decided: sequential.Decided) -> Sequence[Finding]:
        nonlocal failed
        config = study.config.model_copy(update={"seeds": seeds, "confidence": confidence})
        again = Study(config, study.deepspeed_config, decided)
        failed |= again.run()
        return again.findings

    def record(looks: sequential.Looks, seeds: list[int], confidence: float) -> None:
        last = {"seeds": seeds, "confidence": confidence}
        write_json(study.output / LOOKS, {"decided": looks.decided, "open": looks.open, "last": last})

    looks = sequential.until_decided(look, study.config.seeds, study.config.confidence, hours, record)
    print(f"{len(looks.decided)} claims are decided over all looks, {len(looks.open)} are open: {study.output}/{LOOKS}")
    return failed


class Study:
    """A study's configuration, corpora and jobs. decided: what earlier looks at it have decided."""

    def __init__(self, config: StudyConfig, deepspeed_config: str, decided: sequential.Decided | None = None):
        self.decided = decided or {}
        self.config, self.output = config, Path(config.output or f"runs/{config.name}").resolve()
        given = Path(deepspeed_config)
        path = given if given.is_file() else ROOT / given
        if not path.is_file():
            raise UserError(f"--deepspeed_config {given}: no such file; the shipped ones are in ds_configs/")
        self.deepspeed_config = str(path.resolve())
        self.corpora = Corpora(config, self.output)
        self.jobs = plan.expand(config, self.corpora, self.deepspeed_config)
        self.findings: Sequence[Finding] = ()  # of the last report

    def show(self, by_job: bool = False, gpus: int | None = None) -> str:
        """The jobs and their estimated cost as text. gpus: on so many GPUs instead of this machine; UserError for too few."""
        if gpus is not None:
            if gpus < self.config.ranks:
                raise UserError(
                    f"--gpus {gpus}: a job of this study has ranks={self.config.ranks}: name at least as many GPUs"
                )
            return cost.show(self.jobs, self.output, gpus // self.config.ranks, by_job, cost.GPU, elsewhere=True)
        slots = runner.slots(self.config)
        return cost.show(self.jobs, self.output, len(slots), by_job, cost.GPU if slots[0].accelerators else cost.CPU)

    def power(self) -> str:
        """Says which effects the study could detect, by its own findings so far or else the recipe's pilot; '' without both."""
        from mlinterf_ds.results import claims
        from mlinterf_ds.results.records import Records

        names = {finding.name for finding in claims.all_findings(Records(source=self.config.source))}
        if unknown := sorted(self.config.pilot.keys() - names):
            raise UserError(f"pilot: {', '.join(unknown)}: no such claim; the claims are {', '.join(sorted(names))}")
        pilot = {name: cost.Spread(of_seeds) for name, of_seeds in self.config.pilot.items()}
        known = cost.spreads(self.output / "findings.json") or pilot
        return cost.show_power(known, len(self.config.seeds), self.config.confidence) if known else ""

    def run(self) -> int:
        """Run on this machine what has not finished, then report; 1 if a job failed."""
        with self._started() as tracker:
            try:
                outcomes = runner.run(self.jobs, self.config, self.output, self._writer(tracker))
            except KeyboardInterrupt:
                print("stopped; the same command continues from here", flush=True)
                raise
            return self._conclude(outcomes, tracker, [])

    def submit(self, own_arguments: Sequence[str]) -> int:
        """Submit to Slurm what has not finished, and a last batch job that reports.

        own_arguments: of this study's command, which the last batch job repeats.
        """
        with self._started() as tracker:
            ids = slurm.submit(self.jobs, self.config, self.output, self._writer(tracker), own_arguments)
            write_json(self.output / "slurm.json", ids)
            print(f"submitted {len(ids) - 1} jobs and the report ({ids['report']}); see {self.output}/slurm.json")
        return 0

    @contextlib.contextmanager
    def _started(self) -> Iterator[Tracker]:
        """Hold the study's folder, prepare the text, show the plan, and open the study's run in MLflow."""
        with try_lock(self.output) as free:
            if not free:
                raise UserError(f"another study works on {self.output}: wait for it, or name another folder by output=")
            self.corpora.make()
            # again, because the hash of a corpus is known only now
            self.jobs = plan.expand(self.config, self.corpora, self.deepspeed_config)
            print(self.show(), flush=True)
            with mlflow_run.start(self.config, self.output) as tracker:
                yield tracker

    def _writer(self, tracker: Tracker) -> Callable[[Job], Path]:
        parent = mlflow_run.server_id(tracker)
        return lambda job: write_job(job, self.config, self.output, self.deepspeed_config, parent)

    def report_alone(self) -> int:
        """Report on what has finished, also in MLflow if the study has a run there that no other process writes to.

        Jobs and text that this version would make anew are taken as an earlier version left them, and the tables say so.
        """
        text_is_old = self.corpora.adopt()
        current = plan.expand(self.config, self.corpora, self.deepspeed_config)
        self.jobs = [last_known(job, self.output) for job in current]
        notes = []
        old = sum(job != now for job, now in zip(self.jobs, current, strict=True))
        if old or text_is_old:
            parts = [f"{old} of {len(current)} jobs"] * bool(old) + ["the prepared text"] * text_is_old
            notes = [f"{' and '.join(parts)} come from earlier code, settings or data than the study's present ones"]
            print(f"note: {notes[0]}", flush=True)
        with try_lock(self.output) as free:
            tracked = free and (self.output / mlflow_run.FILE).is_file()
            with mlflow_run.start(self.config, self.output) if tracked else Tracker.off() as tracker:
                return self._conclude([], tracker, notes)

    def _conclude(self, ran: Sequence[Outcome], tracker: Tracker, notes: Sequence[str]) -> int:
        """Report, and register the best model; 1 if a job failed.

        ran: the outcomes of the jobs that this process ran; those of others are read from their folders. notes: for under
        every table.
        """
        outcomes = {outcome.job.name: outcome for outcome in ran}
        for job in self.jobs:
            if job.name not in outcomes:
                outcomes[job.name] = read_outcome(job, self.output, outcomes)
        in_order = [outcomes[job.name] for job in self.jobs]
        if run_id := mlflow_run.server_id(tracker):
            folders = [self.output / job.folder / unit.name for job in self.jobs for unit in job.units]
            send_rest(folders, lambda message: print(f"warning: {message}", flush=True))
        records, findings = report.write(
            self.config, self.corpora, self.output, self.jobs, in_order, notes, self.decided
        )
        self.findings = findings
        mlflow_run.record(tracker, self.output, findings, self.jobs)
        failed = report.announce(records, findings, self.output)
        if run_id:
            try:
                print(mlflow_run.register(records, self.config.name, self.output, run_id), flush=True)
            except Exception as error:  # MLflow raises many kinds; the registry is a convenience
                print(f"warning: no model was registered: {first_line(error)}", flush=True)
        if failed:
            tracker.close("FAILED")
        return failed
