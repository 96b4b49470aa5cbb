"""Makes the helper modules beside the tests importable under importlib mode."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Trainers write into their working directory."""
    monkeypatch.chdir(tmp_path)
