"""`python launch/evaluate.py --checkpoint RUN --text sw=FILE`, or `--fill "... <mask> ..." --language sw`; --help."""

from mlinterf_ds.command import main
from mlinterf_ds.evaluate import main as evaluate

if __name__ == "__main__":
    main(evaluate)
