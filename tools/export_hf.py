#!/usr/bin/env python
"""Writes a checkpoint, of a pretraining or a fine-tuning, as a `transformers` model folder.

    python tools/export_hf.py runs/en-sw exported/en-sw
    python tools/export_hf.py runs/ner-en exported/ner-en --register ner
    python -c "from transformers import AutoTokenizer; print(AutoTokenizer.from_pretrained('exported/en-sw'))"

A later pretraining can start from the first: deepspeed launch/pretrain.py ... --set init=exported/en-sw
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlinterf_ds.export.hf import export
from mlinterf_ds.runtime.program import main


def run(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", help="an output folder of a run or a fine-tuning (its best checkpoint), or a checkpoint"
    )
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--register", metavar="NAME", help="register the folder under this name in MLflow's model registry too"
    )
    options = parser.parse_args(arguments)
    config = export(options.checkpoint, options.out)
    print(f"{options.out}: {config['architectures'][0]}, {config['vocab_size']} pieces; its README.md says more")
    if options.register:
        print(registered(options.checkpoint, options.out, options.register))
    return 0


def registered(source: str, folder: Path, name: str) -> str:
    """Registers the folder exported from `source`, in the run that trained it if MLflow has that; returns a sentence about it."""
    import mlflow

    from mlinterf_ds.export.pyfunc import register
    from mlinterf_ds.pretrained import opened
    from mlinterf_ds.tracking.facts import tracking_uri

    mlflow.set_tracking_uri(tracking_uri())
    saved = opened(source).saved
    run_id: str | None = saved.get("run_id")
    try:
        mlflow.get_run(run_id or "")
    except mlflow.exceptions.MlflowException:  # trained without MLflow, or with another store
        run_id = None
        mlflow.set_experiment(saved["config"].get("tracking", {}).get("experiment", "mlinterf_ds"))
    languages = ",".join(saved["languages"])
    version = register(folder, name, run_id, "exported", {"checkpoint": str(source), "languages": languages})
    return f"registered as models:/{name}/{version}"


if __name__ == "__main__":
    main(run)
