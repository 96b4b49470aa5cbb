from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssync_pl.hosts import DINOSAUR, SAVi, SlotContrast, VideoSAUR


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


FeatureHosts = type[VideoSAUR] | type[SlotContrast] | type[DINOSAUR]


@pytest.fixture
def feature_batch() -> dict[str, Tensor]:
    """Cached features of two clips in which a patch of one kind moves right over patches of another kind."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 6, generator=generator)
    masks = torch.zeros(2, 3, 2, 8, 12, dtype=torch.bool)
    features = kinds[0] + 0.1 * torch.randn(2, 3, 2, 3, 6, generator=generator)
    for t in range(3):
        features[:, t, 0, t] = kinds[1] + 0.1 * torch.randn(2, 6, generator=generator)
        masks[:, t, 1, :4, 4 * t : 4 * t + 4] = True
    masks[:, :, 0] = ~masks[:, :, 1]
    video = torch.where(masks[:, :, 1:], 1.0, -1.0).expand(-1, -1, 3, -1, -1)
    return {"video": video.clone(), "features": features.flatten(2, 3), "segmentations": masks}


@pytest.fixture
def tiny_host() -> Callable[..., Any]:
    """Builds a host on the features of `feature_batch`."""

    def build(kind: FeatureHosts, **changes: Any) -> Any:
        options: dict[str, Any] = {
            "num_slots": 3,
            "slot_dim": 8,
            "backbone": None,
            "feature_dim": 6,
            "grid": (2, 3),
            "encoder_hidden": 16,
            "decoder_hidden": (16, 12),
            "learning_rate": 3e-3,
            "warmup_steps": 0,
            "decay_rate": 1.0,
        }
        torch.manual_seed(0)
        model = kind(**(options | changes))
        model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
        model.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
        return model

    return build
