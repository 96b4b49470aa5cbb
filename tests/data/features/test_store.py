"""When stored features are refused."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ssync_pl.data.features import FeatureStore, cache_features, verify_backbone
from ssync_pl.data.features import recipe as recipe_module
from ssync_pl.data.index import ShardEntry, scan_shard
from ssync_pl.data.shards import ShardWriter
from ssync_pl.errors import ConfigError, ShardError

SETTINGS = {"image_size": (8, 12), "resize_mode": "bicubic", "crop": "none", "flips": False}


@pytest.fixture
def cached(make_videos, backbone, tmp_path):
    """Shards and the folder of their features."""
    shards = make_videos()
    cache_features(shards, backbone, tmp_path / "out", image_size=(8, 12), progress=False)
    return shards, tmp_path / "out"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 12}, r"image_size \(8, 12\) stored, \(12, 12\) set"),
        ({"image_size": None}, r"image_size \(8, 12\) stored, None set"),
        ({"resize_mode": "bilinear"}, "resize_mode 'bicubic' stored, 'bilinear' set"),
        ({"crop": "center"}, "crop 'none' stored, 'center' set"),
        ({"crop": "random"}, "crop moves the picture"),
        ({"flips": True}, "for flip_probability > 0, but it has none.*--flips, or set flip_probability=0"),
    ],
)
def test_other_settings_are_refused(cached, sources, options, message):
    shards, out = cached
    with pytest.raises(ConfigError, match=message):
        FeatureStore(out, sources(shards), **{**SETTINGS, **options})


def test_changed_videos_are_refused_even_at_the_same_size(cached, sources):
    shards, out = cached
    offset = scan_shard(shards[1]).samples[1].members["video.npy"][0]
    with open(shards[1], "r+b") as stream:
        stream.seek(offset + 300)
        byte = stream.read(1)
        stream.seek(offset + 300)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(shards[1], ns=(1, 1))
    with pytest.raises(ShardError, match=r"train-000001.tar to be those .*Delete train-000001.tar there"):
        FeatureStore(out, sources(shards), **SETTINGS)


def test_changed_masks_do_not_matter(cached, sources):
    shards, out = cached
    offset, size = scan_shard(shards[0]).samples[0].members["segmentations.npy.gz"]
    with open(shards[0], "r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(size))
    FeatureStore(out, sources(shards), **SETTINGS)


def test_copied_videos_are_read_once_and_then_trusted(cached, sources, tmp_path, monkeypatch):
    shards, out = cached
    copies = [
        shutil.copy(path, tmp_path / "copies") for path in shards if (tmp_path / "copies").mkdir(exist_ok=True) or 1
    ]
    read = []
    digest = recipe_module._digest
    monkeypatch.setattr(recipe_module, "_digest", lambda path, entry: read.append(path) or digest(path, entry))
    FeatureStore(out, sources(shards), **SETTINGS)
    assert read == []
    FeatureStore(out, sources(copies), **SETTINGS)
    assert sorted(read) == sorted(copies)
    FeatureStore(out, sources(copies), **SETTINGS)
    assert len(read) == 3
    (out / ".verified.json").write_text("[1, {")
    FeatureStore(out, sources(copies), **SETTINGS)
    assert len(read) == 6


def test_missing_features_are_named(cached, sources):
    shards, out = cached
    (out / "train-000002.tar").unlink()
    with pytest.raises(ShardError, match=r"all 3 shards, but 1 are missing \(train-000002.tar"):
        FeatureStore(out, sources(shards), **SETTINGS)
    FeatureStore(out, sources(shards[:2]), **SETTINGS)


def test_mixed_recipes_are_refused(cached, sources, make_backbone, tmp_path):
    shards, out = cached
    cache_features(shards[1:2], make_backbone(seed=3), tmp_path / "b", image_size=(8, 12), progress=False)
    shutil.copy(tmp_path / "b" / "train-000001.tar", out)
    with pytest.raises(ShardError, match=r"train-000001.tar and train-000000.tar differ .weights"):
        FeatureStore(out, sources(shards), **SETTINGS)


def test_what_is_no_cache_is_refused(cached, sources, tmp_path):
    shards, out = cached
    with pytest.raises(ConfigError, match="to be a folder of stored features"):
        FeatureStore(tmp_path / "none", sources(shards), **SETTINGS)
    with pytest.raises(ShardError, match="shard of features"):
        FeatureStore(tmp_path / "videos", sources(shards), **SETTINGS)
    with pytest.raises(ConfigError, match="at least one shard"):
        FeatureStore(out, [], **SETTINGS)
    with pytest.raises(ConfigError, match=r"train-000000.tar twice"):
        FeatureStore(out, sources(shards) + sources(shards), **SETTINGS)
    with pytest.raises(ConfigError, match="Expected local shards"):
        FeatureStore(out, [("https://host/a.tar", ShardEntry("a.tar", 1, ()))], **SETTINGS)


@pytest.mark.parametrize(
    ("old", "new"), [(b'"version": 1', b'"version": 9'), (b'"ssync_pl.features"', b'"other_pl.features"')]
)
def test_other_versions_are_refused(cached, sources, old, new):
    shards, out = cached
    path = out / "train-000000.tar"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(ShardError, match="of another version are made again"):
        FeatureStore(out, sources(shards), **SETTINGS)


def test_a_recipe_with_strange_fields_is_refused(cached, sources):
    shards, out = cached
    path = out / "train-000000.tar"
    path.write_bytes(path.read_bytes().replace(b'"dtype": "bf16"', b'"dtype": "bf17"', 1))
    with pytest.raises(ShardError, match="bf16, int8, but got 'bf17'"):
        FeatureStore(out, sources(shards), **SETTINGS)


def test_damaged_features_are_refused(cached, sources):
    shards, out = cached
    path = out / "train-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    with pytest.raises(ShardError, match="truncated"):
        FeatureStore(out, sources(shards), **SETTINGS)
    path.write_bytes(whole.replace(b"000.features.npy", b"000.featurez.npy"))
    with pytest.raises(ShardError):
        FeatureStore(out, sources(shards), **SETTINGS)


def test_features_of_another_shape_are_refused_when_read(cached, sources):
    shards, out = cached
    recipe = recipe_module.pack_recipe(*recipe_module.read_recipe(out / "train-000000.tar"))
    with ShardWriter(out / "new", "train") as writer:
        writer.write("000", {"features.npy": np.zeros((3, 7, 5), np.uint16)})
        writer.write("001", {"features.npy": np.zeros((4, 6, 5), np.float32)})
    import io
    import tarfile

    with tarfile.open(out / "train-000000.tar", "w") as tar, tarfile.open(out / "new" / "train-000000.tar") as made:
        info = tarfile.TarInfo(recipe_module.RECIPE_MEMBER)
        info.size = len(recipe)
        tar.addfile(info, io.BytesIO(recipe))
        for member in made:
            tar.addfile(member, made.extractfile(member))
    store = FeatureStore(out, sources(shards), **SETTINGS)
    for key in ("000", "001"):
        with pytest.raises(ShardError, match="Expected whole features"):
            store.read("train-000000.tar", key, slice(None), False)


def test_frames_beyond_the_end_are_refused(cached, sources):
    shards, out = cached
    store = FeatureStore(out, sources(shards), **SETTINGS)
    assert len(store.read("train-000000.tar", "000", slice(1, 3), False)["features"]) == 2
    with pytest.raises(ShardError, match="features of 3 only"):
        store.read("train-000000.tar", "000", slice(2, 4), False)
    with pytest.raises(ConfigError, match="mirrored frames"):
        store.read("train-000000.tar", "000", slice(0, 1), True)
    with pytest.raises(ShardError, match="key 9, but it has none"):
        store.read("train-000000.tar", "9", slice(0, 1), False)


def test_entries_may_leave_samples_out(cached, sources):
    shards, out = cached
    fewer = [(path, ShardEntry(entry.name, entry.size, entry.samples[:1])) for path, entry in sources(shards)]
    FeatureStore(out, fewer, **SETTINGS)


def test_reads_are_copies_that_outlive_the_maps(cached, sources):
    shards, out = cached
    store = FeatureStore(out, sources(shards), **SETTINGS)
    features = store.read("train-000000.tar", "000", slice(None), False)["features"]
    before = features.clone()
    store.close()
    features += 1
    assert torch.equal(store.read("train-000000.tar", "000", slice(None), False)["features"], before)


class Clips(Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.store.read("train-000000.tar", f"{index:03d}", slice(0, 2), False)


def test_workers_open_maps_of_their_own(cached, sources):
    shards, out = cached
    store = FeatureStore(out, sources(shards), **SETTINGS)
    alone = next(iter(DataLoader(Clips(store), batch_size=2)))["features"]
    assert alone.dtype == torch.bfloat16
    forked = DataLoader(Clips(store), batch_size=2, num_workers=1, multiprocessing_context="fork")
    assert torch.equal(next(iter(forked))["features"], alone)
    again = pickle.loads(pickle.dumps(store))
    assert not again._reader._maps
    assert torch.equal(next(iter(DataLoader(Clips(again), batch_size=2)))["features"], alone)


def test_a_read_only_folder_is_enough(cached, sources, monkeypatch):
    shards, out = cached
    (out / ".verified.json").unlink()
    monkeypatch.setattr(recipe_module, "write_bytes", lambda path, content: (_ for _ in ()).throw(PermissionError(13)))
    FeatureStore(out, sources(shards), **SETTINGS)
    assert not (out / ".verified.json").exists()


def test_the_backbone_is_held_to_the_recipe(cached, sources, make_backbone):
    shards, out = cached
    recipe = FeatureStore(out, sources(shards), **SETTINGS).recipe
    verify_backbone(recipe, make_backbone())
    with pytest.raises(ConfigError, match=r"weights: \w{12}… stored, \w{12}… wanted"):
        verify_backbone(recipe, make_backbone(seed=1))
    with pytest.raises(ConfigError, match="layer: conv stored, other wanted"):
        verify_backbone(recipe, make_backbone(layer="other"))
    moved = make_backbone()
    moved.mean = (0.0, 0.0, 0.0)
    with pytest.raises(ConfigError, match="mean:"):
        verify_backbone(recipe, moved)
    finer = make_backbone()
    finer.grid_for = lambda height, width: (height // 2, width // 2)
    with pytest.raises(ConfigError, match=r"grid: \(2, 3\) stored, \(4, 6\) wanted"):
        verify_backbone(recipe, finer)
    tagged = make_backbone()
    tagged.name = "corners.tag"
    verify_backbone(recipe, tagged)
    with pytest.raises(ConfigError, match="unusable"):
        verify_backbone({**recipe, "grid": [2]}, tagged)


def test_importing_the_store_is_cheap():
    import subprocess
    import sys

    code = "import ssync_pl.data.features.store, sys; print([m for m in ('lightning', 'timm') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert Path(recipe_module.__file__).exists()
