"""Writing shards, and reading their members in place."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ssync_pl.data import ShardDataModule
from ssync_pl.data.index import load_shards
from ssync_pl.data.shards import ShardReader, ShardWriter, encode_member
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


@pytest.fixture
def opened(make_shards):
    paths = sorted(str(path) for path in Path(make_shards(count=7, per_shard=2)).parent.glob("*.tar"))
    return paths, load_shards(paths)


def test_members_are_read_in_place_and_files_closed(opened, numbered_video):
    paths, shards = opened
    reader = ShardReader(max_open=2)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for path, shard in zip(paths, shards, strict=True):
        for sample in shard.samples:
            members = reader.sample(path, shard, sample)
            video = numbered_video(int(sample.key))["video.npy"]
            assert members.header("video.npy").shape == video.shape
            for cut in (slice(None), slice(3, 4), slice(1, 6, 2), slice(4, 4)):
                np.testing.assert_array_equal(members.rows("video.npy", cut), video[cut])
            np.testing.assert_array_equal(members.decode("video.npy"), video)
    reader.close()
    assert not before or len(os.listdir("/proc/self/fd")) == before
    copy = pickle.loads(pickle.dumps(reader))
    assert len(copy.member(paths[0], shards[0], shards[0].samples[0], "video.npy")) > 0


def _last_bytes(reader, path, shard, queue):
    queue.put(bytes(reader.member(path, shard, shard.samples[1], "video.npy")[-3:]))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_a_fork_reads_with_inherited_files(opened):
    paths, shards = opened
    reader = ShardReader()
    here = bytes(reader.member(paths[0], shards[0], shards[0].samples[1], "video.npy")[-3:])
    queue = multiprocessing.get_context("fork").Queue()
    process = multiprocessing.get_context("fork").Process(target=_last_bytes, args=(reader, paths[0], shards[0], queue))
    process.start()
    assert queue.get(timeout=120) == here
    process.join()


def test_replaced_shards_are_refused(opened):
    paths, shards = opened
    data = Path(paths[0]).read_bytes()
    Path(paths[0]).write_bytes(data + bytes(512))
    with pytest.raises(ShardError, match=f"{len(data)} bytes"):
        ShardReader().member(paths[0], shards[0], shards[0].samples[0], "video.npy")
    Path(paths[0]).write_bytes(Path(paths[1]).read_bytes())
    with pytest.raises(ShardError, match="key 0 at byte"):
        ShardReader().member(paths[0], shards[0], shards[0].samples[0], "video.npy")


@pytest.mark.parametrize("skip", ["raise", "skip"])
def test_a_shard_that_is_cut_off_while_it_is_read_is_an_error_and_no_crash(make_shards, skip):
    pattern = make_shards(count=8, per_shard=8)
    data = ShardDataModule(pattern, batch_size=1, clip_length=2, num_workers=0, on_bad_sample=skip)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    os.truncate(pattern.replace("*", "000000"), 2048)
    with pytest.raises(ShardError, match=r"train-000000\.tar"):
        list(batches)


def test_hard_and_symbolic_links_are_read_as_what_they_point_to(tmp_path, numbered_video):
    video = encode_member("video.npy", numbered_video(5)["video.npy"])
    with tarfile.open(tmp_path / "a-000000.tar", "w") as tar:
        info = tarfile.TarInfo("sub/0.video.npy")
        info.size = len(video)
        tar.addfile(info, io.BytesIO(video))
        links = (
            ("1", tarfile.LNKTYPE, info.name),
            ("sub/2", tarfile.SYMTYPE, "0.video.npy"),
            ("3", tarfile.LNKTYPE, "x"),
        )
        for key, kind, target in links:
            link = tarfile.TarInfo(f"{key}.video.npy")
            link.type, link.linkname = kind, target
            tar.addfile(link)
    for _ in range(2):  # scanned, and from the index
        (entry,) = load_shards([tmp_path / "a-000000.tar"])
        assert [sample.key for sample in entry.samples] == ["sub/0", "1", "sub/2"]
        assert entry.ignored == ("3.video.npy",)
        for sample in entry.samples:
            found = ShardReader().sample(str(tmp_path / "a-000000.tar"), entry, sample).decode("video.npy")
            np.testing.assert_array_equal(found, numbered_video(5)["video.npy"])
