#!/usr/bin/env python
"""Measures training steps side by side: `python tools/bench.py step`; see --help for all measurements."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools.bench` is the folder beside this file

from mlinterf_ds.runtime.program import main
from tools.bench.main import main as bench

if __name__ == "__main__":
    main(bench)
