"""Stored features are those of the loader's frames, and a cache is whole or refused."""

import errno
import json
import os
import shutil
import tarfile
import threading

import numpy as np
import pytest
import torch

from ssync_pl.data import ShardDataModule
from ssync_pl.data.features import FeatureStore, cache_features, decode_features
from ssync_pl.data.features.recipe import read_recipe
from ssync_pl.data.index import scan_shard
from ssync_pl.data.shards import ShardWriter
from ssync_pl.errors import ConfigError, ShardError

SIZE = (8, 12)


def run(shards, backbone, out, **options):
    return cache_features(shards, backbone, out, **{"image_size": SIZE, "progress": False, **options})


def open_store(sources, out, **options):
    return FeatureStore(
        out, sources, **{"image_size": SIZE, "resize_mode": "bicubic", "crop": "none", "flips": False, **options}
    )


def batches(shards, backbone, stage, **options):
    """Frames as hosts get them from the data module."""
    options = {
        "image_size": SIZE,
        "mean": backbone.mean,
        "std": backbone.std,
        "num_workers": 0,
        "batch_size": 1,
        **options,
    }
    data = ShardDataModule(**{("train" if stage == "fit" else stage): shards}, **options)
    data.setup(stage)
    loader = data.train_dataloader() if stage == "fit" else data.predict_dataloader()
    for batch in loader:
        yield data.on_after_batch_transfer(batch, 0)


