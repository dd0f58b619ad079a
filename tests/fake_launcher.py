"""A stand-in for `deepspeed` in tests of a study: it writes a job's results at once, in the recipes' own formats.

python tests/fake_launcher.py JOB      runs one job, which fails if a file `broken` beside jobs/ names it
python tests/fake_launcher.py study OUT SETTINGS...      runs a study of such jobs, as `launch/study.py` does
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAUSE = 0.05  # seconds a unit takes


def number(*of: object) -> float:
    """A score from 0 to 100 that depends on the arguments alone."""
    return int(hashlib.sha256(repr(of).encode()).hexdigest()[:6], 16) % 10000 / 100


def command(folder: Path, ranks: int, port: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), str(folder)]


def job(folder: Path) -> int:
    facts = json.loads((folder / "job.json").read_text())
    with (folder.parents[1] / "started").open("a") as log:
        log.write(facts["name"] + "\n")
    broken = folder.parents[1] / "broken"
    if broken.is_file() and facts["name"] in broken.read_text().split():
        print("error: the planted mistake", file=sys.stderr)
        return 2
    units = {}
    for unit in facts["units"]:
        time.sleep(PAUSE)
        words: list[str] = unit["arguments"]
        pairs = list(itertools.pairwise(words))
        settings = dict(value.split("=", 1) for flag, value in pairs if flag == "--set")
        tests = [value.split("=")[0] for flag, value in pairs if flag == "--test"]
        make = {"pretrain": pretrained, "finetune": finetuned, "analyze": analysed}[facts["kind"]]
        (folder / unit["name"]).mkdir(exist_ok=True)
        summary = make(unit["name"], settings, tests)
        (folder / unit["name"] / "summary.json").write_text(json.dumps(summary))
        units[unit["name"]] = {"state": "finished", "seconds": PAUSE}
    (folder / "done.json").write_text(json.dumps({"units": units, "seconds": 1.0, "startup": 0.5}))
    return 0


def pretrained(name: str, settings: dict[str, str], _: Any) -> dict[str, Any]:
    languages = settings["languages"].split(",")
    perplexity = {code: 10 + number(name, code) for code in languages}
    return {
        "variant": settings["variant"], "languages": languages, "steps": int(settings["train.steps"]), "seconds": 1.0,
        "valid_perplexity": perplexity, "valid_bits_per_character": dict.fromkeys(languages, 2.0),
        "unigram_perplexity": dict.fromkeys(languages, 200.0), "finished": True,
        "history": {code: [[0, 200.0], [int(settings["train.steps"]), value]] for code, value in perplexity.items()},
    }  # fmt: skip


def finetuned(name: str, settings: dict[str, str], tests: list[str]) -> dict[str, Any]:
    metric = "accuracy" if settings["task"] == "nli" else "f1"
    scores = {code: number(name, code) for code in tests}
    metrics = {
        code: {metric: {"mean": value, "std": 0.0}, "em": {"mean": value / 2, "std": 0.0}}
        for code, value in scores.items()
    }
    return {
        "task": settings["task"], "metric": metric, "per_seed": {code: [value] for code, value in scores.items()},
        "metrics": metrics, "baseline": dict.fromkeys(tests, 9.0), "finished": True,
        "seeds": [int(settings["finetune.seeds"])], "languages": ["syn"], "variant": "joint", "checkpoint": "model",
        "pretraining_seed": 0, "examples": {"train": {"syn": 9}}, "data": {f"test {code}": "synthetic" for code in tests},
    }  # fmt: skip


def analysed(name: str, settings: dict[str, str], _: Any) -> dict[str, Any]:
    return {"analysis": settings["analysis"], "within": 0.9, "between": number(name) / 200}


def study(output: str, *settings: str, report: bool = False) -> int:
    """The study of `launch/recipes/study_ci.toml` with these settings, one job at a time; or only its report."""
    from unittest import mock

    from mlinterf_ds.study import folders, main, runner
    from tests.commands import flags

    words = [f"output={output}", "tracking.enabled=false", "parallel=1", *settings]
    options = ["--recipe", "study_ci", *["--report"] * report]
    with mock.patch.object(folders, "launch_command", command), mock.patch.object(runner, "POLL", 0.02):
        return main.main([*options, *flags(*words)])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(study(*sys.argv[2:]) if sys.argv[1] == "study" else job(Path(sys.argv[1])))
