"""`deepspeed launch/pretrain.py --deepspeed_config ds_configs/zero2.json`; --help lists every key."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mlinterf_ds.errors import resumption
from mlinterf_ds.pretrain.config import read_arguments
from mlinterf_ds.runtime.program import main
from mlinterf_ds.runtime.restarts import ATTEMPT, Supervisor
from mlinterf_ds.tracking.__main__ import close_killed


def pretrain(arguments: Sequence[str]) -> int:
    """Train; with `restarts=N` this process supervises, and the same command in a child process trains."""
    config, _ = read_arguments(arguments)
    if config.restarts and ATTEMPT not in os.environ:
        remedy = resumption(config.output)
        supervisor = Supervisor(config.restarts, config.parallel.timeout, remedy)
        try:
            return supervisor.run([sys.executable, "-u", sys.argv[0], *arguments])
        finally:
            if supervisor.rank == 0 and supervisor.killed:  # the rank that records, killed because of another
                close_killed(Path(config.output))
    from mlinterf_ds.pretrain.main import main as train  # it imports torch, DeepSpeed and megatron

    return train(arguments)


if __name__ == "__main__":
    main(pretrain)
