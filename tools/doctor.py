#!/usr/bin/env python
"""Checks this machine, or every host of a hostfile, before a run: `python tools/doctor.py`; see --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tools.doctor` is the folder beside this file

from tools.doctor.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
