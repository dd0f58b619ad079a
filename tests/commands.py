"""How tests start the project's commands: as processes, as a user does, or as a function on a rank of the pool."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def flags(*settings: str) -> list[str]:
    """The `--set` arguments of these settings."""
    return [word for setting in settings for word in ("--set", setting)]


def arguments(*settings: str, ds: str = "zero1") -> list[str]:
    """The arguments of a launcher: DeepSpeed's configuration and the settings."""
    return ["--deepspeed_config", str(ROOT / "ds_configs" / f"{ds}.json"), *flags(*settings)]


def command(program: str, *settings: str, ranks: int = 1, ds: str = "zero2") -> list[str]:
    """The command line that starts launch/`program`.py through DeepSpeed's launcher."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    return [*launcher, str(ROOT / "launch" / f"{program}.py"), *arguments(*settings, ds=ds)]


def launch(
    folder: Path, program: str, *settings: str, ranks: int = 1, ds: str = "zero2"
) -> subprocess.CompletedProcess[str]:
    """Runs launch/`program`.py in a folder to its end."""
    line = command(program, *settings, ranks=ranks, ds=ds)
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=400)


def refusal(function: Callable[..., Any], *arguments: Any) -> str:
    """The message with which a function refuses its arguments; '' if it accepts them."""
    from mlinterf_ds.errors import UserError

    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return ""


def call(module: str, folder: str, words: Sequence[str]) -> str:
    """Runs the `main` of a module on a rank of the pool, in a folder; returns the message with which it refuses, or ''."""
    from tests.ranks import joined

    os.chdir(folder)
    main = importlib.import_module(f"mlinterf_ds.{module}").main
    return refusal(main, list(words), joined())


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Waits until the condition holds and returns its value; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.02)
    return value


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
