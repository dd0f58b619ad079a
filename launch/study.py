"""`python launch/study.py --recipe launch/recipes/study_cpu.toml`; --dry-run shows the plan, --help lists every key."""

from mlinterf_ds.runtime.program import main
from mlinterf_ds.study.main import main as study

if __name__ == "__main__":
    main(study)
