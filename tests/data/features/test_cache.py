"""Stored features are those of the loader's frames, and a cache is whole or refused."""

import errno
import json
import os
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
    settings = {"image_size": SIZE, "resize_mode": "bicubic", "crop": "none", "flips": False}
    return FeatureStore(out, sources, **{**settings, **options})


def tars(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def batches(shards, backbone, stage, **options):
    """Frames as hosts get them from the data module."""
    settings = {"image_size": SIZE, "mean": backbone.mean, "std": backbone.std, "num_workers": 0, "batch_size": 1}
    data = ShardDataModule(**{("train" if stage == "fit" else stage): shards}, **{**settings, **options})
    data.setup(stage)
    loader = data.train_dataloader() if stage == "fit" else data.predict_dataloader()
    for batch in loader:
        yield data.on_after_batch_transfer(batch, 0)


@pytest.mark.parametrize(("crop", "batch_size"), [("none", 1), ("none", 4), ("center", 4), ("none", 100)])
def test_features_are_those_of_the_loader(make_videos, sources, backbone, tmp_path, crop, batch_size):
    shards = make_videos()
    report = run(shards, backbone, tmp_path / "out", crop=crop, batch_size=batch_size)
    assert (report.written, report.kept, report.videos, report.frames) == (3, 0, 5, 3 + 4 + 5 + 6 + 7)
    store = open_store(sources(shards), tmp_path / "out", crop=crop)
    assert (store.grid, store.dim) == ((2, 3), 5)
    homes = {sample.key: path for path, entry in sources(shards) for sample in entry.samples}
    for batch in batches(shards, backbone, "predict", crop=crop):
        key = batch["__key__"][0]
        stored = store.read(homes.pop(key), key, slice(None), False)
        assert torch.equal(decode_features(stored), backbone(batch["video"]).features.bfloat16().float())
    assert not homes


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_flips_are_features_of_mirrored_frames(make_videos, sources, backbone, tmp_path, dtype):
    shards = make_videos(2)
    report = run(shards, backbone, tmp_path / "out", flips=True, dtype=dtype, batch_size=3)
    assert report.frames == 2 * (3 + 4)
    store = open_store(sources(shards), tmp_path / "out", flips=True)
    for batch in batches(shards, backbone, "fit", flip_probability=1.0, clip_length=3):
        key = batch["__key__"][0]
        wanted = backbone(batch["video"]).features
        starts = range(2 if key == "001" else 1)
        options = [decode_features(store.read(shards[0], key, slice(n, n + 3), True)) for n in starts]
        tolerance = {"rtol": 2**-8, "atol": 0} if dtype == "bf16" else {"rtol": 0, "atol": wanted.abs().max() / 250}
        assert any(torch.allclose(option, wanted, **tolerance) for option in options)
        plain = decode_features(store.read(shards[0], key, slice(0, 3), False))
        mirrored = plain.unflatten(1, (2, 3)).flip(2).flatten(1, 2)
        assert not torch.allclose(options[0], mirrored, atol=0.5)


def test_videos_of_other_sizes_and_pictures_share_a_cache(sources, backbone, tmp_path):
    with ShardWriter(tmp_path / "videos", "coco") as writer:
        writer.write("0", {"image.npy": np.full((9, 9, 3), 50, np.uint8)})
        writer.write("1", {"video.npy.gz": np.full((2, 30, 20, 3), 99, np.uint8)})
    shards = [str(tmp_path / "videos" / "coco-000000.tar")]
    run(shards, backbone, tmp_path / "out")
    store = open_store(sources(shards), tmp_path / "out")
    assert [len(store.read(shards[0], key, slice(None), False)["features"]) for key in "01"] == [1, 2]


def test_the_same_call_again_computes_nothing_and_a_second_set_joins(make_videos, sources, backbone, tmp_path):
    train, validation, out = make_videos(), make_videos(1, prefix="validation"), tmp_path / "out"
    first = run(train, backbone, out)
    before = tars(out)
    run(validation, backbone, out)
    backbone.extract = None
    report = run(train, backbone, out)
    assert (report.written, report.kept, report.frames, report.bytes) == (0, 3, 0, first.bytes)
    assert before.items() <= tars(out).items()
    index = json.loads((out / "index.json").read_text())
    assert (len(index["shards"]), len(index["recipe"]["features"]["sources"])) == (4, 4)
    recipe, source = read_recipe(out / "train-000000.tar")
    assert (recipe.backbone, recipe.layer, recipe.grid, source.name) == ("corners", "conv", (2, 3), "train-000000.tar")


def test_sets_whose_shards_have_the_same_names_share_a_folder(make_videos, sources, backbone, tmp_path):
    one, other = make_videos(2, prefix="videos"), make_videos(2, prefix="videos", folder="other", size=(16, 12))
    out = tmp_path / "out"
    run(one, backbone, out)
    before = tars(out)
    assert run(other, backbone, out).written == 1
    assert len(tars(out)) == 2
    assert before.items() <= tars(out).items()
    assert run([*other, *one], backbone, out).kept == 2
    store, alone = open_store(sources([*one, *other]), out), tmp_path / "alone"
    run(other, backbone, alone)
    wanted = open_store(sources(other), alone).read(other[0], "001", slice(None), False)["features"]
    assert torch.equal(store.read(other[0], "001", slice(None), False)["features"], wanted)
    assert not torch.equal(store.read(one[0], "001", slice(None), False)["features"], wanted)
    settings = {"image_size": SIZE, "features": str(out), "num_workers": 0, "flip_probability": 0.0, "clip_length": 2}
    settings["batch_size"] = 2
    data = ShardDataModule([*one, *other], **settings)
    data.setup("fit")
    assert sum(len(batch["features"]) for batch in data.train_dataloader()) > 0


def test_goes_on_after_a_kill(make_videos, make_backbone, sources, tmp_path):
    """The backbone dies in the second shard; the next call keeps the first and gives the same bytes as one run."""
    shards, dying = make_videos(), make_backbone()
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
    with pytest.raises(ShardError, match="goes on where it stopped"):
        open_store(sources(shards), tmp_path / "out")
    report = run(shards, make_backbone(), tmp_path / "out", batch_size=3)
    assert (report.written, report.kept) == (2, 1)
    run(shards, make_backbone(), tmp_path / "whole", batch_size=3)
    assert tars(tmp_path / "whole") == tars(tmp_path / "out")


def test_two_at_once_share_the_work(make_videos, make_backbone, sources, tmp_path):
    """While one computes the first shard, another takes the rest and leaves the first alone."""
    shards, slow = make_videos(), make_backbone()
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
    open_store(sources(shards), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "seed", "message"),
    [
        ({"image_size": 8}, 0, "image_size"),
        ({"resize_mode": "bilinear"}, 0, "resize_mode"),
        ({"crop": "center"}, 0, "crop"),
        ({"dtype": "int8"}, 0, "dtype"),
        ({"flips": True}, 0, "flips"),
        ({}, 1, "weights"),
    ],
)
def test_another_recipe_needs_another_folder(make_videos, make_backbone, tmp_path, options, seed, message):
    shards = make_videos(1)
    run(shards, make_backbone(), tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        run(shards, make_backbone(seed=seed), tmp_path / "out", **options)


def test_videos_that_change_meanwhile_are_noticed(make_videos, backbone, tmp_path):
    shards = make_videos(1)
    extract = backbone.extract

    def meddle(frames):
        with open(shards[0], "r+b") as stream:
            stream.seek(scan_shard(shards[0]).samples[0].members["video.npy"][0] + 200)
            stream.write(b"\xff\x00\xff")
        return extract(frames)

    backbone.extract = meddle
    with pytest.raises(ShardError, match="changed"):
        run(shards, backbone, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_foreign_files_are_never_replaced(make_videos, backbone, tmp_path):
    shards = make_videos(1)
    before = tars(tmp_path / "videos")
    with pytest.raises(ShardError, match="shard of features"):
        run(shards, backbone, tmp_path / "videos")
    assert tars(tmp_path / "videos") == before
    run(shards, backbone, tmp_path / "out")
    path = tmp_path / "out" / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:2100])
    with pytest.raises(ShardError, match="delete it and run again"):
        run(shards, backbone, tmp_path / "out")


