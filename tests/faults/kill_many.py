#!/usr/bin/env python
"""Kills random ranks at random moments of short runs that restart by themselves; every run must end as a run left alone.

    python tests/faults/kill_many.py --kills 100

That means: master weights, moments and step counts of the final checkpoint, and the validation perplexities of all evaluations,
are equal bit for bit. Prints a line for each run; the exit code is 1 if a run differed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlinterf_ds.engine.checkpoint import MOMENTS, verify
from mlinterf_ds.engine.weights import CheckpointReader

ROOT = Path(__file__).resolve().parents[2]
RANKS, STEPS = 2, 30
SETTINGS = [f"train.steps={STEPS}", "train.epoch_steps=10", "train.save_steps=2", "train.batch=8", "train.warmup=2"]
SETTINGS += ["model.width=32", "model.ffn=64", "model.dropout=0.1", "data.eval_rows=8", "data.synthetic_sentences=600"]
SETTINGS += ["tracking.enabled=false", "parallel.timeout=2"]
MARK = "KILL_MANY"
REACH = (
    0.6  # kills come in this share of a whole run's time; attempts that resume are shorter, and most should be killed
)


def start(folder: Path, output: str, restarts: int) -> subprocess.Popen[str]:
    """Starts a run in this folder, in the background; its processes carry a mark in their environment."""
    settings = [*SETTINGS, f"output={output}", f"restarts={restarts}"]
    flags = [word for setting in settings for word in ("--set", setting)]
    line = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        str(RANKS),
        str(ROOT / "launch/pretrain.py"),
    ]
    line += ["--deepspeed_config", str(ROOT / "ds_configs/zero2.json"), *flags]
    marked = os.environ | {MARK: mark(output), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = (folder / f"{output}.log").open("w")
    return subprocess.Popen(line, cwd=folder, env=marked, stdout=log, stderr=subprocess.STDOUT, text=True)


def mark(output: str) -> str:
    """The mark of the processes of this job, which no other job on this machine has."""
    return f"{os.getpid()}:{output}"


def ranks(output: str, attempt: int) -> list[int]:
    """The process ids of the ranks of this attempt, without their launcher."""
    return carrying(f"{MARK}={mark(output)}", f"MLINTERF_DS_ATTEMPT={attempt}")


def end(job: subprocess.Popen[str], output: str) -> None:
    """Kills a job and all processes that it started; a killed launcher leaves its ranks running."""
    job.kill()
    for process in carrying(f"{MARK}={mark(output)}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    job.wait(timeout=60)


def carrying(*variables: str) -> list[int]:
    """The ids of the processes that have these variables in their environment."""
    ids, wanted = [], {variable.encode() for variable in variables}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                ids.append(int(process.name))
    return ids


def outcome(folder: Path, output: str) -> dict[str, object]:
    """A digest of all parameters and moments at the end, and the history of evaluations; kills must not change them."""
    path = folder / output / "checkpoints" / f"step-{STEPS:08d}"
    history, weights, digest = verify(path)["history"], CheckpointReader(path), hashlib.sha256()
    for name in sorted(weights.names):
        digest.update(f"{name} {weights.steps(name)}".encode())
        for kind in ("master", *MOMENTS):
            digest.update(weights.whole(name, kind).numpy().tobytes())
    return {"weights": digest.hexdigest(), "history": history}


def killed(folder: Path, output: str, kills: int, seconds: float, draw: random.Random) -> tuple[int, int]:
    """Runs with up to `kills` kills, each in the first `seconds` of an attempt; returns the kills done and the exit code."""
    job = start(folder, output, kills)
    done = 0
    try:
        while done < kills and job.poll() is None:
            processes = ranks(output, done)
            if len(processes) < RANKS:
                time.sleep(0.05)
                continue
            moment = time.monotonic() + draw.uniform(0, seconds)
            while time.monotonic() < moment and job.poll() is None:
                time.sleep(0.02)
            with contextlib.suppress(ProcessLookupError):  # the rank may have ended by itself
                os.kill(draw.choice(processes), signal.SIGKILL)
                done += 1
        return done, job.wait(timeout=600)
    finally:
        end(job, output)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="kills in all runs together (default 5)")
    parser.add_argument("--per-run", type=int, default=20, help="kills of a run at most (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of ranks and moments (default 0)")
    options = parser.parse_args(words)
    folder, draw = Path(tempfile.mkdtemp(prefix="kill-many-")), random.Random(options.seed)
    alone = start(folder, "alone", 1)
    try:
        while len(ranks("alone", 0)) < RANKS and alone.poll() is None:
            time.sleep(0.05)
        began = time.monotonic()
        assert alone.wait(timeout=600) == 0, (folder / "alone.log").read_text()[-3000:]
    finally:
        end(alone, "alone")
    seconds, wanted = time.monotonic() - began, outcome(folder, "alone")
    print(f"left alone: {seconds:.0f} s", flush=True)
    seconds *= REACH
    total = differing = number = 0
    while total < options.kills:
        output, number = f"run-{number}", number + 1
        done, status = killed(folder, output, min(options.per_run, options.kills - total), seconds, draw)
        same = status == 0 and outcome(folder, output) == wanted
        total, differing = total + done, differing + (not same)
        result = "equal, bit for bit" if same else f"DIFFERENT (exit code {status}): {folder}/{output}.log"
        print(f"{output}: {done} kills, {result}", flush=True)
    print(f"{total} kills in {number} runs: {number - differing} runs ended as the run left alone, {differing} did not")
    if not differing:
        shutil.rmtree(folder)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
