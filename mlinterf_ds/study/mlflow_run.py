"""The study's own run in MLflow, under which the runs of its jobs are nested."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlinterf_ds.files import write_json
from mlinterf_ds.results.findings import Finding
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.study.jobs import Job
from mlinterf_ds.study.outcomes import is_finished
from mlinterf_ds.tracking import PENDING, Tracker, environment_facts

FILE = "study.json"  # the study's configuration and its run's id
PATIENCE = 120.0  # seconds to wait for the run's id, which the jobs are started with
ARTIFACTS = ("report.html", "tables", "figures", "findings.md", "findings.json", "records.json")


def start(config: StudyConfig, output: Path) -> Tracker:
    """Open the run, or the one that an earlier start of the study opened, and write study.json."""
    path = output / FILE
    try:
        run_id: Any = json.loads(path.read_text())["run_id"]
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