def test_features_that_are_not_finite_name_their_video(make_videos, backbone, tmp_path):
    extract = backbone.extract
    backbone.extract = lambda frames: extract(frames) / (torch.arange(len(frames)) != 4)[:, None, None]
    with pytest.raises(ShardError, match=r"key 001 hold NaN"):
        run(make_videos(), backbone, tmp_path / "out", batch_size=100)
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_unreadable_videos_are_refused_or_left_out(sources, backbone, tmp_path):
    with ShardWriter(tmp_path / "videos", "train") as writer:
        writer.write("0", {"video.npy": np.zeros((2, 8, 8, 3), np.uint8)})
        writer.write("1", {"video.npy": np.zeros((2, 8, 8, 3), np.float32)})
        writer.write("2", {"info.json": {}})
        writer.write("3", {"video.npy": np.ones((2, 8, 8, 3), np.uint8)})
    shards = [str(tmp_path / "videos" / "train-000000.tar")]
    with pytest.raises(ShardError, match="key 1"):
        run(shards, backbone, tmp_path / "out")
    report = run(shards, backbone, tmp_path / "out", on_bad_sample="skip")
    assert report.videos == 2
    assert [place.split("key ")[1] for place in report.skipped] == ["1", "2"]
    store = open_store(sources(shards), tmp_path / "out")
    assert store.read(shards[0], "3", slice(None), False)["features"].shape == (2, 6, 5)
    with pytest.raises(ShardError, match="key 1, but it has none"):
        store.read(shards[0], "1", slice(None), False)


def test_a_full_disk_leaves_nothing_half_written(make_videos, backbone, tmp_path, monkeypatch):
    shards = make_videos()
    add, calls = tarfile.TarFile.addfile, []

    def full(self, info, fileobj=None):
        calls.append(info.name)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(self, info, fileobj)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        with pytest.raises(ShardError, match="make room"):
            run(shards, backbone, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [".verified.json", "train-000000.tar"]
    assert run(shards, backbone, tmp_path / "out").kept == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "random"}, "random"),
        ({"crop": "left"}, "left"),
        ({"batch_size": 0}, "batch_size"),
        ({"dtype": "fp16"}, "fp16"),
        ({"on_bad_sample": "ignore"}, "ignore"),
        ({"resize_mode": "area"}, "bilinear"),
        ({"components": 0}, "components"),
        ({"components": 6}, "5 channels"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(make_videos, backbone, tmp_path, options, message):
    shards = make_videos(1)
    for words, match in (
        ({"shards": shards, **options}, message),
        ({"shards": ["https://host/a.tar"]}, "Download"),
        ({"shards": shards * 2}, "once"),
    ):
        with pytest.raises(ConfigError, match=match):
            run(words.pop("shards"), backbone, tmp_path / "out", **words)
    assert not (tmp_path / "out").exists()
