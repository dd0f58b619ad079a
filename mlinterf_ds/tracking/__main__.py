"""`python -m mlinterf_ds.tracking FOLDER...` sends what a run could not."""

import sys

from mlinterf_ds.tracking import main

sys.exit(main())
