"""The command `ssync-pl data cache-features`."""

import numpy as np
import pytest
import torch
from torch import nn

from ssync_pl.cli import main
from ssync_pl.data.features.store import FeatureStore
from ssync_pl.data.index import load_shards
from ssync_pl.data.shards import ShardWriter
from ssync_pl.hosts.nn import backbones
from ssync_pl.hosts.nn.backbones import FrozenBackbone


class Means(FrozenBackbone):
    def __init__(self):
        super().__init__(nn.AvgPool2d(4), name="means", layer="pool", dim=3, mean=(0.5,) * 3, std=(0.5,) * 3)

    def extract(self, frames):
        maps = self.model(frames)
        return maps.flatten(2).mT, (maps.shape[2], maps.shape[3])


@pytest.fixture
def pattern(tmp_path):
    with ShardWriter(tmp_path / "videos", "train", 2) as writer:
        for number in range(3):
            writer.write(str(number), {"video.npy": np.full((4, 16, 16, 3), 60 * number, np.uint8)})
    return str(tmp_path / "videos" / "train-{000000..000001}.tar")


@pytest.fixture
def means(monkeypatch):
    asked = []
    monkeypatch.setattr(backbones, "load_backbone", lambda *words: asked.append(words) or Means())
    return asked


def call(capsys, *words):
    status = main(["data", "cache-features", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_stores_features_and_says_what_it_did(pattern, means, tmp_path, capsys):
    out = tmp_path / "out"
    words = (pattern, "--backbone", "means", "--image-size", "8x12", "--out", out, "--flips")
    status, text, _ = call(capsys, *words, "--layer", "pool", "--weights", "none")
    assert status == 0
    assert means == [("means", "pool", "none", None)]
    assert "means pool (2x3 patches, 3 channels)" in text
    size = sum(path.stat().st_size for path in out.glob("*.tar")) / 1e6
    assert f"shards:   2 written, 0 kept, {size:.1f} MB" in text
    paths = sorted(map(str, (tmp_path / "videos").glob("*.tar")))
    sources = list(zip(paths, load_shards(paths), strict=True))
    store = FeatureStore(out, sources, image_size=(8, 12), resize_mode="bicubic", crop="none", flips=True)
    values = store.read(paths[1], "2", slice(None), True)["features"].float()
    assert torch.allclose(values, torch.full((4, 6, 3), (120 / 255 - 0.5) / 0.5), atol=1e-2)
    status, text, _ = call(capsys, *words)
    assert (status, "0 written, 2 kept" in text) == (0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--crop", "random"), "invalid choice: 'random'"),
        (("--image-size", "0"), "expected HEIGHTxWIDTH"),
        (("--image-size", "8x"), "but got '8x'"),
        (("--batch-size", "0"), "`batch_size` to be at least 1"),
    ],
)
def test_bad_options_end_with_a_message(pattern, means, tmp_path, capsys, words, message):
    status, _, text = call(
        capsys, pattern, "--backbone", "means", "--image-size", "8", "--out", tmp_path / "out", *words
    )
    assert status == 2
    assert message in text
    assert not (tmp_path / "out").exists()


def test_weights_and_checkpoint_exclude_each_other(pattern, tmp_path, capsys):
    words = (pattern, "--backbone", "a", "--image-size", "8", "--out", tmp_path / "out")
    status, _, text = call(capsys, *words, "--weights", "none", "--checkpoint", "a.pth")
    assert status == 2
    assert "not allowed with" in text


def test_skipped_videos_are_named(means, tmp_path, capsys):
    with ShardWriter(tmp_path / "videos", "train") as writer:
        writer.write("0", {"video.npy": np.zeros((4, 16, 16, 3), np.uint8)})
        writer.write("1", {"video.npy": np.zeros((4, 16, 16, 3), np.int64)})
    words = (tmp_path / "videos" / "train-*.tar", "--backbone", "means", "--image-size", "8", "--out", tmp_path / "out")
    status, _, text = call(capsys, *words)
    assert (status, "key 1 to be uint8 frames" in text) == (2, True)
    status, text, _ = call(capsys, *words, "--on-bad-sample", "skip")
    assert status == 0
    assert "skipped:  Expected member `video.npy`" in text


def test_a_transformer_of_timm_from_end_to_end(pattern, tmp_path, capsys):
    pytest.importorskip("timm")
    out = tmp_path / "out"
    words = ("--backbone", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--out", out)
    status, text, error = call(capsys, pattern, *words, "--layer", "vit_block2")
    assert (status, "2x2 patches, 64 channels" in text) == (0, True), error
    paths = sorted(map(str, (tmp_path / "videos").glob("*.tar")))
    sources = list(zip(paths, load_shards(paths), strict=True))
    store = FeatureStore(out, sources, image_size=32, resize_mode="bicubic", crop="none", flips=False)
    backbone = backbones.load_backbone("test_vit", "vit_block2", "none")
    assert store.recipe.weights == backbone.fingerprint
    stored = store.read(paths[0], "1", slice(None), False)["features"].float()
    frames = (torch.full((4, 3, 32, 32), 60 / 255) - torch.tensor(backbone.mean).view(3, 1, 1)) / torch.tensor(
        backbone.std
    ).view(3, 1, 1)
    wanted = backbone(frames).features
    assert torch.allclose(stored, wanted, rtol=2**-8, atol=1e-5)


@pytest.fixture
def noisy(tmp_path):
    generator = np.random.default_rng(0)
    for prefix in ("train", "validation"):
        with ShardWriter(tmp_path / "videos", prefix) as writer:
            writer.write("0", {"video.npy": generator.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)})
    return [str(tmp_path / "videos" / f"{prefix}-*.tar") for prefix in ("train", "validation")]


def test_projected_features_of_training_and_validation(noisy, means, tmp_path, capsys):
    train, validation = noisy
    words = ("--backbone", "means", "--image-size", "16", "--components", "2")
    status, text, error = call(capsys, train, *words, "--out", tmp_path / "out")
    assert status == 0, error
    assert "; 2 components of 3 channels, " in text
    assert " of the variance, fitted to 4 frames of train-000000.tar\n" in text
    status, text, error = call(capsys, validation, *words, "--out", tmp_path / "out")
    assert status == 0, error
    assert "fitted to 4 frames of train-000000.tar\n" in text


def test_another_projection_is_refused(noisy, means, tmp_path, capsys):
    words = (noisy[0], "--backbone", "means", "--image-size", "16", "--out", tmp_path / "out")
    assert call(capsys, *words, "--components", "2")[0] == 0
    for more, message in ((("--components", "1"), "2 there, 1 wanted"), ((), "2 there, 0 wanted")):
        status, _, text = call(capsys, *words, *more)
        assert status == 2
        assert message in text
