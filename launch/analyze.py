"""`deepspeed launch/analyze.py --set checkpoint=... --set analysis=conflict|prune|probe|interference --set output=...`; --help."""

from mlinterf_ds.analysis.main import main as analyze
from mlinterf_ds.runtime.program import main

if __name__ == "__main__":
    main(analyze)