@pytest.mark.parametrize("crop", ["none", "center"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_features_are_those_of_the_loader(make_videos, sources, backbone, tmp_path, crop, batch_size):
    shards = make_videos()
    report = run(shards, backbone, tmp_path / "out", crop=crop, batch_size=batch_size)
    assert (report.written, report.kept, report.videos, report.frames) == (3, 0, 5, 3 + 4 + 5 + 6 + 7)
    store = open_store(sources(shards), tmp_path / "out", crop=crop)
    assert (store.grid, store.dim) == ((2, 3), 5)
    homes = {sample.key: entry.name for _, entry in sources(shards) for sample in entry.samples}
    seen = 0
    for batch in batches(shards, backbone, "predict", crop=crop):
        key = batch["__key__"][0]
        stored = store.read(homes[key], key, slice(None), False)
        wanted = backbone(batch["video"]).features
        assert torch.equal(decode_features(stored), wanted.bfloat16().float())
        part = store.read(homes[key], key, slice(0, 3, 2), False)["features"]
        assert torch.equal(part, stored["features"][0:3:2])
        seen += 1
    assert seen == 5


def test_int8_stays_within_half_a_step(make_videos, sources, backbone, tmp_path):
    shards = make_videos(2)
    run(shards, backbone, tmp_path / "out", dtype="int8")
    store = open_store(sources(shards), tmp_path / "out")
    for batch in batches(shards, backbone, "predict"):
        stored = store.read("train-000000.tar", batch["__key__"][0], slice(None), False)
        wanted = backbone(batch["video"]).features
        assert stored["features"].dtype == torch.int8
        step = wanted.abs().amax(1, keepdim=True) / 127
        error = (decode_features(stored) - wanted).abs()
        assert bool((error <= step * 0.501).all())
        assert error.max() > 0


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_flips_are_features_of_mirrored_frames(make_videos, sources, backbone, tmp_path, dtype):
    shards = make_videos(2)
    report = run(shards, backbone, tmp_path / "out", flips=True, dtype=dtype, batch_size=3)
    assert report.frames == 2 * (3 + 4)
    store = open_store(sources(shards), tmp_path / "out", flips=True)
    for batch in batches(shards, backbone, "fit", flip_probability=1.0, clip_length=3):
        key = batch["__key__"][0]
        wanted = backbone(batch["video"]).features
        options = [
            decode_features(store.read("train-000000.tar", key, slice(first, first + 3), True))
            for first in range(2 if key == "001" else 1)
        ]
        tolerance = {"rtol": 2**-8, "atol": 0} if dtype == "bf16" else {"rtol": 0, "atol": wanted.abs().max() / 250}
        assert any(torch.allclose(option, wanted, **tolerance) for option in options)
        plain = decode_features(store.read("train-000000.tar", key, slice(0, 3), False))
        mirrored = plain.unflatten(1, (2, 3)).flip(2).flatten(1, 2)
        assert not torch.allclose(options[0], mirrored, atol=0.5)


def test_videos_of_other_sizes_and_pictures_share_a_cache(sources, backbone, tmp_path):
    with ShardWriter(tmp_path / "videos", "coco") as writer:
        writer.write("0", {"image.npy": np.full((9, 9, 3), 50, np.uint8)})
        writer.write("1", {"video.npy.gz": np.full((2, 30, 20, 3), 99, np.uint8)})
    shards = [str(tmp_path / "videos" / "coco-000000.tar")]
    run(shards, backbone, tmp_path / "out")
    store = open_store(sources(shards), tmp_path / "out")
    assert store.read("coco-000000.tar", "0", slice(None), False)["features"].shape == (1, 6, 5)
    assert store.read("coco-000000.tar", "1", slice(None), False)["features"].shape == (2, 6, 5)


def test_the_same_call_again_computes_nothing(make_videos, backbone, tmp_path):
    shards = make_videos()
    run(shards, backbone, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    backbone.extract = None
    report = run(shards, backbone, tmp_path / "out")
    assert (report.written, report.kept, report.frames) == (0, 3, 0)
    assert report.bytes == sum(map(len, before.values()))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}


def test_a_second_set_joins_the_folder(make_videos, sources, backbone, tmp_path):
    train, validation = make_videos(), make_videos(1, prefix="validation")
    run(train, backbone, tmp_path / "out")
    run(validation, backbone, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert len(index["shards"]) == 4
    assert len(index["recipe"]["features"]["sources"]) == 4
    assert index["recipe"]["features"]["weights"] == backbone.fingerprint
    open_store(sources(validation), tmp_path / "out")


def test_goes_on_after_a_kill(make_videos, make_backbone, sources, tmp_path):
    """The backbone dies in the second shard; the next call keeps the first and gives the same bytes as one run."""
    shards = make_videos()
    dying = make_backbone()
    extract, calls = dying.extract, []

    def die(frames):
        calls.append(len(frames))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return extract(frames)

    dying.extract = die
    with pytest.raises(KeyboardInterrupt):
        run(shards, dying, tmp_path / "out", batch_size=3)
    assert sorted(os.listdir(tmp_path / "out")) == [".verified.json", "train-000000.tar"]
    with pytest.raises(ShardError, match=r"2 are missing \(train-000001.tar, …\).*goes on where it"):
        open_store(sources(shards), tmp_path / "out")
    report = run(shards, make_backbone(), tmp_path / "out", batch_size=3)
    assert (report.written, report.kept) == (2, 1)
    run(shards, make_backbone(), tmp_path / "whole", batch_size=3)
    for path in (tmp_path / "whole").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_two_at_once_share_the_work(make_videos, make_backbone, sources, tmp_path):
    """While one computes the first shard, another takes the rest and leaves the first alone."""
    shards = make_videos()
    slow = make_backbone()
    extract, started, release = slow.extract, threading.Event(), threading.Event()

    def wait(frames):
        started.set()
        assert release.wait(60)
        return extract(frames)

    slow.extract = wait
    reports = []
    thread = threading.Thread(target=lambda: reports.append(run(shards, slow, tmp_path / "out")))
    thread.start()
    assert started.wait(60)
    other = run(shards, make_backbone(), tmp_path / "out")
    release.set()
    thread.join(60)
    assert (other.written, other.busy) == (2, ("train-000000.tar",))
    assert (reports[0].written, reports[0].kept, reports[0].busy) == (1, 2, ())
    assert len(json.loads((tmp_path / "out" / "index.json").read_text())["shards"]) == 3
    open_store(sources(shards), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 8}, r"image_size: \(8, 8\) here, \(8, 12\) there"),
        ({"resize_mode": "bilinear"}, "resize_mode: bilinear here, bicubic there"),
        ({"crop": "center"}, "crop: center here, none there"),
        ({"dtype": "int8"}, "dtype: int8 here, bf16 there"),
        ({"flips": True}, "flips: True here, False there"),
    ],
)
def test_another_recipe_needs_another_folder(make_videos, backbone, tmp_path, options, message):
    shards = make_videos(1)
    run(shards, backbone, tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        run(shards, backbone, tmp_path / "out", **options)


def test_other_weights_need_another_folder(make_videos, make_backbone, tmp_path):
    shards = make_videos(1)
    run(shards, make_backbone(), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"weights: \w{12}… here, \w{12}… there"):
        run(shards, make_backbone(seed=1), tmp_path / "out")


def test_changed_videos_are_noticed_by_the_next_call(make_videos, backbone, tmp_path):
    shards = make_videos(1)
    run(shards, backbone, tmp_path / "out")
    shutil.rmtree(tmp_path / "videos")
    shards = make_videos(1, size=(16, 12))
    with pytest.raises(ShardError, match=r"have changed since.*Delete .*train-000000.tar and run again"):
        run(shards, backbone, tmp_path / "out")


def test_videos_that_change_meanwhile_are_noticed(make_videos, backbone, tmp_path):
    shards = make_videos(1)
    extract = backbone.extract

    def meddle(frames):
        entry = scan_shard(shards[0])
        with open(shards[0], "r+b") as stream:
            stream.seek(entry.samples[0].members["video.npy"][0] + 200)
            stream.write(b"\xff\x00\xff")
        return extract(frames)

    backbone.extract = meddle
    with pytest.raises(ShardError, match="but it changed"):
        run(shards, backbone, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_the_folder_of_the_videos_is_not_overwritten(make_videos, backbone, tmp_path):
    shards = make_videos(1)
    before = (tmp_path / "videos" / "train-000000.tar").read_bytes()
    with pytest.raises(ShardError, match="to be a shard of features"):
        run(shards, backbone, tmp_path / "videos")
    assert (tmp_path / "videos" / "train-000000.tar").read_bytes() == before


def test_a_truncated_shard_of_features_is_not_kept(make_videos, backbone, tmp_path):
    shards = make_videos(1)
    run(shards, backbone, tmp_path / "out")
    path = tmp_path / "out" / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:2100])
    with pytest.raises(ShardError, match="It holds features: delete it and run again"):
        run(shards, backbone, tmp_path / "out")


