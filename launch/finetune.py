"""`deepspeed launch/finetune.py --set checkpoint=... --set task=ner --train en=... --dev en=... --test sw=...`; --help."""

from mlinterf_ds.finetune.main import main as finetune
from mlinterf_ds.runtime.program import main

if __name__ == "__main__":
    main(finetune)
