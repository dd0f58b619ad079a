"""`deepspeed launch/analyze.py --set checkpoint=... --set analysis=conflict|prune|interference --set output=...`; --help."""

from mlinterf_ds.analyze import main as analyze
from mlinterf_ds.command import main

if __name__ == "__main__":
    main(analyze)
