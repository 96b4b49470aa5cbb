import os
import pickle
import shutil

import pytest
import torch

from ssync_pl.data import ShardDataModule
from ssync_pl.data.features.cache import cache_features
from ssync_pl.data.features.store import FeatureStore
from ssync_pl.data.index import ShardEntry, scan_shard
from ssync_pl.errors import ConfigError, ShardError

SETTINGS = {"image_size": (8, 12), "resize_mode": "bicubic", "crop": "none", "flips": False}
MADE = {"image_size": (8, 12), "flips": True}


@pytest.fixture
def cached(make_videos, backbone, tmp_path):
    """Shards and the folder of their features, also of mirrored frames."""
    shards = make_videos()
    cache_features(shards, backbone, tmp_path / "out", **MADE)
    return shards, tmp_path / "out"


@pytest.fixture
def opened(cached, sources):
    """Open the store of some shards, all of them by default."""
    return lambda shards=None, folder=cached[1], **changes: FeatureStore(
        folder, sources(cached[0] if shards is None else shards), **{**SETTINGS, **changes}
    )


def test_changed_videos_are_refused_even_at_the_same_size_but_masks_do_not_matter(cached, opened):
    shards, _ = cached
    offset, size = scan_shard(shards[0]).samples[0].members["segmentations.npy.gz"]
    with open(shards[0], "r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(size))
    opened()
    with open(shards[1], "r+b") as stream:
        stream.seek(scan_shard(shards[1]).samples[1].members["video.npy"][0] + 300)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(shards[1], ns=(1, 1))
    with pytest.raises(ShardError, match=r"other videos, first .*train-000001\.tar"):
        opened()


def test_missing_mixed_and_foreign_features_are_named(cached, opened, sources, make_backbone, tmp_path):
    shards, out = cached
    for options in ({"folder": tmp_path / "none"}, {"shards": []}):
        with pytest.raises(ConfigError, match="folder of stored features"):
            opened(**options)
    with pytest.raises(ShardError, match="shard of features"):
        opened(folder=tmp_path / "videos")
    cache_features(shards[1:2], make_backbone(seed=3), tmp_path / "b", **MADE)
    shutil.copy(tmp_path / "b" / "train-000001.tar", out)
    with pytest.raises(ConfigError, match=r"train-000001.tar .*weights"):
        opened()
    (out / "train-000002.tar").unlink()
    with pytest.raises(ShardError, match=r"train-000002\.tar"):
        opened()
    fewer = [(path, ShardEntry(entry.name, entry.size, entry.samples[:1])) for path, entry in sources(shards[:1])]
    FeatureStore(out, fewer, **SETTINGS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"version": 1', b'"version": 9', r"train-000000\.tar"),
        (b'"ssync_pl.features"', b'"other_pl.features"', r"train-000000\.tar"),
        (b'"dtype": "bf16"', b'"dtype": "int8"', r"train-000000\.tar"),
        (b'{"format"', b'["format"', r"train-000000\.tar"),
        (None, None, r"train-000000\.tar"),
        (b"'shape': (3, 6, 5)", b"'shape': (3, 5, 6)", "bfloat16"),
        (b"'descr': '<u2'", b"'descr': '<i2'", "bfloat16"),
    ],
)
def test_other_versions_and_damage_are_refused(cached, opened, old, new, message):
    shards, path = cached[0], cached[1] / "train-000000.tar"
    path.write_bytes(path.read_bytes().replace(old, new, 1) if old else path.read_bytes()[:3000])
    with pytest.raises(ShardError, match=message):
        opened().read(shards[0], "000", slice(None), False)


