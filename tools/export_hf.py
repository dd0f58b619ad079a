#!/usr/bin/env python
"""Writes a pretrained checkpoint as a `transformers` model folder.

    python tools/export_hf.py runs/en-sw exported/en-sw
    python -c "from transformers import AutoTokenizer; print(AutoTokenizer.from_pretrained('exported/en-sw'))"

A later run can start from it: deepspeed launch/pretrain.py ... --set init=exported/en-sw
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlinterf_ds.export.hf import export
from mlinterf_ds.runtime.output import main


def run(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's output folder (its best checkpoint) or a checkpoint")
    parser.add_argument("out", type=Path, help="a new or empty folder")
    options = parser.parse_args(arguments)
    config = export(options.checkpoint, options.out)
    print(f"{options.out}: {config['architectures'][0]}, {config['vocab_size']} pieces; its README.md says more")
    return 0


if __name__ == "__main__":
    main(run)
