import os

import numpy as np
import pytest
import torch

from ssync_pl.data.features.cache import cache_features
from ssync_pl.data.features.store import FeatureStore
from ssync_pl.data.shards import ShardWriter
from ssync_pl.errors import ConfigError, ShardError

SIZE, MAP = (8, 12), "projection.npz"


def run(shards, backbone, out, **options):
    return cache_features(shards, backbone, out, **{"image_size": SIZE, **options})


def read(sources, out, shard, key, frames=slice(None), flip=False):
    store = FeatureStore(out, sources, image_size=SIZE, resize_mode="bicubic", crop="none", flips=flip)
    return store.read(shard, key, frames, flip)["features"].float()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".npz")}


@pytest.mark.parametrize("components", [None, 3])
def test_the_same_call_again_computes_nothing_and_a_second_set_joins(make_videos, backbone, tmp_path, components):
    train, validation, out = make_videos(), make_videos(1, prefix="validation"), tmp_path / "out"
    run(train, backbone, out, components=components)
    before = files(out)
    assert run(validation, backbone, out, components=components).written == 1
    backbone.calls.clear()
    report = run(train, backbone, out, components=components)
    assert (report.written, report.kept, report.frames) == (0, 3, 0)
    assert backbone.calls == [1]  # asks for the grid
    assert before.items() <= files(out).items()


def test_sets_whose_shards_have_the_same_names_share_a_folder(make_videos, sources, backbone, tmp_path):
    one, other = make_videos(2, prefix="videos"), make_videos(2, prefix="videos", folder="other", size=(16, 12))
    out = tmp_path / "out"
    run(one, backbone, out)
    before = files(out)
    assert run(other, backbone, out).written == 1
    assert before.items() <= files(out).items()
    assert run([*other, *one], backbone, out).kept == 2
    run(other, backbone, tmp_path / "alone")
    both, wanted = sources([*one, *other]), read(sources(other), tmp_path / "alone", other[0], "001")
    assert torch.equal(read(both, out, other[0], "001"), wanted)
    assert not torch.equal(read(both, out, one[0], "001"), wanted)


@pytest.mark.parametrize(
    ("call", "components", "left"),
    [(6, None, ["train-000000.tar"]), (3, 3, []), (13, 3, [MAP]), (16, 3, [MAP, "train-000000.tar"])],
)
def test_goes_on_after_a_kill(make_videos, make_backbone, sources, tmp_path, call, components, left):
    """Killed while it fits or stores: the next call keeps what is whole and gives the same bytes as one run."""
    shards, dying, options = make_videos(), make_backbone(), {"batch_size": 3, "components": components}

    def die():
        if len(dying.calls) == call:
            raise KeyboardInterrupt

    dying.before = die
    with pytest.raises(KeyboardInterrupt):
        run(shards, dying, tmp_path / "out", **options)
    assert sorted(name for name in os.listdir(tmp_path / "out") if name != ".verified.json") == left
    with pytest.raises(ShardError, match="goes on where it stopped"):
        read(sources(shards), tmp_path / "out", shards[0], "000")
    run(shards, make_backbone(), tmp_path / "out", **options)
    run(shards, make_backbone(), tmp_path / "whole", **options)
    assert files(tmp_path / "whole") == files(tmp_path / "out")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"image_size": 8, "resize_mode": "bilinear", "crop": "center"}, "image_size.*resize_mode.*crop"),
        ({}, {"flips": True}, "flips"),
        ({}, {"seed": 1}, "weights"),
        ({}, {"layer": "other"}, "layer"),
        ({}, {"components": 3}, r"projection\.npz beside the features"),
        ({"components": 3}, {}, "components: 3 there, 0 wanted"),
        ({"components": 3}, {"components": 2}, "components: 3 there, 2 wanted"),
        ({"components": 3}, {"components": 3, "seed": 1, "image_size": 16}, "weights.*image_size"),
        ({"components": 3}, {"components": 3, "flips": True}, "flips"),
    ],
)
def test_another_recipe_needs_another_folder(make_videos, make_backbone, tmp_path, first, second, message):
    shards = make_videos(2)
    run(shards, make_backbone(), tmp_path / "out", **first)
    before = files(tmp_path / "out")
    other = make_backbone(**{name: second.pop(name) for name in ("seed", "layer") if name in second})
    with pytest.raises(ConfigError, match=message):
        run(shards, other, tmp_path / "out", **second)
    assert files(tmp_path / "out") == before


def test_foreign_and_damaged_files_are_never_replaced(make_videos, backbone, tmp_path):
    shards = make_videos(1)
    before = files(tmp_path / "videos")
    with pytest.raises(ShardError, match="shard of features"):
        run(shards, backbone, tmp_path / "videos")
    assert files(tmp_path / "videos") == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".verified.json").write_text('{"mine": 1}')
    (tmp_path / "out" / ".features.tmp").write_text("what a killed call left")
    for _ in range(2):
        run(shards, backbone, tmp_path / "out")
    assert (tmp_path / "out" / ".verified.json").read_text() == '{"mine": 1}'
    assert not (tmp_path / "out" / ".features.tmp").exists()
    path = tmp_path / "out" / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:2100])
    with pytest.raises(ShardError, match=r"out/train-000000\.tar"):
        run(shards, backbone, tmp_path / "out")


@pytest.mark.parametrize("components", [None, 2])
def test_bad_videos_are_named_and_refused_or_left_out(sources, make_backbone, tmp_path, components):
    """Videos and pictures of any size share a cache."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3), dtype=np.uint8)
    with ShardWriter(tmp_path / "videos", "train") as writer:
        writer.write("0", {"image.npy": noise[0, :9, :9]})
        writer.write("1", {"video.npy": np.zeros((2, 8, 8, 3), np.float32)})
        writer.write("2", {"info.json": {}})
        writer.write("3", {"video.npy.gz": noise})
    shards, out, broken = [str(tmp_path / "videos" / "train-000000.tar")], tmp_path / "out", make_backbone()
    broken.conv.bias[1] = float("nan")
    for backbone, message in ((broken, "key 0, but got NaN"), (make_backbone(), "key 1")):
        with pytest.raises(ShardError, match=message):
            run(shards, backbone, out, components=components)
        assert not files(out)
    report = run(shards, make_backbone(), out, on_bad_sample="skip", components=components)
    assert [name in message for name, message in zip(("key 1", "key 2"), report.skipped, strict=True)] == [True, True]
    shapes = [read(sources(shards), out, shards[0], key).shape for key in "03"]
    assert shapes == [(frames, 6, components or 5) for frames in (1, 5)]
    with pytest.raises(ShardError, match="key 1, but got none"):
        read(sources(shards), out, shards[0], "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "random"}, "random"),
        ({"batch_size": 0}, "batch_size"),
        ({"on_bad_sample": "ignore"}, "ignore"),
        ({"resize_mode": "area"}, "bilinear"),
        ({"components": 0}, "from 1 to 5"),
        ({"components": 6}, "from 1 to 5"),
        ({"shards": ["https://host/a.tar"]}, "Download"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(make_videos, backbone, tmp_path, options, message):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=message):
        run(options.pop("shards", None) or make_videos(1), backbone, tmp_path / "out", **options)
    assert not files(tmp_path / "out")
