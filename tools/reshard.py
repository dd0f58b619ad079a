"""`python tools/reshard.py SRC DST --tp 1`: a checkpoint in one canonical form, whatever layout saved it.

SRC is a run's output folder (its newest checkpoint) or a checkpoint folder; DST a folder that does not exist yet. Not
needed to resume at another layout (every checkpoint loads at any); it is for comparing, archiving and handing on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlinterf_ds.command import main
from mlinterf_ds.engine.checkpoint import find
from mlinterf_ds.engine.reshard import reshard


def run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks of the new form (default 1)")
    options = parser.parse_args(words)
    source = find(options.source)
    state = reshard(source, options.target, options.tp)
    step = state["updates"] + state["skipped"]
    print(f"{source} (step {step}) is now {options.target}, one shard for each of {options.tp} tensor-parallel ranks")
    return 0


if __name__ == "__main__":
    main(run)
