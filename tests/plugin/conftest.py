"""Makes the helper modules beside the tests importable under importlib mode, and keeps the tests on one core."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tensors here are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Trainers write into their working directory."""
    monkeypatch.chdir(tmp_path)
