"""One thread per worker of pytest-xdist: more of them only wait for each other. Helpers lie beside their tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), *(str(folder) for folder in TESTS.iterdir() if folder.is_dir())]
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported; child processes inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