def test_features_that_are_not_finite_name_their_video(make_videos, backbone, tmp_path):
    shards = make_videos()
    extract = backbone.extract
    backbone.extract = lambda frames: extract(frames) / (torch.arange(len(frames)) != 4)[:, None, None]
    with pytest.raises(ShardError, match=r"train-000000.tar, key 001 hold NaN or infinity"):
        run(shards, backbone, tmp_path / "out", batch_size=100)
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_unreadable_videos_are_refused_or_left_out(sources, backbone, tmp_path):
    with ShardWriter(tmp_path / "videos", "train") as writer:
        writer.write("0", {"video.npy": np.zeros((2, 8, 8, 3), np.uint8)})
        writer.write("1", {"video.npy": np.zeros((2, 8, 8, 3), np.float32)})
        writer.write("2", {"info.json": {}})
        writer.write("3", {"video.npy": np.ones((2, 8, 8, 3), np.uint8)})
    shards = [str(tmp_path / "videos" / "train-000000.tar")]
    with pytest.raises(ShardError, match="key 1 to be uint8 frames"):
        run(shards, backbone, tmp_path / "out")
    report = run(shards, backbone, tmp_path / "out", on_bad_sample="skip")
    assert report.videos == 2
    assert [place.split("key ")[1] for place in report.skipped] == ["1", "2"]
    store = open_store(sources(shards), tmp_path / "out")
    assert store.read("train-000000.tar", "3", slice(None), False)["features"].shape == (2, 6, 5)
    with pytest.raises(ShardError, match="key 1, but it has none"):
        store.read("train-000000.tar", "1", slice(None), False)


def test_a_full_disk_leaves_nothing_half_written(make_videos, backbone, tmp_path, monkeypatch):
    shards = make_videos()
    add, calls = tarfile.TarFile.addfile, []

    def full(self, info, fileobj=None):
        calls.append(info.name)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(self, info, fileobj)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(ShardError, match=r"No space left.*Finished shards are kept: make room"):
        run(shards, backbone, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [".verified.json", "train-000000.tar"]
    monkeypatch.undo()
    assert run(shards, backbone, tmp_path / "out").kept == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "random"}, "random crop moves the picture against the patches"),
        ({"crop": "left"}, "none or center, but got 'left'"),
        ({"batch_size": 0}, "`batch_size` to be at least 1"),
        ({"dtype": "fp16"}, "bf16, int8, but got 'fp16'"),
        ({"on_bad_sample": "ignore"}, "raise or skip, but got 'ignore'"),
        ({"resize_mode": "area"}, "bilinear, bicubic"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(make_videos, backbone, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run(make_videos(1), backbone, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_shards_must_be_local_and_have_names_of_their_own(make_videos, backbone, tmp_path):
    with pytest.raises(ConfigError, match="Download them first"):
        run(["https://host/a.tar"], backbone, tmp_path / "out")
    with pytest.raises(ConfigError, match="names of their own"):
        run(make_videos(1) + make_videos(1, folder="again"), backbone, tmp_path / "out")


def test_the_recipe_lies_in_every_shard(make_videos, backbone, tmp_path):
    run(make_videos(1), backbone, tmp_path / "out")
    recipe, source = read_recipe(tmp_path / "out" / "train-000000.tar")
    assert (recipe.backbone, recipe.layer, recipe.grid) == ("corners", "conv", (2, 3))
    assert source.name == "train-000000.tar"
    assert [sample.key for sample in scan_shard(tmp_path / "out" / "train-000000.tar").samples] == ["000"]
