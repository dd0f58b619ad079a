#!/usr/bin/env python
"""Predicts memory, communication and time of a run: `python tools/plan.py --recipe base --nodes 16`; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools.plan` is the folder beside this file

from mlinterf_ds.runtime.program import main
from tools.plan.main import main as plan

if __name__ == "__main__":
    main(plan)
