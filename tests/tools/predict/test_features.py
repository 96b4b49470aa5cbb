import numpy as np
import pytest
import torch
from input_files import moving, write_shard
from torch import nn

from ssync_pl.data import ShardDataModule
from ssync_pl.data.features.cache import cache_features
from ssync_pl.errors import ConfigError, ShardError
from ssync_pl.hosts.nn import backbones
from ssync_pl.tools.predict.inputs import InputDataModule

SEEN = {"image_size": 8, "crop": "center"}


class Means(backbones.FrozenBackbone):
    """Mean colour and its mirror image of each patch."""

    def extract(self, frames):
        maps = self.model(frames)
        return maps.flatten(2).mT.repeat(1, 1, 2), (maps.shape[2], maps.shape[3])


def means(name="means", layer=None, weights=None, checkpoint=None):
    convolution = nn.Conv2d(3, 3, 4, stride=4, bias=False)
    generator = torch.Generator().manual_seed(0 if weights == "pretrained" else 1)
    nn.init.normal_(convolution.weight, generator=generator)
    return Means(convolution, name="means", layer="pool", dim=6, mean=[0.5] * 3, std=[0.5] * 3)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A function that caches the features of a shard, and returns a data module of both and the shard."""
    monkeypatch.setattr(backbones, "load_backbone", means)
    videos = np.random.default_rng(0).integers(0, 255, (2, 5, 20, 30, 3), np.uint8)
    shard = str(write_shard(tmp_path / "shards", *videos))

    def make(weights="pretrained", **options):
        out = tmp_path / "features"
        cache_features([shard], means(weights=weights), out, **SEEN, **options)
        return ShardDataModule(predict=shard, features=str(out), num_workers=0, flip_probability=0.0, **SEEN), shard

    return make


@pytest.mark.parametrize("options", [{}, {"components": 2}, {"weights": "none"}])
def test_features_of_new_videos_are_those_that_the_cache_holds(cached, options):
    data, shard = cached(**options)
    data.setup("predict")
    stored = data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)
    for row, found in enumerate(InputDataModule(data, [shard], clip_frames=64).predict_dataloader()):
        wanted = stored["features"][row : row + 1]
        assert found["features"].shape == wanted.shape
        assert torch.allclose(found["features"], wanted, atol=0.02 * float(wanted.abs().max()))
        assert torch.allclose(found["video"], stored["video"][row : row + 1], atol=1e-5)
    assert row == 1


def test_features_that_cannot_be_made_again_are_refused(cached, tmp_path, monkeypatch):
    data, shard = cached(components=2)
    other = write_shard(tmp_path / "other", moving(4))
    cache_features([str(other)], means(), tmp_path / "more", components=2, **SEEN)
    projection, kept = tmp_path / "features" / "projection.npz", tmp_path / "kept.npz"
    projection.rename(kept)
    with pytest.raises(ShardError, match=r"projection\.npz"):
        InputDataModule(data, [shard])
    (tmp_path / "more" / "projection.npz").rename(projection)
    with pytest.raises(ConfigError, match=r"projection\.npz that the features .* were made with, but got another"):
        InputDataModule(data, [shard])
    kept.rename(projection)
    monkeypatch.setattr(backbones, "load_backbone", lambda *args: means(weights="others"))
    with pytest.raises(ConfigError, match="--backbone_checkpoint"):
        InputDataModule(ShardDataModule(features=str(tmp_path / "features"), **SEEN), [shard])
    for path in projection.parent.glob("*.tar"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"to hold the features .*--data\.features"):
        InputDataModule(data, [shard])
