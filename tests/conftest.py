"""Seeds every test; one thread per worker of pytest-xdist; helpers lie beside their tests."""

import logging
import os
import signal
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), *(str(folder) for folder in TESTS.iterdir() if folder.is_dir())]
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, for children too, where a shell runs us behind `&`
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: more threads only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # child processes inherit it


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)
    logging.getLogger("lightning.pytorch").propagate = True  # old releases keep their records from `caplog`
