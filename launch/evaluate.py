"""`python launch/evaluate.py --checkpoint RUN --text sw=FILE`, or `--fill "... <mask> ..." --language sw`; --help."""

from mlinterf_ds.evaluate import main as evaluate
from mlinterf_ds.runtime.program import main

if __name__ == "__main__":
    main(evaluate)
