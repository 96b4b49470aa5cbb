from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def tiny() -> dict[str, Any]:
    from tiny_comparison import comparable

    return comparable(Path("data"))
