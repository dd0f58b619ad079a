"""`python launch/predict.py --checkpoint runs/ner --text sw=FILE` (or `sw=-`, standard input); --help."""

from mlinterf_ds.predict import main as predict
from mlinterf_ds.runtime.program import main

if __name__ == "__main__":
    main(predict)
