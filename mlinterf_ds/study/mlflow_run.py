"""The study in MLflow: its own run, under which the runs of its jobs are nested, and its best model in the registry."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlinterf_ds.files import read_json, write_json
from mlinterf_ds.results.findings import Finding
from mlinterf_ds.results.records import Records, TrainedModel
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.study.folders import is_finished
from mlinterf_ds.study.jobs import Job
from mlinterf_ds.tracking import PENDING, Tracker, environment_facts

FILE = "study.json"  # the study's configuration and its run's id
PATIENCE = 120.0  # seconds to wait for the run's id, which the jobs are started with
ARTIFACTS = ("report.html", "tables", "figures", "findings.md", "findings.json", "records.json")


def start(config: StudyConfig, output: Path) -> Tracker:
    """Open the run, or the one that an earlier start of the study opened, and write study.json."""
    path = output / FILE
    try:
        run_id: Any = read_json(path)["run_id"]
    except (OSError, ValueError, KeyError):
        run_id = None
    tracker = Tracker.start(
        enabled=config.tracking.enabled,
        experiment=config.tracking.experiment,
        name=config.name,
        folder=output,
        parameters=config.model_dump(exclude={"tracking"}),
        tags=environment_facts() | {"study": config.name, "kind": "study"} | config.tracking.tags,
        run_id=run_id,
        about=f"Study {config.name}: {len(config.sets)} sets of languages, variants {', '.join(config.variants)}",
    )
    deadline = time.monotonic() + PATIENCE
    while (tracker.run_id or "").startswith(PENDING) and time.monotonic() < deadline:
        time.sleep(0.2)
    write_json(path, {"run_id": tracker.run_id, "config": config.model_dump()})
    return tracker


def server_id(tracker: Tracker) -> str | None:
    """The run's id on MLflow's server; None without tracking, or if the server has not answered."""
    run_id = tracker.run_id
    return None if run_id is None or run_id.startswith(PENDING) else run_id


def record(tracker: Tracker, output: Path, findings: Sequence[Finding], jobs: Sequence[Job]) -> None:
    """Send the effects, the verdicts and the report; the step is the number of finished jobs, so that a study can grow."""
    step = sum(is_finished(job, output) for job in jobs)
    tracker.log({f"effect/{finding.name}": finding.effect.mean for finding in findings if finding.effect.values}, step)
    tracker.tag({f"finding.{finding.name}": finding.verdict for finding in findings})
    verdicts = [f"- **{finding.verdict}**: {finding.claim}" for finding in findings]
    about = f"{len(jobs)} jobs, {step} finished; report.html, tables and findings are among the artifacts."
    tracker.describe("\n".join([about, "", *verdicts]))
    for name in ARTIFACTS:
        if (output / name).exists():  # there are no figures without analyses
            tracker.artifact(output / name)


# --- the registry ------------------------------------------------------------------------------------------------------
def best(records: Records) -> TrainedModel | None:
    """The pair model with the best zero-shot score, averaged over tasks and target languages.

    A model that lacks a score which others of its set have comes last, because without a hard task its average would be
    higher. Among models without scores, the one with the fewest bits per character is the best.
    """
    models = [model for model in records.models if model.kind == "pair" and not model.control]
    scores: dict[tuple[str, str, int], dict[tuple[str, str], float]] = {}
    wanted: dict[str, set[tuple[str, str]]] = {}
    for score in records.scores:
        if score.kind == "pair" and not score.control and not score.within:
            scores.setdefault((score.set, score.variant, score.seed), {})[score.task, score.language] = score.score
            wanted.setdefault(score.set, set()).add((score.task, score.language))

    def worth(model: TrainedModel) -> tuple[float, float]:
        own = scores.get((model.set, model.variant, model.seed), {})
        has_all = own and own.keys() == wanted[model.set]
        return statistics.fmean(own.values()) if has_all else -1.0, -statistics.fmean(model.bits_per_character.values())

    return max(models, key=worth, default=None)


def register(records: Records, name: str, output: Path, run_id: str) -> str:
    """Export the best model to `<output>/best_model` and register it under `name`; a sentence that says what was done."""
    import mlflow

    from mlinterf_ds.export import pyfunc
    from mlinterf_ds.export.hf import export
    from mlinterf_ds.tracking.facts import tracking_uri

    chosen = best(records)
    if chosen is None:
        return "no joint model to register"
    mlflow.set_tracking_uri(tracking_uri())
    label = Path(chosen.folder).parent.name  # of its job's folder, with the hash
    versions = mlflow.MlflowClient().search_model_versions(f"name='{name}'")
    if label in {version.tags.get("job") for version in versions}:
        return f"the best model is still {label}, registered as {name}"
    folder = output / "best_model"
    shutil.rmtree(folder, ignore_errors=True)
    export(chosen.folder, folder)
    facts = {"job": label, "variant": chosen.variant, "languages": ",".join(chosen.languages), "seed": str(chosen.seed)}
    newest = pyfunc.register(folder, name, run_id, "best_model", facts)
    return f"registered {label} as models:/{name}/{newest}"
