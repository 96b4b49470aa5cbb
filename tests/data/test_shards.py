from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ssync_pl.data.shards import ShardWriter, encode_member
from ssync_pl.errors import ConfigError, ShardError


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_equal_samples_give_equal_bytes(make_shards, tmp_path):
    make_shards(folder="a")
    make_shards(folder="b")
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    assert list(_digests(tmp_path / "a")) == [
        "index.json",
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
    ]


def test_webdataset_reads_what_we_write(make_shards, numbered_video, tmp_path):
    wds = pytest.importorskip("webdataset")
    make_shards(count=4)
    urls = sorted(str(path) for path in (tmp_path / "shards").glob("*.tar"))
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["0", "1", "2", "3"]
    with tarfile.open(urls[0]) as tar:
        array = np.load(io.BytesIO(tar.extractfile("1.video.npy").read()))
    assert np.array_equal(array, numbered_video(1)["video.npy"])


def test_two_prefixes_share_one_index(make_shards, tmp_path):
    make_shards("train")
    make_shards("validation", count=2)
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    counts = {shard["name"]: len(shard["samples"]) for shard in index["shards"]}
    assert counts == {"train-000000.tar": 3, "train-000001.tar": 3, "train-000002.tar": 1, "validation-000000.tar": 2}
    assert index["shards"][0]["samples"][0]["frames"] == 6


def test_recipe_is_kept(tmp_path):
    with ShardWriter(tmp_path, "a", recipe={"seed": 3}) as writer:
        writer.write("0", {"info.json": 1})
    with ShardWriter(tmp_path, "b", recipe={"fps": 12}) as writer:
        writer.write("0", {"info.json": 1})
    assert json.loads((tmp_path / "index.json").read_text())["recipe"] == {"seed": 3, "fps": 12}


def test_a_failing_writer_leaves_no_half_file(tmp_path, numbered_video):
    def fail_after(count: int) -> None:
        with ShardWriter(tmp_path, "train", 2) as writer:
            for number in range(count):
                writer.write(str(number), numbered_video(number))
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail_after(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-000000.tar"]


def test_a_refused_member_leaves_the_shard_whole(tmp_path, numbered_video):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("0", numbered_video(0))
        with pytest.raises(ShardError, match=r"video\.npy.*key 1.*array of object"):
            writer.write("1", {"info.json": 1, "video.npy": np.array([None])})
        writer.write("2", numbered_video(2))
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        assert {name.split(".")[0] for name in tar.getnames()} == {"0", "2"}


@pytest.mark.parametrize(
    ("key", "members", "message"),
    [
        ("1.5", {"info.json": 1}, "without dots"),
        ("a/b", {"info.json": 1}, "without dots and slashes"),
        ("", {"info.json": 1}, "without dots"),
        ("0", {"info.json": 1}, "'0' twice"),
        ("1", {}, "at least one member"),
        ("1", {"video.pkl": b""}, "can execute code"),
        ("1", {"video.mp4": np.zeros(3)}, "bytes"),
    ],
)
def test_refused_samples(tmp_path, key, members, message):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("0", {"info.json": 1})
        with pytest.raises(ShardError, match=message):
            writer.write(key, members)


def test_refused_settings(tmp_path, make_shards):
    with pytest.raises(ConfigError, match="`samples_per_shard`"):
        ShardWriter(tmp_path, "train", 0)
    with pytest.raises(ConfigError, match="`prefix`"):
        ShardWriter(tmp_path, "a/b")
    make_shards()
    with pytest.raises(ShardError, match=r"no shards `train-\*\.tar`"):
        ShardWriter(tmp_path / "shards", "train")


def test_a_closed_writer_refuses(tmp_path):
    writer = ShardWriter(tmp_path, "train")
    writer.close()
    writer.close()
    with pytest.raises(ShardError, match="closed"):
        writer.write("0", {"info.json": 1})


def test_gzip_members_carry_no_time(monkeypatch):
    first = encode_member("a.npy.gz", np.zeros(3))
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert encode_member("a.npy.gz", np.zeros(3)) == first
