from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssync_pl.hosts import SAVi


class _SquareClips(Dataset[dict[str, Any]]):
    """Clips of one bright square that moves right over a dark floor; masks with a background channel."""

    def __init__(self, count: int = 4, frames: int = 2, size: int = 16) -> None:
        self.items = [square_clip(index, frames, size) for index in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def square_clip(index: int, frames: int, size: int) -> dict[str, Any]:
    masks = torch.zeros(frames, 2, size, size, dtype=torch.bool)
    for t in range(frames):
        masks[t, 1, 2 + index : 8 + index, 1 + t : 7 + t] = True
    masks[:, 0] = ~masks[:, 1]
    color = torch.tensor([2.0, -1.0, 0.5])[(torch.arange(3) + index) % 3]
    video = torch.where(masks[:, 1:], color.view(1, 3, 1, 1), torch.full((), -0.5))
    return {"video": video, "segmentations": masks, "batch_padding_mask": torch.tensor(True)}


@pytest.fixture
def tiny_batch() -> dict[str, Tensor]:
    items = [square_clip(index, frames=2, size=16) for index in range(2)]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


@pytest.fixture
def square_loader() -> Callable[..., DataLoader[dict[str, Any]]]:
    def build(batch_size: int = 2, **options: int) -> DataLoader[dict[str, Any]]:
        return DataLoader(_SquareClips(**options), batch_size=batch_size)

    return build


@pytest.fixture
def tiny_savi() -> Callable[..., SAVi]:
    def build(**changes: Any) -> SAVi:
        options: dict[str, Any] = {
            "num_slots": 3,
            "slot_dim": 16,
            "encoder_channels": (8, 16),
            "encoder_strides": (2, 1),
            "feature_dim": 16,
            "corrector_mlp_hidden": 32,
            "predictor_mlp_hidden": 32,
            "decoder_broadcast": (4, 4),
            "decoder_channels": (16,),
            "decoder_strides": (2,),
            "init": "fan_in",
            "learning_rate": 3e-3,
            "warmup_steps": 0,
            "decay": "constant",
        }
        torch.manual_seed(0)
        return SAVi(**(options | changes))

    return build
