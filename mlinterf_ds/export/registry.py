"""Exported folders in MLflow's model registry."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from mlinterf_ds.export.pyfunc import COLUMNS, LANGUAGE, kind_of

REQUIREMENTS = ["mlinterf_ds", "torch", "transformers>=5", "pandas"]  # packages that a registered model needs


def register(folder: Path, name: str, run_id: str | None, model: str, tags: Mapping[str, str]) -> str:
    """Logs an exported folder as `model` in a run (None: in a new one) and registers it under `name`; returns its version.

    The version has the folder's card as its description. MLflow's tracking address must be set.
    """
    import mlflow
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    config = json.loads((folder / "config.json").read_bytes())
    # Models without language-specific modules don't read the language, and others may have a default.
    needed = "languages" in config and "default_language" not in config
    language = ColSpec("string", LANGUAGE, required=needed)
    kind = kind_of(folder)
    columns = [ColSpec("string", column, required=column != "text_pair") for column in COLUMNS[kind]]
    with warnings.catch_warnings(), mlflow.start_run(run_id=run_id, run_name=None if run_id else folder.name):
        warnings.filterwarnings("ignore", message=".*input example.*")  # with one MLflow would run the model here
        mlflow.pyfunc.log_model(
            name=model, loader_module="mlinterf_ds.export.pyfunc", data_path=str(folder),
            pip_requirements=REQUIREMENTS, registered_model_name=name,
            signature=ModelSignature(inputs=Schema([*columns, language]), outputs=Schema([ColSpec("string")])),
        )  # fmt: skip
    client = mlflow.MlflowClient()
    version = str(max(int(version.version) for version in client.search_model_versions(f"name='{name}'")))
    client.update_model_version(name, version, description=(folder / "README.md").read_text("utf-8"))
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    return version
