"""When stored features are refused, how they are read, and that they come with the batches of the data module."""

import os
import pickle
import shutil

import pytest
import torch

from ssync_pl.data import ShardDataModule
from ssync_pl.data.features import store as recipe_module
from ssync_pl.data.features.cache import cache_features
from ssync_pl.data.features.store import FeatureStore
from ssync_pl.data.index import ShardEntry, scan_shard
from ssync_pl.errors import ConfigError, ShardError

SETTINGS = {"image_size": (8, 12), "resize_mode": "bicubic", "crop": "none", "flips": False}


@pytest.fixture
def cached(make_videos, backbone, tmp_path):
    """Shards and the folder of their features, also of mirrored frames."""
    shards = make_videos()
    cache_features(shards, backbone, tmp_path / "out", image_size=(8, 12), flips=True, progress=False)
    return shards, tmp_path / "out"


def test_changed_videos_are_refused_even_at_the_same_size_but_masks_do_not_matter(cached, sources):
    shards, out = cached
    offset, size = scan_shard(shards[0]).samples[0].members["segmentations.npy.gz"]
    with open(shards[0], "r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(size))
    FeatureStore(out, sources(shards), **SETTINGS)
    with open(shards[1], "r+b") as stream:
        stream.seek(scan_shard(shards[1]).samples[1].members["video.npy"][0] + 300)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(shards[1], ns=(1, 1))
    with pytest.raises(ShardError, match=r"other videos, first .*train-000001\.tar"):
        FeatureStore(out, sources(shards), **SETTINGS)


def test_copied_videos_are_read_once_and_then_trusted(cached, sources, tmp_path, monkeypatch):
    shards, out = cached
    shutil.copytree(tmp_path / "videos", tmp_path / "copies")
    copies = [path.replace("/videos/", "/copies/") for path in shards]
    read = []
    digest = recipe_module._digest
    monkeypatch.setattr(recipe_module, "_digest", lambda path, entry: read.append(path) or digest(path, entry))
    FeatureStore(out, sources(shards), **SETTINGS)
    assert read == []
    FeatureStore(out, sources(copies), **SETTINGS)
    FeatureStore(out, sources(copies), **SETTINGS)
    assert sorted(read) == sorted(copies)
    (out / ".verified.json").write_text("[1, {")
    FeatureStore(out, sources(copies), **SETTINGS)
    assert len(read) == 6
    (out / ".verified.json").unlink()  # a read-only folder is enough
    monkeypatch.setattr(recipe_module, "write_bytes", lambda path, content: (_ for _ in ()).throw(PermissionError(13)))
    FeatureStore(out, sources(copies), **SETTINGS)


def test_missing_mixed_and_foreign_features_are_named(cached, sources, make_backbone, tmp_path):
    shards, out = cached
    for folder, given in ((tmp_path / "none", sources(shards)), (out, [])):
        with pytest.raises(ConfigError, match="folder of stored features"):
            FeatureStore(folder, given, **SETTINGS)
    with pytest.raises(ShardError, match="shard of features"):
        FeatureStore(tmp_path / "videos", sources(shards), **SETTINGS)
    cache_features(shards[1:2], make_backbone(seed=3), tmp_path / "b", image_size=(8, 12), flips=True, progress=False)
    shutil.copy(tmp_path / "b" / "train-000001.tar", out)
    with pytest.raises(ConfigError, match=r"train-000001.tar .*weights"):
        FeatureStore(out, sources(shards), **SETTINGS)
    (out / "train-000002.tar").unlink()
    with pytest.raises(ShardError, match=r"train-000002\.tar"):
        FeatureStore(out, sources(shards), **SETTINGS)
    fewer = [(path, ShardEntry(entry.name, entry.size, entry.samples[:1])) for path, entry in sources(shards[:1])]
    FeatureStore(out, fewer, **SETTINGS)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"version": 1', b'"version": 9'),
        (b'"ssync_pl.features"', b'"other_pl.features"'),
        (b'"dtype": "bf16"', b'"dtype": "int8"'),
        (None, None),
    ],
)
def test_other_versions_and_damage_are_refused(cached, sources, old, new):
    shards, out = cached
    path = out / "train-000000.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(old, new, 1) if old else data[:3000])
    with pytest.raises(ShardError, match=r"train-000000\.tar"):
        FeatureStore(out, sources(shards), **SETTINGS)


@pytest.mark.parametrize(
    ("old", "new"), [(b"'shape': (3, 6, 5)", b"'shape': (3, 5, 6)"), (b"'descr': '<u2'", b"'descr': '<i2'")]
)
def test_damaged_features_are_refused_when_read(cached, sources, old, new):
    shards, out = cached
    path = out / "train-000000.tar"
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ShardError, match="bfloat16"):
        FeatureStore(out, sources(shards), **SETTINGS).read(shards[0], "000", slice(None), False)


