from __future__ import annotations

import pytest
from metric_helpers import random_scene
from torch import Tensor


@pytest.fixture
def scene() -> tuple[Tensor, Tensor]:
    return random_scene()
