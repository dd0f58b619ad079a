"""How a job is started: its job.json, and the command of its launcher."""

from __future__ import annotations

import sys
from pathlib import Path

from mlinterf_ds.files import write_json
from mlinterf_ds.study.config import StudyConfig
from mlinterf_ds.study.folders import DONE, finished_units
from mlinterf_ds.study.jobs import Job

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "study.py"


def write_job(job: Job, config: StudyConfig, output: Path, deepspeed_config: str, parent: str | None) -> Path:
    """Write the job's folder and job.json; the folder. The failures of the last attempt leave its done.json.

    parent: id of the study's run in MLflow, under which the job's runs are nested.
    """
    folder = output / job.folder
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / DONE).is_file():
        write_json(folder / DONE, {"units": finished_units(folder)})
    settings = [f"tracking.enabled={config.tracking.enabled}", f"tracking.experiment={config.tracking.experiment}"]
    settings += [f"tracking.parent={parent}"] * bool(parent)
    checkpoints = [
        f"checkpoint={output / need.folder / need.units[0].name}"
        for need in job.needs
        if need.kind == "pretrain" and need.model == job.model
    ]
    units = []
    for unit in job.units:
        words = [word.replace("{output}", str(output)) for word in unit.arguments]
        tags = {"study": config.name, "pair": "-".join(job.model.languages)} | unit.facts
        names = ("study", "set", "pair", "seed", "variant", "control", "task", "train", "analysis")
        tagged = [f"tracking.tags.{name}={tags[name]}" for name in names if tags.get(name, "") != ""]
        words += [word for setting in (*settings, *tagged, *checkpoints) for word in ("--set", setting)]
        units.append({"name": unit.name, "arguments": ["--deepspeed_config", deepspeed_config, *words]})
    write_json(folder / "job.json", {"name": job.name, "kind": job.kind, "tensor": 1, "units": units})
    return folder


def launch_command(folder: Path, ranks: int, port: str) -> list[str]:
    """The command that starts a job's ranks, which meet at a free port of this machine; one rank is started without a launcher.

    torchrun leaves the accelerators to the environment (CUDA_VISIBLE_DEVICES), by which `runner` and Slurm share them out;
    DeepSpeed's launcher would take the machine's first ones for every job.
    """
    script = [str(SCRIPT), "--job", str(folder)]
    if ranks == 1:
        variables = ["RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1"]  # whatever started the study
        return ["env", *variables, sys.executable, "-u", *script]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [sys.executable, *torchrun, "--master-addr", "127.0.0.1", "--master-port", port, *script]