def test_reads_are_copies_of_the_frames_asked_for(cached, sources, backbone, tmp_path):
    shards, out = cached
    store = FeatureStore(out, sources(shards), **SETTINGS)
    features = store.read(shards[0], "000", slice(None), False)["features"]
    assert torch.equal(store.read(shards[0], "000", slice(0, 3, 2), False)["features"], features[::2])
    before = features.clone()
    store.close()
    features += 1
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.read(shards[0], "000", slice(None), False)["features"], before)
    for key, frames in (("000", slice(2, 4)), ("000", slice(3, None)), ("9", slice(0, 1))):
        with pytest.raises(ShardError, match=f"key {key}"):
            store.read(shards[0], key, frames, False)
    cache_features(shards, backbone, tmp_path / "plain", image_size=(8, 12), progress=False)
    with pytest.raises(ShardError, match="mirrored frames"):
        FeatureStore(tmp_path / "plain", sources(shards), **SETTINGS).read(shards[0], "000", slice(0, 1), True)
    with pytest.raises(ConfigError, match="flips"):
        FeatureStore(tmp_path / "plain", sources(shards), **{**SETTINGS, "flips": True})


def loader_options(backbone, out):
    settings = {"batch_size": 2, "clip_length": 2, "image_size": (8, 12), "features": str(out)}
    return {**settings, "mean": backbone.mean, "std": backbone.std}


@pytest.mark.parametrize(("workers", "crop", "batch_size"), [(0, "none", 1), (0, "center", 4), (2, "none", 100)])
def test_batches_bring_the_features_of_their_frames(make_videos, backbone, tmp_path, workers, crop, batch_size):
    """In training mirrored where the frames are, in evaluation padded as they are."""
    shards, settings = make_videos(), {"image_size": (8, 12), "crop": crop, "flips": True, "progress": False}
    report = cache_features(shards, backbone, tmp_path / "out", batch_size=batch_size, **settings)
    assert (report.written, report.kept, report.frames) == (3, 0, 2 * (3 + 4 + 5 + 6 + 7))
    assert max(backbone.calls) <= batch_size
    options = {
        "num_workers": workers,
        "crop": crop,
        "resize_mode": "bicubic",
        **loader_options(backbone, tmp_path / "out"),
    }
    data = ShardDataModule(shards, validation=shards, **options)
    data.setup("fit")
    flips = set()
    loader = data.train_dataloader()
    for epoch in range(3):
        for raw in (*loader, *(data.val_dataloader() if epoch == 0 else ())):
            assert raw["features"].dtype == torch.bfloat16
            flips |= set(raw["flip"].tolist() if "flip" in raw else ())
            batch = data.on_after_batch_transfer(raw, 0)
            wanted = backbone(batch["video"].flatten(0, 1))[0].unflatten(0, batch["video"].shape[:2])
            torch.testing.assert_close(batch["features"], wanted.bfloat16().float(), rtol=2**-7, atol=1e-5)
    assert flips == {False, True}


def test_frames_can_be_left_out_of_training(cached, backbone):
    shards, out = cached
    data = ShardDataModule(shards, num_workers=0, features_only=True, **loader_options(backbone, out))
    with_frames = ShardDataModule(shards, num_workers=0, **loader_options(backbone, out))
    data.setup("fit")
    with_frames.setup("fit")
    for lean, full in zip(data.train_dataloader(), with_frames.train_dataloader(), strict=True):
        assert "video" not in lean
        lean, full = data.on_after_batch_transfer(lean, 0), with_frames.on_after_batch_transfer(full, 0)
        assert set(lean) == {"features", "__key__"}
        assert torch.equal(lean["features"], full["features"])


def test_what_does_not_fit_the_cache_is_refused(cached, backbone, make_videos):
    shards, out = cached
    options = {"num_workers": 0, **loader_options(backbone, out)}
    for changes, match in (
        ({"image_size": (8, 16)}, "image_size"),
        ({"image_size": None}, "image_size"),
        ({"resize_mode": "bilinear"}, "resize_mode"),
        ({"crop": "center"}, "crop"),
        ({"crop": "random"}, "crop"),
        ({"backend": "webdataset"}, "plain local tars for cached features"),
    ):
        with pytest.raises(ConfigError, match=match):
            ShardDataModule(shards, **{**options, **changes}).setup("fit")
    with pytest.raises(ShardError, match="other-000000"):
        ShardDataModule(make_videos(count=3, prefix="other", folder="others"), **options).setup("fit")
    with pytest.raises(ConfigError, match="`sampling` to be 'hashed'"):
        ShardDataModule(shards, sampling="reference", **options)
    with pytest.raises(ConfigError, match="`features` to be set"):
        ShardDataModule(shards, features_only=True)
