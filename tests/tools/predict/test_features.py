from pathlib import Path

import numpy as np
import pytest
import torch
from input_files import moving, write_shard
from torch import nn

from ssync_pl.data import ShardDataModule
from ssync_pl.data.features.cache import cache_features
from ssync_pl.errors import ConfigError
from ssync_pl.hosts.nn import backbones
from ssync_pl.hosts.nn.backbones import FrozenBackbone
from ssync_pl.tools.predict.datamodule import InputDataModule
from ssync_pl.tools.predict.features import find_features


class Means(FrozenBackbone):
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
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A shard, and a function that caches its features and opens them."""
    monkeypatch.setattr(backbones, "load_backbone", means)
    videos = [np.random.default_rng(n).integers(0, 255, (5, 20, 30, 3)).astype(np.uint8) for n in range(2)]
    shard = write_shard(tmp_path / "shards", *videos)

    def make(weights="pretrained", **options):
        out = tmp_path / "features"
        cache_features(
            [str(shard)], means(weights=weights), out, image_size=8, crop="center", progress=False, **options
        )
        return ShardDataModule(
            predict=str(shard), features=str(out), image_size=8, crop="center", num_workers=0, flip_probability=0.0
        ), shard

    return make


@pytest.mark.parametrize("options", [{}, {"components": 2}, {"weights": "none"}])
def test_features_of_new_videos_are_those_that_the_cache_holds(cached, options) -> None:
    data, shard = cached(**options)
    data.setup("predict")
    stored = data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)
    fresh = InputDataModule(data, [str(shard)], clip_frames=64)
    batches = [fresh.on_after_batch_transfer(batch, 0) for batch in fresh.predict_dataloader()]
    for row, batch in enumerate(batches):
        wanted = stored["features"][row : row + 1]
        assert batch["features"].shape == wanted.shape
        assert torch.allclose(batch["features"], wanted, atol=0.02 * float(wanted.abs().max()))
        assert torch.allclose(batch["video"], stored["video"][row : row + 1], atol=1e-5)


def test_the_projection_must_be_there_and_the_same(cached, tmp_path: Path) -> None:
    data, shard = cached(components=2)
    other = write_shard(tmp_path / "other", moving(4))
    cache_features([str(other)], means(), tmp_path / "more", image_size=8, crop="center", progress=False, components=2)
    folder = tmp_path / "features"
    with pytest.raises(ConfigError, match="holds another"):
        find_features(data, str(tmp_path / "more" / "projection.npz"))
    kept = (folder / "projection.npz").rename(tmp_path / "kept.npz")
    with pytest.raises(ConfigError, match=r"projection\.npz is missing"):
        InputDataModule(data, [str(shard)])
    assert find_features(data, str(kept))[1] is not None
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(ConfigError, match="there are none"):
        find_features(data, None)
    recipe, projection = find_features(data, str(kept))  # the file says itself what was projected
    assert (recipe.backbone, recipe.layer, projection.matrix.shape) == ("means", "pool", (6, 2))
    with pytest.raises(ConfigError, match=r"gone\.npz, which does not exist"):
        find_features(data, str(tmp_path / "gone.npz"))
    with pytest.raises(ConfigError, match="only with cached features"):
        find_features(ShardDataModule(), "a.npz")


def test_other_weights_are_refused(cached, monkeypatch: pytest.MonkeyPatch) -> None:
    data, shard = cached()
    monkeypatch.setattr(backbones, "load_backbone", lambda *args: means(weights="others"))
    with pytest.raises(ConfigError, match="--backbone_checkpoint"):
        InputDataModule(data, [str(shard)])
