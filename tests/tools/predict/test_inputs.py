import os

import numpy as np
import pytest
import torch
from input_files import moving, write_frames, write_shard, write_video
from PIL import Image
from torch import nn

from ssync_pl.data import ShardDataModule
from ssync_pl.data.features.cache import cache_features
from ssync_pl.errors import ConfigError, ShardError
from ssync_pl.hosts.nn import backbones
from ssync_pl.tools.predict.inputs import InputDataModule, find_videos
from tiny_run import PatchBackbone


def test_every_kind_of_input(tmp_path):
    video, clips = moving(4), tmp_path / "clips"
    clips.mkdir()
    write_video(clips / "b10.mp4", video)
    write_video(clips / "b9: 1.avi", video)
    write_frames(clips / "c[1]", video[:3])
    (clips / "c_masks").mkdir()
    (clips / ".hidden").touch()
    pictures = [Image.fromarray(frame) for frame in video]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=200)
    write_shard(tmp_path / "shards", video[:2], video[:3])
    shard = write_shard(tmp_path / "shards", video[:1], prefix="more")
    (tmp_path / "shards" / "index.json").touch()
    inputs = [clips, tmp_path / "shards", shard, clips / "c[1]", tmp_path / "a.gif"]
    found = find_videos([str(path) for path in inputs])
    assert [item.key for item in found] == ["b9: 1", "b10", "c[1]", "0", "1", "0", "0", "c[1]", "a"]
    assert [sum(1 for _ in item.frames()) for item in found] == [4, 4, 3, 2, 3, 1, 1, 3, 4]
    assert [item.rate for item in (found[1], found[2], found[8])] == [10, None, 5]
    assert np.array_equal(np.stack(list(found[2].frames())), video[:3])
    assert np.array_equal(np.stack(list(found[3].frames())), video[:2])
    (clips / "film.wmv").touch()
    (clips / "c[1]" / "notes").touch()
    (clips / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    with pytest.warns(UserWarning, match=r"leaves out of .*clips: c\[1\]/notes, c_masks, film\.wmv, gone\.mp4$"):
        assert len(find_videos([str(clips)])) == 3


BAD = [
    ("gone.mp4", lambda path: None, ConfigError, "does not exist"),
    ("empty.mp4", lambda path: path.touch(), ShardError, "whole video file.*empty"),
    ("cut.mp4", lambda path: os.truncate(write_video(path, moving(20)), 1500), ShardError, r"cut\.mp4"),
    ("sound.txt", lambda path: path.touch(), ConfigError, "is none of them"),
    ("one.png", lambda path: Image.fromarray(moving(1)[0]).save(path), ConfigError, "Name the folder"),
    ("nothing", lambda path: path.mkdir(), ConfigError, "is none of them"),
    ("folder/f2.png", lambda path: Image.fromarray(moving(1, 10, 12)[0]).save(path), ShardError, r"size.*f2.png"),
    ("folder/a.avi", lambda path: write_video(path, moving(2)), ConfigError, "one kind of input"),
    ("folder/clip", lambda path: write_frames(path, moving(2)), ConfigError, "one kind of input"),
]


@pytest.mark.parametrize(("name", "spoil", "error", "message"), BAD)
def test_bad_input_is_refused(tmp_path, name, spoil, error, message):
    write_frames(tmp_path / "folder", moving(2))
    spoil(tmp_path / name)
    with pytest.raises(error, match=message) as caught:
        [list(video.frames()) for video in find_videos([str(tmp_path / name.partition("/")[0])])]
    assert "--on-bad-sample" not in str(caught.value)


SEEN = {"image_size": 8, "crop": "center"}


def means(name="means", layer=None, weights=None, checkpoint=None):
    convolution = nn.Conv2d(3, 6, 4, stride=4, bias=False)
    generator = torch.Generator().manual_seed(0 if weights == "pretrained" else 1)
    nn.init.normal_(convolution.weight, generator=generator)
    return PatchBackbone(convolution, name="means", layer="pool", dim=6, mean=[0.5] * 3, std=[0.5] * 3)


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
