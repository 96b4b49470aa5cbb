"""Small random scenes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture
def scene() -> tuple[Tensor, Tensor]:
    """Labels (3, 4, 16, 16) of 5 slots that loosely follow true masks (3, 4, 4, 16, 16), channel 0 = background."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 4, (3, 4, 4, 4), generator=generator)
    truth = blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = torch.randint(0, 5, truth.shape, generator=generator)
    pred = torch.where(torch.rand(truth.shape, generator=generator) < 0.4, noise, truth)
    return pred, truth.unsqueeze(2) == torch.arange(4)[:, None, None]
