"""`deepspeed launch/pretrain.py --deepspeed_config ds_configs/zero2.json`; --help lists every key."""

from mlinterf_ds.command import main
from mlinterf_ds.supervise import pretrain

if __name__ == "__main__":
    main(pretrain)
