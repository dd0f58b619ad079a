"""The study command: plan, run, and report.

<output>/corpora/        text of every model, one vocabulary
<output>/jobs/NAME-HASH/ a job: job.json, launch.log, done.json, a folder a unit with its summary.json
<output>/records.json    what the jobs found
<output>/tables/         tables 1 to 7: .md, .csv, .tex
<output>/figures/        convergence of plain and meta adapters (figure 4c)
<output>/findings.md, findings.json
<output>/report.html     all of it, to read
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlinterf_ds.config import describe, load_config
from mlinterf_ds.data.corpus import Corpus
from mlinterf_ds.errors import UserError
from mlinterf_ds.files import write_bytes, write_json
from mlinterf_ds.results.records import Records, collect
from mlinterf_ds.runtime import session
from mlinterf_ds.study import cost, plan, runner, slurm, worker
from mlinterf_ds.study.config import SYNTHETIC, AnalysisSection, SetSection, StudyConfig, TaskSection
from mlinterf_ds.study.corpora import Corpora
from mlinterf_ds.tracking import PENDING, Tracker, environment_facts
from mlinterf_ds.tracking.facts import first_line
from mlinterf_ds.tracking.unsent import send_rest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0  # seconds to wait for MLflow's id of the study, under which the jobs nest


def main(arguments: Sequence[str]) -> int:
    """`python launch/study.py --recipe launch/recipes/study_cpu.toml [--dry-run]`."""
    options = _parser().parse_args(arguments)
    if options.job:
        return worker.work(options.job)
    config = load_config(StudyConfig, options.recipe, options.set)
    study = Study(config, options.deepspeed_config)
    if options.dry_run:
        print(cost.show(study.jobs, study.output, study.slots, every=True))
        return 0
    if options.report:
        return study.report_alone()
    again = [word for recipe in options.recipe for word in ("--recipe", recipe)]
    again += [word for setting in options.set for word in ("--set", setting)]
    return study.run(options.executor, [*again, "--deepspeed_config", study.deepspeed_config])


def _parser() -> argparse.ArgumentParser:
    parser = session.parser("Run a grid of models, fine-tunings and analyses, and report on it.", StudyConfig)
    for name, kind in (("sets", SetSection), ("tasks", TaskSection), ("analyses", AnalysisSection)):
        parser.epilog = f"{parser.epilog}\n\nkeys of each [[{name}]] in a recipe:\n{describe(kind)}"
    parser.set_defaults(deepspeed_config="ds_configs/zero1.json")
    parser.add_argument("--dry-run", action="store_true", help="show the jobs and their estimated cost, and end")
    parser.add_argument(
        "--report", action="store_true", help="only make tables, findings and report of what is finished"
    )
    parser.add_argument("--executor", choices=("local", "slurm"), default="local", help="run here, or submit to Slurm")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # inside a job's processes
    return parser


class Study:
    """A study's plan and where it stands."""

    def __init__(self, config: StudyConfig, deepspeed_config: str):
        self.config, self.output = config, Path(config.output or f"runs/{config.name}").resolve()
        given = Path(deepspeed_config)
        found = given if given.is_file() else ROOT / given
        if not found.is_file():
            raise UserError(f"--deepspeed_config {given}: no such file; the shipped ones are in ds_configs/")
        self.deepspeed_config = str(found.resolve())
        self.corpora = Corpora(config, self.output)
        self.jobs = self.expand()
        self.slots = len(runner.slots(config))
        self.tracker = Tracker.off()
        self.notes: list[str] = []  # under every table

    def expand(self) -> list[plan.Job]:
        return plan.expand(self.config, self.corpora, self.deepspeed_config)

    def run(self, executor: str, again: list[str]) -> int:
        """Run or submit what is missing, then report; 1 if a job failed."""
        with runner.alone(self.output) as free:
            if not free:
                raise UserError(f"another study works on {self.output}: wait for it, or name another folder by output=")
            return self._run(executor, again)

    def _run(self, executor: str, again: list[str]) -> int:
        self.corpora.make()
        self.jobs = self.expand()  # with the corpora's hashes
        print(cost.show(self.jobs, self.output, self.slots), flush=True)
        status = "FAILED"
        parent = self._open_tracker()

        def write(job: plan.Job) -> Path:
            return runner.write_job(job, self.config, self.output, self.deepspeed_config, parent)

        try:
            if executor == "slurm":
                ids = slurm.submit(self.jobs, self.config, self.output, write, again)
                write_json(self.output / "slurm.json", ids)
                print(f"submitted {len(ids) - 1} jobs and the report ({ids['report']}); see {self.output}/slurm.json")
                status = "FINISHED"
                return 0
            outcomes = runner.run(self.jobs, self.config, self.output, write)
            failed = self._conclude(outcomes, parent)
            status = "FAILED" if failed else "FINISHED"
            return failed
        except KeyboardInterrupt:
            status = "KILLED"
            print("stopped; the same command goes on from here", flush=True)
            raise
        finally:
            self.tracker.close("KILLED" if status == "KILLED" else "FAILED" if status == "FAILED" else "FINISHED")

    # -- reports ---------------------------------------------------------------------------------------------------------

    def report_alone(self) -> int:
        """Report on what is finished, in MLflow too if the study has a run there that nobody else writes to.

        Jobs and text that this version would make anew are taken as an earlier one left them, and the tables say so.
        """
        old_text = self.corpora.adopt()
        wanted = self.expand()
        self.jobs = [runner.last_known(job, self.output) for job in wanted]
        old = sum(job != now for job, now in zip(self.jobs, wanted, strict=True))
        if old or old_text:
            words = [f"{old} of {len(wanted)} jobs"] * bool(old) + ["the prepared text"] * old_text
            self.notes = [
                f"{' and '.join(words)} come from earlier code, settings or data than the study's present ones"
            ]
            print(f"note: {self.notes[0]}", flush=True)
        with runner.alone(self.output) as free:
            parent = self._open_tracker() if free and (self.output / "study.json").is_file() else None
            failed = 1
            try:
                failed = self._conclude([], parent)
            finally:
                self.tracker.close("FAILED" if failed else "FINISHED")
        return failed

    def _conclude(self, outcomes: Sequence[runner.Outcome], parent: str | None) -> int:
        if parent:
            units = [self.output / job.folder / unit.name for job in self.jobs for unit in job.units]
            send_rest(units, lambda text: print(f"warning: {text}", flush=True))
        failed = self.report(outcomes)
        if parent:
            self._register(parent)
        return failed

    def records(self, outcomes: Sequence[runner.Outcome]) -> Records:
        """What is finished so far."""
        config, found = self.config, Records(source=self.config.source)
        found.margin, found.confidence = config.margin, config.confidence
        found.departures = [*self.notes, *config.departures]
        known = {outcome.job.name: outcome for outcome in outcomes}
        for job in self.jobs:
            if job.name not in known:
                known[job.name] = runner.outcome_of(job, self.output, known)
            found.status.append(known[job.name].row())
        found.distances, found.distance = distances(config, self.corpora)
        for limits in [{}, *(limits for limits in self.corpora.limits if limits)]:
            folder, manifest = self.corpora.of(limits)
            corpus = Corpus.open(folder) if manifest else None
            for code in limits or config.languages:
                name = f"{code}@{limits[code]}" if limits else code
                if corpus:
                    tokens = len(corpus.tokens(code, "train"))
                    found.sizes.setdefault(name, {"sentences": corpus.sentences(code, "train"), "tokens": tokens})
        return collect(self.jobs, self.output, found)

    def report(self, outcomes: Sequence[runner.Outcome]) -> int:
        """Write records, tables, findings and the page; 1 if a job failed."""
        from mlinterf_ds.plots import convergence
        from mlinterf_ds.results import claims, findings, forms, tables
        from mlinterf_ds.study import page

        self.output.mkdir(parents=True, exist_ok=True)
        records = self.records(outcomes)
        records.analyses += convergence.draw(records, self.output / "figures")
        records.save(self.output / "records.json")
        found, tested = tables.all_tables(records), claims.all_findings(records)
        folder = self.output / "tables"
        folder.mkdir(exist_ok=True)
        for table in found:
            for ending, form in (("md", forms.markdown), ("csv", forms.comma_separated), ("tex", forms.latex)):
                write_bytes(folder / f"{table.name}.{ending}", form(table).encode())
        write_json(self.output / "findings.json", [claim.row() for claim in tested])
        write_bytes(self.output / "findings.md", findings.markdown(tested, records.confidence).encode())
        facts = environment_facts() | {"made": time.strftime("%Y-%m-%d %H:%M")}
        html = page.render(self.config, records, found, tested, facts)
        write_bytes(self.output / "report.html", html.encode())
        self._track(tested)
        lost = [row for row in records.status if row["state"] in ("failed", "blocked")]
        for row in lost:
            print(f"{row['job']}: {row['state']}: {row['reason']}")
        counts = {verdict: sum(c.verdict == verdict for c in tested) for verdict in ("holds", "fails", "undecided")}
        print("claims: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
        print(f"{self.output}/report.html, tables/, findings.md, records.json", flush=True)
        return int(bool(lost))

    # -- MLflow ----------------------------------------------------------------------------------------------------------

    def _open_tracker(self) -> str | None:
        """The study's run in MLflow, found again after a restart; its id, for the jobs to nest under."""
        path = self.output / "study.json"
        try:
            before: Any = json.loads(path.read_text())["run_id"]
        except (OSError, ValueError, KeyError):
            before = None
        self.tracker = Tracker.start(
            enabled=self.config.tracking.enabled,
            experiment=self.config.tracking.experiment,
            name=self.config.name,
            folder=self.output,
            parameters=self.config.model_dump(exclude={"tracking"}),
            tags=environment_facts() | {"study": self.config.name, "kind": "study"} | self.config.tracking.tags,
            run_id=before,
        )
        deadline = time.monotonic() + PATIENCE
        while (self.tracker.run_id or "").startswith(PENDING) and time.monotonic() < deadline:
            time.sleep(0.2)
        run_id = self.tracker.run_id
        write_json(path, {"run_id": run_id, "config": self.config.model_dump()})
        return None if run_id is None or run_id.startswith(PENDING) else run_id

    def _register(self, run_id: str) -> None:
        """The best model, in MLflow's registry; what goes wrong there costs no study."""
        from mlinterf_ds.study.registry import register

        try:
            print(
                register(Records.load(self.output / "records.json"), self.config.name, self.output, run_id), flush=True
            )
        except Exception as error:  # the registry is a convenience: any trouble of MLflow's is told, the study stands
            print(f"warning: no model was registered: {first_line(error)}", flush=True)

    def _track(self, claims: Sequence[Any]) -> None:
        step = sum(runner.is_finished(job, self.output) for job in self.jobs)  # reports of a study that grows
        self.tracker.log({f"effect/{c.name}": c.effect.mean for c in claims if c.effect.values}, step)
        self.tracker.tag({f"finding.{claim.name}": claim.verdict for claim in claims})
        verdicts = [f"- **{claim.verdict}**: {claim.claim}" for claim in claims]
        about = f"{len(self.jobs)} jobs, {step} finished; report.html, tables and findings are among the artifacts."
        self.tracker.describe("\n".join([about, "", *verdicts]))
        for name in ("report.html", "tables", "figures", "findings.md", "findings.json", "records.json"):
            if (self.output / name).exists():  # without analyses there are no figures
                self.tracker.artifact(self.output / name)


def distances(config: StudyConfig, corpora: Corpora) -> tuple[dict[str, float], str]:
    """Of the first two languages of each set, and what they are: the recipe's, or planted, or measured on the text."""
    given = {found.name: found.distance for found in config.sets if found.distance is not None}
    pairs = {found.name: found.languages[:2] for found in config.sets if found.kind == "pair"}
    if config.corpus.folder == SYNTHETIC and not config.corpus.text:
        from mlinterf_ds.data.synthetic import distance

        return {name: distance(*languages) for name, languages in pairs.items()} | given, "planted"
    folder, manifest = corpora.of({})
    if given or not manifest:
        return given, "as the recipe states"
    from mlinterf_ds.analysis.distance import SENTENCES, character_distance, ngrams, sentences

    corpus = Corpus.open(folder)
    grams = {code: ngrams(sentences(corpus, code, SENTENCES)) for pair in pairs.values() for code in pair}
    measured = {name: character_distance(grams[a], grams[b]) for name, (a, b) in pairs.items()}
    return measured, "between the texts' characters, 1 to 3 in a row"
