import numpy as np
import pytest
import torch
from torch import nn

from ssync_pl.cli import main
from ssync_pl.data.features.store import FeatureStore
from ssync_pl.data.index import load_shards
from ssync_pl.data.shards import ShardWriter
from ssync_pl.hosts.nn import backbones
from tiny_run import PatchBackbone


@pytest.fixture
def videos(tmp_path):
    """Three videos of plain colours; the last one of `bad` cannot be read."""
    generator = np.random.default_rng(0)
    for prefix, kind in (("train", np.uint8), ("bad", np.int64)):
        with ShardWriter(tmp_path / "videos", prefix, 2) as writer:
            for number in range(3):
                colour = generator.integers(0, 256, 3)
                video = np.full((4, 16, 16, 3), colour, kind if number == 2 else np.uint8)
                writer.write(str(number), {"video.npy": video})
    return str(tmp_path / "videos" / "train-{000000..000001}.tar")


@pytest.fixture
def means(monkeypatch):
    asked, facts = [], {"name": "means", "layer": "pool", "dim": 3, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    make = lambda *words: asked.append(words) or PatchBackbone(nn.AvgPool2d(4), **facts)  # noqa: E731
    monkeypatch.setattr(backbones, "load_backbone", make)
    return asked


@pytest.fixture
def call(capsys, tmp_path):
    def call(shards, *words, backbone="means", size="8x12"):
        words = (shards, "--backbone", backbone, "--image-size", size, "--out", tmp_path / "out", *words)
        status = main(["data", "cache-features", *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def stored(tmp_path, size, key, flip=False):
    """The features of a video in the second shard of training videos, and its colour."""
    paths = sorted(map(str, (tmp_path / "videos").glob("train-*.tar")))
    sources = list(zip(paths, load_shards(paths), strict=True))
    store = FeatureStore(tmp_path / "out", sources, image_size=size, resize_mode="bicubic", crop="none", flips=flip)
    colour = np.random.default_rng(0).integers(0, 256, (3, 3))[int(key)] / 255
    return store.read(paths[1], key, slice(None), flip)["features"].float(), torch.tensor(colour).float(), store


def test_stores_features_and_says_what_it_did(videos, means, tmp_path, call):
    status, text, _ = call(videos, "--flips", "--layer", "pool", "--weights", "none")
    assert status == 0
    assert means == [("means", "pool", "none", None)]
    assert "means pool (2x3 patches, 3 channels)" in text
    assert "shards:   2 written, 0 kept\n" in text
    values, colour, _ = stored(tmp_path, (8, 12), "2", flip=True)
    assert torch.allclose(values, ((colour - 0.5) / 0.5).expand(4, 6, 3), atol=1e-2)
    assert "0 written, 2 kept" in call(videos, "--flips")[1]


def test_projected_features_of_training_and_of_videos_that_cannot_be_read(videos, means, tmp_path, call):
    bad, words = tmp_path / "videos" / "bad-*.tar", ("--components", "2")
    for shards, more in ((videos, ()), (bad, ("--on-bad-sample", "skip"))):
        status, text, error = call(shards, *words, *more)
        assert (status, "; 2 components of 3 channels, " in text) == (0, True), error
        assert " of the variance, fitted to 12 frames of train-000000.tar, train-000001.tar\n" in text
    assert "skipped:  Expected member `video.npy`" in text
    for shards, more, message in (
        (videos, ("--components", "1"), "2 there, 1 wanted"),
        (videos, (), "2 there, 0 wanted"),
        (tmp_path / "videos" / "none-*.tar", words, "none-*.tar"),
    ):
        status, _, text = call(shards, *more)
        assert (status, message in text) == (2, True)
