#!/usr/bin/env python
"""Kill random ranks at random moments of short runs that restart by themselves; every run must end as one left alone.

    python tests/faults/kill_many.py --kills 100

"As one left alone": the final checkpoint in its canonical form (masters, moments, step counts) and the validation perplexities
of all evaluations are equal bit for bit. Prints a line a run; exit code 1 if any differed.
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
from mlinterf_ds.engine.weights import Source

ROOT = Path(__file__).resolve().parents[2]
RANKS, STEPS = 2, 60
SETTINGS = [f"train.steps={STEPS}", "train.epoch_steps=20", "train.save_steps=2", "train.batch=8", "train.warmup=2"]
SETTINGS += ["model.width=32", "model.ffn=64", "model.dropout=0.1", "data.eval_rows=8", "data.synthetic_sentences=600"]
SETTINGS += ["tracking.enabled=false", "parallel.timeout=2"]
MARK = "KILL_MANY"
REACH = 0.6  # of a whole run's time: an attempt that goes on from a checkpoint is shorter, and most should be killed


def start(folder: Path, output: str, restarts: int) -> subprocess.Popen[str]:
    """The main job in this folder, in the background; its ranks carry a mark in their environment."""
    settings = [*SETTINGS, f"output={output}", f"restarts={restarts}"]
    flags = [word for setting in settings for word in ("--set", setting)]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(RANKS)]
    line = [
        *launcher,
        str(ROOT / "launch/pretrain.py"),
        "--deepspeed_config",
        str(ROOT / "ds_configs/zero2.json"),
        *flags,
    ]
    marked = os.environ | {MARK: mark(output), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = (folder / f"{output}.log").open("w")
    return subprocess.Popen(line, cwd=folder, env=marked, stdout=log, stderr=subprocess.STDOUT, text=True)


def mark(output: str) -> str:
    """Of a job's processes: another program may do the same on this machine."""
    return f"{os.getpid()}:{output}"


def ranks(output: str, attempt: int) -> list[int]:
    """The ranks proper of this attempt, in no particular order."""
    return carrying(f"{MARK}={mark(output)}", f"MLINTERF_DS_ATTEMPT={attempt}")


def end(job: subprocess.Popen[str], output: str) -> None:
    """Kill a job and all that it started: a launcher that is ended leaves its ranks."""
    job.kill()
    for process in carrying(f"{MARK}={mark(output)}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    job.wait(timeout=60)


def carrying(*variables: str) -> list[int]:
    """Processes with these in their environment."""
    found, wanted = [], {variable.encode() for variable in variables}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((place / "environ").read_bytes().split(b"\0")):
                found.append(int(place.name))
    return found


def outcome(folder: Path, output: str) -> dict[str, object]:
    """What must not depend on kills: every parameter and moment at the end, and every evaluation."""
    path = folder / output / "checkpoints" / f"step-{STEPS:08d}"
    history, weights, digest = verify(path)["history"], Source(path), hashlib.sha256()
    for name in sorted(weights.addresses):
        digest.update(f"{name} {weights.steps(name)}".encode())
        for kind in ("master", *MOMENTS):
            digest.update(weights.whole(name, kind).numpy().tobytes())
    return {"weights": digest.hexdigest(), "history": history}


def killed(folder: Path, output: str, kills: int, seconds: float, draw: random.Random) -> tuple[int, int]:
    """Run with up to `kills` kills, each at a random moment of an attempt's first `seconds`; (kills done, exit code)."""
    job = start(folder, output, kills)
    done = 0
    try:
        while done < kills and job.poll() is None:
            found = ranks(output, done)
            if len(found) < RANKS:
                time.sleep(0.05)
                continue
            moment = time.monotonic() + draw.uniform(0, seconds)
            while time.monotonic() < moment and job.poll() is None:
                time.sleep(0.02)
            with contextlib.suppress(ProcessLookupError):  # it ended first
                os.kill(draw.choice(found), signal.SIGKILL)
                done += 1
        return done, job.wait(timeout=600)
    finally:
        end(job, output)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--per-run", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
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
        said = "equal, bit for bit" if same else f"DIFFERENT (exit code {status}): {folder}/{output}.log"
        print(f"{output}: {done} kills, {said}", flush=True)
    print(f"{total} kills in {number} runs: {number - differing} runs ended as the one left alone, {differing} did not")
    if not differing:
        shutil.rmtree(folder)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
