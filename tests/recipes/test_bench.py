"""Every mode of tools/bench.py on shapes so small that only its arithmetic and plumbing are tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, flags

BENCH = ROOT / "tools" / "bench.py"
SMALL = ["model.layers=1", "model.width=32", "model.heads=2", "model.ffn=64"]
FLAGS = ["--rows", "8", "--length", "16", "--vocabulary", "200", "--rounds", "2", "--threads", "1"]


@pytest.mark.parametrize("mode", ["step", "meta", "languages", "conflict", "plan"])
def test_every_mode(mode: str, tmp_path: Path) -> None:
    if mode == "step":
        pytest.importorskip("transformers")
    more = ["--languages", "2", "4"] if mode in ("meta", "conflict") else []
    out = tmp_path / "bench.json"
    line = [sys.executable, str(BENCH), mode, *FLAGS, *flags(*SMALL), *more, "--json", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["mode"] == mode and result["threads"] == 1

    def numbers(tree: dict) -> list[float]:
        return [n for v in tree.values() for n in (numbers(v) if isinstance(v, dict) else [v]) if isinstance(n, float)]

    assert len(numbers(result)) >= 5 and min(numbers(result)) >= 0
    if mode == "conflict":
        assert result["languages"] == 4 and result["times the gradients alone"] > 1
    if mode == "step":
        assert result["times_products"]["most"] > 1, "a step does more than its matrix products"
    if mode == "meta":
        assert result["2 languages"]["central in plain steps"]["most"] > 1
