"""The study's best joint model in MLflow's registry, with signature and model card."""

from __future__ import annotations

import shutil
import statistics
import warnings
from pathlib import Path
from typing import Any

from mlinterf_ds.results.records import Records, Trained

REQUIREMENTS = ["mlinterf_ds", "torch", "transformers>=5", "pandas"]


def best(records: Records) -> Trained | None:
    """The pair model with the best zero-shot scores, averaged over tasks and targets, of those that have all of their
    set's: a model is not the better for a hard task that failed. Without scores, the lowest bits per character."""
    models = [m for m in records.models if m.kind == "pair" and not m.control]
    scores: dict[tuple[str, str, int], dict[tuple[str, str], float]] = {}
    wanted: dict[str, set[tuple[str, str]]] = {}
    for s in records.scores:
        if s.kind == "pair" and not s.control and not s.within:
            scores.setdefault((s.set, s.variant, s.seed), {})[s.task, s.language] = s.score
            wanted.setdefault(s.set, set()).add((s.task, s.language))

    def worth(model: Trained) -> tuple[float, float]:
        mine = scores.get((model.set, model.variant, model.seed), {})
        whole = mine and mine.keys() == wanted[model.set]
        return statistics.fmean(mine.values()) if whole else -1.0, -statistics.fmean(model.bits_per_character.values())

    return max(models, key=worth, default=None)


def register(records: Records, name: str, output: Path, run_id: str) -> str:
    """Export the best model to `<output>/best_model` and register it under `name`; what was done, in words."""
    import mlflow
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    from mlinterf_ds.export.hf import export
    from mlinterf_ds.tracking.facts import tracking_uri

    chosen = best(records)
    if chosen is None:
        return "no joint model to register"
    mlflow.set_tracking_uri(tracking_uri())
    client, label = mlflow.MlflowClient(), Path(chosen.folder).parent.name  # its job, hash and all
    known = client.search_model_versions(f"name='{name}'")
    if label in {found.tags.get("job") for found in known}:
        return f"the best model is still {label}, registered as {name}"
    folder = output / "best_model"
    shutil.rmtree(folder, ignore_errors=True)
    export(chosen.folder, folder)
    inputs = Schema([ColSpec("string", "text"), ColSpec("string", "language")])
    options: dict[str, Any] = {
        "loader_module": "mlinterf_ds.export.pyfunc",
        "data_path": str(folder),
        "pip_requirements": REQUIREMENTS,
        "signature": ModelSignature(inputs=inputs, outputs=Schema([ColSpec("string")])),
        "registered_model_name": name,
    }
    with warnings.catch_warnings(), mlflow.start_run(run_id=run_id):
        warnings.filterwarnings("ignore", message=".*input example.*")  # it would be loaded and run here
        mlflow.pyfunc.log_model(name="best_model", **options)
    version = str(max(int(found.version) for found in client.search_model_versions(f"name='{name}'")))
    client.update_model_version(name, version, description=(folder / "README.md").read_text())
    facts = {"job": label, "variant": chosen.variant, "languages": ",".join(chosen.languages), "seed": str(chosen.seed)}
    for key, value in facts.items():
        client.set_model_version_tag(name, version, key, value)
    return f"registered {label} as models:/{name}/{version}"
