"""`deepspeed launch/finetune.py --set checkpoint=... --set task=ner --train en=... --dev en=... --test sw=...`; --help."""

from mlinterf_ds.command import main
from mlinterf_ds.finetune import main as finetune

if __name__ == "__main__":
    main(finetune)
