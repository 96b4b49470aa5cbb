"""Makes the helper modules beside the tests importable under importlib mode, and keeps the tests on one core."""

import sys
from pathlib import Path

import pytest
import torch

from ssync_pl.method import ssync

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tensors here are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["auto", "plain"])
def both_paths(request):
    """Runs a module's tests twice: as paths are chosen, and with the plain path for everything."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(ssync, "_fast_path", lambda *_: None)
        yield request.param
