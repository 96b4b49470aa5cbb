"""Cached features come with the batches of the data module, and equal what the backbone gives for its frames."""

from __future__ import annotations

import pytest
import torch

from ssync_pl.data import ShardDataModule
from ssync_pl.data.features.cache import cache_features
from ssync_pl.errors import ConfigError, ShardError

SIZE = (8, 12)


@pytest.fixture
def cached(make_videos, backbone, tmp_path):
    shards = make_videos(count=5)
    cache_features(shards, backbone, tmp_path / "features", image_size=SIZE, flips=True, progress=False)
    options = {
        "batch_size": 2,
        "clip_length": 2,
        "image_size": SIZE,
        "mean": backbone.mean,
        "std": backbone.std,
        "features": str(tmp_path / "features"),
    }
    return shards, options


def _wanted(backbone, video: torch.Tensor) -> torch.Tensor:
    features = backbone(video.flatten(0, 1)).features.unflatten(0, video.shape[:2])
    return features.to(torch.bfloat16).float()


@pytest.mark.parametrize("workers", [0, 2])
def test_training_clips_bring_the_features_of_their_frames(cached, backbone, workers):
    shards, options = cached
    data = ShardDataModule(shards, num_workers=workers, **options)
    data.setup("fit")
    flips = set()
    loader = data.train_dataloader()
    for _ in range(4):
        for raw in loader:
            assert raw["features"].dtype == torch.bfloat16
            batch = data.on_after_batch_transfer(raw, 0)
            torch.testing.assert_close(batch["features"], _wanted(backbone, batch["video"]), rtol=0.01, atol=1e-5)
            assert "features_scale" not in batch
            flips |= set(raw["flip"].tolist())
    assert flips == {False, True}


def test_evaluation_pads_features_with_their_videos(cached, backbone):
    shards, options = cached
    data = ShardDataModule(validation=shards, num_workers=0, **options)
    data.setup("validate")
    for batch in (data.on_after_batch_transfer(raw, 0) for raw in data.val_dataloader()):
        torch.testing.assert_close(batch["features"], _wanted(backbone, batch["video"]), rtol=0.01, atol=1e-5)
        assert batch["segmentations"].shape[:2] == batch["features"].shape[:2]


def test_frames_can_be_left_out_of_training(cached):
    shards, options = cached
    data = ShardDataModule(shards, num_workers=0, features_only=True, **options)
    data.setup("fit")
    with_frames = ShardDataModule(shards, num_workers=0, **options)
    with_frames.setup("fit")
    for lean, full in zip(data.train_dataloader(), with_frames.train_dataloader(), strict=True):
        assert "video" not in lean
        lean, full = data.on_after_batch_transfer(lean, 0), with_frames.on_after_batch_transfer(full, 0)
        assert set(lean) == {"features", "__key__"}
        assert torch.equal(lean["features"], full["features"])


def test_what_does_not_fit_the_cache_is_refused(cached, make_videos):
    shards, options = cached
    for changes, match in (
        ({"image_size": (8, 16)}, "image_size"),
        ({"crop": "random"}, "crop"),
        ({"resize_mode": "bilinear"}, "resize_mode"),
    ):
        data = ShardDataModule(shards, num_workers=0, **{**options, **changes})
        with pytest.raises((ConfigError, ShardError), match=match):
            data.setup("fit")
    other = make_videos(count=3, prefix="other", folder="others")
    with pytest.raises(ShardError, match="other-000000"):
        ShardDataModule(other, num_workers=0, **options).setup("fit")
    with pytest.raises(ConfigError, match="plain local tars for cached features"):
        ShardDataModule(shards, num_workers=0, backend="webdataset", **options).setup("fit")
    with pytest.raises(ConfigError, match="`sampling` to be 'hashed'"):
        ShardDataModule(shards, sampling="reference", **options)
    with pytest.raises(ConfigError, match="`features` to be set"):
        ShardDataModule(shards, features_only=True)
