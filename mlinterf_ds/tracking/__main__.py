"""`python -m mlinterf_ds.tracking FOLDER...` sends to MLflow what a run could not send."""

import sys

from mlinterf_ds.tracking.unsent import main

sys.exit(main())
