"""One thread per worker of pytest-xdist: more of them only wait for each other."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported; child processes inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
