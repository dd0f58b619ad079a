"""Every mode of tools/bench.py on shapes so small that only its arithmetic and plumbing are tested."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest

from tests.commands import ROOT, flags
from tests.ranks import pool, preloaded
from tools.bench import gpu, languages
from tools.bench import main as bench

BENCH = ROOT / "tools" / "bench.py"
SMALL = ["model.layers=1", "model.width=32", "model.heads=2", "model.ffn=64"]
FLAGS = ["--rows", "8", "--length", "16", "--vocabulary", "200", "--rounds", "2", "--threads", "1"]


def on_a_rank(words: Sequence[str]) -> int:
    """Measures on a rank of the pool, which has joined a group already."""
    with mock.patch.object(bench, "start"):
        return bench.main(words)


def measures_the_gpu_cases(words: Sequence[str]) -> int:
    """`bench.py gpu` on a rank of the pool, with two small cases and one that fails."""
    small, off = ("tiny", 4, 200), ["model.compile=false", "train.graphs=false"]
    cases = [
        ("plain", small, "joint", 2, off),
        ("meta", small, "meta_adpt", 2, [*off, *gpu.ONE_SIDED]),
        ("wrong", small, "joint", 2, ["model.heads=3"]),
    ]
    with mock.patch.object(gpu, "CASES", cases), mock.patch.multiple(gpu, WARM=2, STEPS=2):
        return on_a_rank(words)


def test_a_case_that_fails_leaves_the_others(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = ["gpu", "--precision", "fp32", "--threads", "1", *flags(*SMALL), "--json", str(out)]
    assert pool(1).run(measures_the_gpu_cases, words) == [0]
    result = json.loads(out.read_text())
    assert result["plain"]["ms"] > 0 and result["meta"]["ms"] > 0 and result["wrong"]["failed"].startswith("UserError")
    assert bench.arguments(["gpu"]).precision == "bf16" and bench.arguments(["step"]).precision == "fp32"


@pytest.mark.parametrize("mode", ["step", "meta", "languages", "conflict", "plan", "loader"])
def test_every_mode(mode: str, tmp_path: Path) -> None:
    if mode == "step":
        pytest.importorskip("transformers")
    more = ["--languages", "2", "4"] if mode in ("meta", "conflict") else []
    more += ["--rounds", "1"] if mode in ("languages", "plan") else []  # of which no ratio is tested
    out = tmp_path / "bench.json"
    words = [mode, *FLAGS, *flags(*SMALL), *more, "--json", str(out)]
    if mode == "meta":  # as a user starts it
        line = [sys.executable, str(BENCH), *words]
        done = subprocess.run(line, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
    elif mode == "languages":  # starts ranks of its own
        context = preloaded()  # which has imported what they need
        with mock.patch.object(languages.multiprocessing, "get_context", lambda _: context):
            assert bench.main(words) == 0
    else:
        assert pool(1).run(on_a_rank, words) == [0]
    result = json.loads(out.read_text())
    assert result["mode"] == mode and result["threads"] == 1

    def numbers(tree: dict) -> list[float]:
        return [n for v in tree.values() for n in (numbers(v) if isinstance(v, dict) else [v]) if isinstance(n, float)]

    assert len(numbers(result)) >= (2 if mode == "loader" else 5) and min(numbers(result)) >= 0
    if mode == "conflict":
        assert result["languages"] == 4 and result["times the gradients alone"] > 1
    if mode == "step":
        assert result["times_products"]["most"] > 1, "a step does more than its matrix products"
    if mode == "meta":
        assert result["2 languages"]["central in plain steps"]["most"] > 1
