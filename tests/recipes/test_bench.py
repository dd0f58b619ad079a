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
from tools.bench import languages
from tools.bench import main as bench

BENCH = ROOT / "tools" / "bench.py"
SMALL = ["model.layers=1", "model.width=32", "model.heads=2", "model.ffn=64"]
FLAGS = ["--rows", "8", "--length", "16", "--vocabulary", "200", "--rounds", "2", "--threads", "1"]


def on_a_rank(words: Sequence[str]) -> int:
    """Measures on a rank of the pool, which has joined a group already."""
    with mock.patch.object(bench, "start"):
        return bench.main(words)


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
