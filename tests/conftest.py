"""One thread per worker of pytest-xdist: more of them only wait for each other. Helpers of several folders lie here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported; child processes inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
