import numpy as np
import pytest
import torch

from ssync_pl.data.index import load_shards
from ssync_pl.data.shards import ShardWriter


class _Corners:
    """One odd convolution: mirrored frames do not give mirrored features."""

    name, layer_dims, dim = "corners", (2, 3), 5
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)

    def __init__(self, seed=0, layer="conv"):
        self.layer, self.fingerprint, self.calls, self.before = layer, f"{seed}" * 64, [], lambda: None
        self.conv = torch.nn.Conv2d(3, 5, 4, stride=4).requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def __call__(self, frames):
        self.calls.append(len(frames))
        self.before()
        # Frame by frame: the bits of a convolution depend on the size of its batch.
        maps = torch.cat([self.conv(frame[None]) for frame in frames])
        return maps.flatten(2).mT, (maps.shape[2], maps.shape[3])

    def to(self, device):
        assert device == "cpu"


@pytest.fixture
def make_backbone():
    return _Corners


@pytest.fixture
def backbone():
    return _Corners()


@pytest.fixture
def make_videos(tmp_path):
    """Write videos of noise with 3, 4, … frames and return the shards."""

    def make(count=5, prefix="train", folder="videos", size=(12, 16)):
        with ShardWriter(tmp_path / folder, prefix, 2) as writer:
            for number in range(count):
                video = np.random.default_rng(number).integers(0, 256, (3 + number, *size, 3), dtype=np.uint8)
                masks = np.zeros((3 + number, *size, 1), np.uint8)
                masks[:, 2:6, 1:5] = 1
                writer.write(f"{number:03d}", {"video.npy": video, "segmentations.npy.gz": masks})
        return sorted(str(path) for path in (tmp_path / folder).glob(f"{prefix}-*.tar"))

    return make


@pytest.fixture
def sources():
    return lambda paths: list(zip(paths, load_shards(paths), strict=True))