def test_reads_are_copies_of_the_frames_asked_for(cached, opened, backbone, tmp_path):
    shards, _ = cached
    store = opened()
    features = store.read(shards[0], "000", slice(None), False)["features"]
    assert torch.equal(store.read(shards[0], "000", slice(0, 3, 2), False)["features"], features[::2])
    before = features.clone()
    features += 1
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.read(shards[0], "000", slice(None), False)["features"], before)
    for key, frames in (("000", slice(2, 4)), ("000", slice(3, None)), ("9", slice(0, 1))):
        with pytest.raises(ShardError, match=f"key {key}"):
            store.read(shards[0], key, frames, False)
    cache_features(shards, backbone, tmp_path / "plain", **{**MADE, "flips": False})
    with pytest.raises(ShardError, match="mirrored frames"):
        opened(folder=tmp_path / "plain").read(shards[0], "000", slice(0, 1), True)
    with pytest.raises(ConfigError, match="flips"):
        opened(folder=tmp_path / "plain", flips=True)


def options(backbone, out):
    settings = {"batch_size": 2, "clip_length": 2, "image_size": (8, 12), "features": str(out), "num_workers": 0}
    return {**settings, "mean": backbone.mean, "std": backbone.std}


@pytest.mark.parametrize(("workers", "crop", "batch_size"), [(0, "none", 1), (0, "center", 4), (2, "none", 100)])
def test_batches_bring_the_features_of_their_frames(make_videos, backbone, tmp_path, workers, crop, batch_size):
    """In training mirrored where the frames are, in evaluation padded as they are; frames can be left out."""
    shards, out = make_videos(), tmp_path / "out"
    report = cache_features(shards, backbone, out, batch_size=batch_size, crop=crop, **MADE)
    assert (report.written, report.kept, report.frames) == (3, 0, 2 * (3 + 4 + 5 + 6 + 7))
    assert max(backbone.calls) <= batch_size
    settings = {**options(backbone, out), "num_workers": workers, "crop": crop, "resize_mode": "bicubic"}
    settings["validation"] = shards
    data, full, lean = (ShardDataModule(shards, features_only=only, **settings) for only in (False, False, True))
    for module in (data, full, lean):
        module.setup("fit")
    flips, loader = set(), data.train_dataloader()
    for epoch in range(3):
        for raw in (*loader, *(data.val_dataloader() if epoch == 0 else ())):
            assert raw["features"].dtype == torch.bfloat16
            flips |= set(raw["flip"].tolist() if "flip" in raw else ())
            batch = data.on_after_batch_transfer(raw, 0)
            wanted = backbone(batch["video"].flatten(0, 1))[0].unflatten(0, batch["video"].shape[:2])
            torch.testing.assert_close(batch["features"], wanted.bfloat16().float(), rtol=2**-7, atol=1e-5)
    assert flips == {False, True}
    for raw, whole in zip(lean.train_dataloader(), full.train_dataloader(), strict=True):
        assert "video" not in raw
        batch = lean.on_after_batch_transfer(raw, 0)
        assert set(batch) == {"features", "__key__"}
        assert torch.equal(batch["features"], full.on_after_batch_transfer(whole, 0)["features"])


def test_what_does_not_fit_the_cache_is_refused(cached, backbone, make_videos):
    shards, out = cached
    settings = options(backbone, out)
    for changes, match in (
        ({"image_size": (8, 16)}, "image_size"),
        ({"image_size": None}, "image_size"),
        ({"resize_mode": "bilinear", "crop": "center"}, "resize_mode.*crop"),
        ({"crop": "random"}, "crop"),
        ({"backend": "webdataset"}, "plain local tars for cached features"),
    ):
        with pytest.raises(ConfigError, match=match):
            ShardDataModule(shards, **{**settings, **changes}).setup("fit")
    with pytest.raises(ShardError, match="other-000000"):
        ShardDataModule(make_videos(count=3, prefix="other", folder="others"), **settings).setup("fit")
    with pytest.raises(ConfigError, match="`sampling` to be 'hashed'"):
        ShardDataModule(shards, sampling="reference", **settings)
    with pytest.raises(ConfigError, match="`features` to be set"):
        ShardDataModule(shards, features_only=True)
