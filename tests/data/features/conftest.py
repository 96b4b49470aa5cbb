"""A backbone that needs no package, and shards of noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssync_pl.data.features.backbones import FrozenBackbone
from ssync_pl.data.index import load_shards
from ssync_pl.data.shards import ShardWriter


class _Corners(FrozenBackbone):
    """One odd convolution: mirrored frames do not give mirrored features."""

    def __init__(self, seed: int = 0, layer: str = "conv", dim: int = 5) -> None:
        conv = nn.Conv2d(3, dim, 4, stride=4)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator))
            conv.bias.copy_(torch.randn(dim, generator=generator))
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
        super().__init__(conv, name="corners", layer=layer, dim=dim, mean=mean, std=std)

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        return height // 4, width // 4

    def extract(self, frames: torch.Tensor) -> torch.Tensor:
        # Frame by frame: the bits of a convolution hang on the size of its batch.
        return torch.cat([self.model(frame[None]) for frame in frames]).flatten(2).mT


@pytest.fixture
def make_backbone() -> Callable[..., FrozenBackbone]:
    return _Corners


@pytest.fixture
def backbone() -> FrozenBackbone:
    return _Corners()


def _noise(number: int, frames: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(number)
    masks = np.zeros((frames, *size, 1), np.uint8)
    masks[:, 2:6, 1:5] = 1
    return {
        "video.npy": generator.integers(0, 256, (frames, *size, 3), dtype=np.uint8),
        "segmentations.npy.gz": masks,
    }


@pytest.fixture
def make_videos(tmp_path: Path) -> Callable[..., list[str]]:
    """Write videos of noise with 3, 4, … frames and return the shards."""

    def make(
        count: int = 5, per_shard: int = 2, prefix: str = "train", folder: str = "videos", size: tuple = (12, 16)
    ) -> list[str]:
        with ShardWriter(tmp_path / folder, prefix, per_shard) as writer:
            for number in range(count):
                writer.write(f"{number:03d}", _noise(number, 3 + number, size))
        return sorted(str(path) for path in (tmp_path / folder).glob(f"{prefix}-*.tar"))

    return make


@pytest.fixture
def sources() -> Callable[[list[str]], list]:
    return lambda paths: list(zip(paths, load_shards(paths), strict=True))
