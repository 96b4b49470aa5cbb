"""Recorded results of the published metrics, and small random scenes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("metrics_*.npz"))


class GoldenCase(NamedTuple):
    """One recorded case."""

    name: str
    pred: Tensor
    true: Tensor
    ignore_background: bool
    ignore_overlaps: bool
    values: dict[str, np.ndarray]


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden_case(request: pytest.FixtureRequest) -> GoldenCase:
    with np.load(request.param, allow_pickle=False) as file:
        content = {name: file[name] for name in file.files}
    settings = json.loads(str(content.pop("json")))
    return GoldenCase(
        settings["name"],
        torch.from_numpy(content.pop("pred")),
        torch.from_numpy(content.pop("true")),
        settings["ignore_background"],
        settings["ignore_overlaps"],
        content,
    )


@pytest.fixture
def golden_paths() -> list[Path]:
    return GOLDEN


@pytest.fixture
def scene() -> tuple[Tensor, Tensor]:
    """Labels (3, 4, 16, 16) of 5 slots that loosely follow true masks (3, 4, 4, 16, 16), channel 0 = background."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 4, (3, 4, 4, 4), generator=generator)
    truth = blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = torch.randint(0, 5, truth.shape, generator=generator)
    pred = torch.where(torch.rand(truth.shape, generator=generator) < 0.4, noise, truth)
    return pred, truth.unsqueeze(2) == torch.arange(4)[:, None, None]
