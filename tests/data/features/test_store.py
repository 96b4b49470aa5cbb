"""When stored features are refused, and how they are read."""

import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ssync_pl.data.features import FeatureStore, cache_features, decode_features, encode_features, verify_backbone
from ssync_pl.data.features import recipe as recipe_module
from ssync_pl.data.index import ShardEntry, scan_shard
from ssync_pl.errors import ConfigError, ShapeError, ShardError

SETTINGS = {"image_size": (8, 12), "resize_mode": "bicubic", "crop": "none", "flips": False}


@pytest.fixture
def cached(make_videos, backbone, tmp_path):
    """Shards and the folder of their features."""
    shards = make_videos()
    cache_features(shards, backbone, tmp_path / "out", image_size=(8, 12), progress=False)
    return shards, tmp_path / "out"


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_encoding_is_as_close_as_promised(dtype):
    features = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 9, 1e-3, 0, 1e4])
    stored = encode_features(features, dtype)
    found = decode_features(stored)
    step = features.abs() * 2**-8 if dtype == "bf16" else features.abs().amax(-2, keepdim=True) / 127 / 2
    assert bool(((found - features).abs() <= step * 1.001 + 1e-30).all())
    assert decode_features(stored, torch.float16).dtype == torch.float16
    with pytest.raises(ConfigError, match="fp8"):
        encode_features(features, "fp8")
    for batch in ({}, {"features": features}, {"features": features.to(torch.int8)}):
        with pytest.raises(ShapeError):
            decode_features(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 12}, "image_size"),
        ({"image_size": None}, "image_size"),
        ({"resize_mode": "bilinear"}, "resize_mode"),
        ({"crop": "center"}, "crop"),
        ({"crop": "random"}, "crop"),
        ({"flips": True}, "flip_probability"),
    ],
)
def test_other_settings_are_refused(cached, sources, options, message):
    shards, out = cached
    with pytest.raises(ConfigError, match=message):
        FeatureStore(out, sources(shards), **{**SETTINGS, **options})


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
    with pytest.raises(ConfigError, match="folder of stored features"):
        FeatureStore(tmp_path / "none", sources(shards), **SETTINGS)
    with pytest.raises(ConfigError, match="at least one shard"):
        FeatureStore(out, [], **SETTINGS)
    with pytest.raises(ShardError, match="shard of features"):
        FeatureStore(tmp_path / "videos", sources(shards), **SETTINGS)
    with pytest.raises(ConfigError, match="once"):
        FeatureStore(out, sources(shards) + sources(shards), **SETTINGS)
    with pytest.raises(ConfigError, match="local"):
        FeatureStore(out, [("https://host/a.tar", ShardEntry("a.tar", 1, ()))], **SETTINGS)
    cache_features(shards[1:2], make_backbone(seed=3), tmp_path / "b", image_size=(8, 12), progress=False)
    shutil.copy(tmp_path / "b" / "train-000001.tar", out)
    with pytest.raises(ShardError, match=r"train-000001.tar and train-000000.tar differ .weights"):
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
        (b'"dtype": "bf16"', b'"dtype": "bf17"'),
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
    ("old", "new"),
    [
        (b"000.features.npy", b"000.featurez.npy"),
        (b"'shape': (3, 6, 5)", b"'shape': (3, 5, 6)"),
        (b"'descr': '<u2'", b"'descr': '<i2'"),
    ],
)
def test_damaged_features_are_refused_when_read(cached, sources, old, new):
    shards, out = cached
    path = out / "train-000000.tar"
    data = path.read_bytes()
    assert old in data
    damaged = bytearray(data.replace(old, new))
    for at in range(0, len(damaged), 512):  # tar headers have a checksum
        if damaged[at : at + len(new)] == new and new.startswith(b"000"):
            damaged[at + 148 : at + 156] = b" " * 8
            damaged[at + 148 : at + 156] = b"%06o\0 " % sum(damaged[at : at + 512])
    path.write_bytes(damaged)
    store = FeatureStore(out, sources(shards), **SETTINGS)
    with pytest.raises(ShardError, match="whole features"):
        store.read(shards[0], "000", slice(None), False)


def test_reads_are_copies_of_the_frames_asked_for(cached, sources):
    shards, out = cached
    store = FeatureStore(out, sources(shards), **SETTINGS)
    features = store.read(shards[0], "000", slice(None), False)["features"]
    assert torch.equal(store.read(shards[0], "000", slice(0, 3, 2), False)["features"], features[::2])
    before = features.clone()
    store.close()
    features += 1
    assert torch.equal(store.read(shards[0], "000", slice(None), False)["features"], before)
    with pytest.raises(ShardError, match="features of 3 only"):
        store.read(shards[0], "000", slice(2, 4), False)
    with pytest.raises(ConfigError, match="mirrored frames"):
        store.read(shards[0], "000", slice(0, 1), True)
    with pytest.raises(ShardError, match="key 9"):
        store.read(shards[0], "9", slice(0, 1), False)


class Clips(Dataset):
    def __init__(self, store, shard):
        self.store, self.shard = store, shard

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.store.read(self.shard, f"{index:03d}", slice(0, 2), False)


def test_workers_open_maps_of_their_own(cached, sources):
    shards, out = cached
    clips = Clips(FeatureStore(out, sources(shards), **SETTINGS), shards[0])
    alone = next(iter(DataLoader(clips, batch_size=2)))["features"]
    assert alone.dtype == torch.bfloat16
    forked = DataLoader(clips, batch_size=2, num_workers=1, multiprocessing_context="fork")
    assert torch.equal(next(iter(forked))["features"], alone)
    again = pickle.loads(pickle.dumps(clips))
    assert torch.equal(next(iter(DataLoader(again, batch_size=2)))["features"], alone)


def test_the_backbone_is_held_to_the_recipe(cached, sources, make_backbone):
    shards, out = cached
    recipe = FeatureStore(out, sources(shards), **SETTINGS).recipe
    verify_backbone(recipe, make_backbone())
    tagged, moved, finer = make_backbone(), make_backbone(), make_backbone()
    tagged.name, moved.mean = "corners.tag", (0.0, 0.0, 0.0)
    finer.grid_for = lambda height, width: (height // 2, width // 2)
    verify_backbone(recipe, tagged)
    wrong = [("weights", make_backbone(seed=1)), ("layer", make_backbone(layer="other")), ("mean", moved)]
    for message, backbone in (*wrong, ("grid", finer)):
        with pytest.raises(ConfigError, match=message):
            verify_backbone(recipe, backbone)
    with pytest.raises(ConfigError, match="unusable"):
        verify_backbone({**recipe, "grid": [2]}, tagged)


def test_importing_the_store_is_cheap():
    code = "import ssync_pl.data.features.store, sys; print([m for m in ('lightning', 'timm') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
