"""`deepspeed launch/pretrain.py --deepspeed_config ds_configs/zero2.json`; --help lists every key."""

from mlinterf_ds.runtime.restarts import pretrain
from mlinterf_ds.runtime.session import main

if __name__ == "__main__":
    main(pretrain)
