import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ssync_pl.data import index as module
from ssync_pl.data.check import check_shards
from ssync_pl.data.index import load_shards, parse_index, read_index, scan_shard, write_index
from ssync_pl.data.remote import stream_shard
from ssync_pl.data.shards import ShardWriter, encode_member, sample_members
from ssync_pl.errors import ConfigError, ShardError


def _shards(pattern: str) -> list[Path]:
    return sorted(Path(pattern).parent.glob(Path(pattern).name))


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_equal_samples_give_equal_bytes_that_webdataset_reads(make_shards, numbered_video, tmp_path, monkeypatch):
    wds = pytest.importorskip("webdataset")
    make_shards(folder="a")
    monkeypatch.setattr("time.time", lambda: 1e9)
    make_shards(folder="b")
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    assert list(_digests(tmp_path / "a")) == ["index.json", *(f"train-00000{n}.tar" for n in range(3))]
    urls = [str(path) for path in _shards(f"{tmp_path}/a/train-*.tar")]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == list("0123456")
    array = np.load(io.BytesIO(samples[1]["video.npy"]))
    assert np.array_equal(array, numbered_video(1)["video.npy"])


def test_a_failing_writer_leaves_no_half_file_and_a_refused_member_a_whole_shard(tmp_path, numbered_video):
    writer = ShardWriter(tmp_path, "train", 2)
    for number in range(3):
        writer.write(str(number), numbered_video(number))
    writer.__exit__(KeyError, KeyError("stop"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]
    with ShardWriter(tmp_path, "more") as writer:
        writer.write("0", numbered_video(0))
        with pytest.raises(ShardError, match=r"video\.npy.*key 1"):
            writer.write("1", {"info.json": 1, "video.npy": np.array([None])})
        writer.write("2", numbered_video(2))
    with tarfile.open(tmp_path / "more-000000.tar") as tar:
        assert {name.split(".")[0] for name in tar.getnames()} == {"0", "2"}


@pytest.mark.parametrize(
    ("key", "members", "message"),
    [
        *((key, {"info.json": 1}, "without dots") for key in ("1.5", "a/b", "", "__x__")),
        ("0", {"info.json": 1}, "'0' twice"),
        ("1", {}, "at least one member"),
        ("1", {"video.pkl": b""}, "can execute code"),
        ("1", {"video.mp4": np.zeros(3)}, "bytes"),
    ],
)
def test_refused_samples_and_writers(tmp_path, make_shards, key, members, message):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("0", {"info.json": 1})
        with pytest.raises(ShardError, match=message):
            writer.write(key, members)
    writer.close()
    with pytest.raises(ShardError, match="closed"):
        writer.write("9", {"info.json": 1})

    for prefix, per_shard, name in (("train", 0, "samples_per_shard"), ("a/b", 1, "prefix")):
        with pytest.raises(ConfigError, match=name):
            ShardWriter(tmp_path, prefix, per_shard)
    with pytest.raises(ShardError, match="no shards"):
        ShardWriter(Path(make_shards()).parent, "train")


def test_shards_without_an_index_are_scanned_and_saved(write_tar, npy_bytes, tmp_path, monkeypatch):
    video = npy_bytes(np.zeros((24, 4, 4, 3), np.uint8))
    members = {"./": b"", "0.video.npy.gz": gzip.compress(video), "0.segmentations.npy": b"x"}
    members |= {"__meta__/0.video.npy": b"x", "1.Video.NPY": video, "README": b"x"}
    (entry,) = load_shards([write_tar(members)])
    found = {sample.key: sorted(sample.members) for sample in entry.samples}
    assert found == {"0": ["segmentations.npy", "video.npy.gz"], "1": ["video.npy"]}
    assert read_index(tmp_path).shards == {entry.name: entry}
    (tmp_path / "index.json").unlink()
    monkeypatch.setattr(module, "write_bytes", lambda *args: os.stat("/nowhere"))  # a read-only folder
    assert load_shards([tmp_path / entry.name]) == [entry]


def test_stale_entries_are_rebuilt(make_shards, write_tar, npy_bytes, tmp_path):
    path = _shards(make_shards(count=3))[0]
    # Same length, but the last sample has another key.
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-2]
    changed = tarfile.TarInfo(last.name.replace("2.", "5.", 1))
    changed.size = last.size
    path.write_bytes(data[: last.offset] + changed.tobuf(tarfile.USTAR_FORMAT) + data[last.offset + 512 :])
    assert "5" in [sample.key for sample in load_shards([path])[0].samples]
    os.replace(write_tar({"9.video.npy": npy_bytes(np.zeros((4, 2, 2, 3), np.uint8))}, "new.tar"), path)
    (entry,) = load_shards([path])
    assert [sample.key for sample in entry.samples] == ["9"]
    assert read_index(path.parent).shards[path.name] == entry


@pytest.mark.parametrize("extra", [{}, {"./": b"", "a/0.video.npy": b"x", "README": b"x" * 5000, "z": b"x"}])
def test_an_index_that_leaves_samples_out_is_built_again_and_said(make_shards, write_tar, tmp_path, extra, caplog):
    path = write_tar({**extra, "README2": b"x"}) if extra else _shards(make_shards(count=3))[0]
    (whole,) = load_shards([path])
    assert load_shards([path]) == [whole]
    assert not caplog.messages
    for left_out in range(len(whole.samples)):
        kept = [sample for number, sample in enumerate(whole.samples) if number != left_out]
        write_index(path.parent, [replace(whole, samples=tuple(kept))])
        assert load_shards([path]) == [whole]
    assert "does not name what the shard holds" in caplog.text


FOREIGN = ["{", "[]", "{}", '{"format": "x", "version": 1}', "[" * 100_000, "\xff", '{"version": 2, "shards": [{}]}']


@pytest.mark.parametrize("text", FOREIGN)
def test_a_foreign_index_is_left_alone_and_ours_goes_beside_it(make_shards, text):
    paths = _shards(make_shards())
    expected, folder = load_shards(paths), paths[0].parent
    (folder / "index.json").write_text(text)
    assert load_shards(paths) == load_shards(paths) == expected
    with ShardWriter(folder, "more") as writer:
        writer.write("0", {"info.json": 1})
    assert len(read_index(folder).shards) == len(paths) + 1
    (folder / "ssync_index.json").write_text(text)
    assert load_shards(paths) == expected
    assert {(folder / name).read_text() for name in ("index.json", "ssync_index.json")} == {text}


def test_our_own_index_of_another_version_is_replaced_and_offsets_are_checked(make_shards, tmp_path, caplog):
    paths = _shards(make_shards())
    expected = load_shards(paths)
    (paths[0].parent / "index.json").write_text('{"format": "ssync_pl.shards", "version": 99}')
    assert load_shards(paths) == expected
    assert len(read_index(paths[0].parent).shards) == len(paths)
    assert not caplog.messages
    raw = {"format": "ssync_pl.shards", "version": 1, "recipe": {}, "shards": []}
    raw["shards"] = [{"name": "a.tar", "size": 1000, "samples": [{"key": "0", "members": {"video.npy": [512, 600]}}]}]
    with pytest.raises(ShardError, match="outside"):
        parse_index(json.dumps(raw))


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_shards_that_are_not_whole_are_refused_wherever_they_end(make_shards, tmp_path, pack):
    path = _shards(make_shards(count=3))[0]
    data, packed = path.read_bytes(), pack is not bytes
    with tarfile.open(path) as tar:
        ends = [*(member.offset for member in tar.getmembers()), tar.offset]
    whole = pack(data)
    broken = [pack(data[:keep]) for keep in (0, 100, 600, *ends[1:], ends[-2] + 512, ends[-1] - 1)]
    for content in (*broken, pack(data[: ends[-2]] + b"garbage" * 200), whole[: len(whole) * 2 // 3]):
        path.write_bytes(content)
        with pytest.raises(ShardError, match=r"train-000000\.tar to be a whole .*unpack"):
            scan_shard(path, packed=packed)
        with pytest.raises(ShardError, match=r"train-000000\.tar to be a whole .*packed"):
            list(stream_shard(str(path)))
    path.write_bytes(pack(data[: ends[-1] + 512]))  # one block of the two that mark the end is enough
    assert len(scan_shard(path, packed=packed).samples) == len(list(stream_shard(str(path)))) == 3
    path.write_bytes(gzip.compress(data))
    with pytest.raises(ShardError, match="unpack"):
        scan_shard(path)
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("0.info.json"))
    for read in (scan_shard, lambda path: list(stream_shard(str(path)))):
        with pytest.raises(ShardError, match="twice"):
            read(path)


def test_odd_names_are_read_and_links_and_special_members_named(tmp_path, numbered_video, caplog):
    video, path = encode_member("video.npy", numbered_video(5)["video.npy"]), tmp_path / "a-000000.tar"
    kinds = [("sub/0", tarfile.REGTYPE), ("\udcff", tarfile.REGTYPE), ("1", tarfile.LNKTYPE), ("2", tarfile.FIFOTYPE)]
    with tarfile.open(path, "w") as tar:
        for name, kind in kinds:
            info = tarfile.TarInfo(f"{name}.video.npy")
            info.type, info.linkname = kind, "sub/0.video.npy"
            info.size = len(video) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(video))
    assert {problem.kind for problem in check_shards({"a": [str(path)]}).problems} == {"sample", "content"}
    caplog.clear()
    for _ in range(2):  # scanned, and from the index
        (entry,) = load_shards([path])
        assert [sample.key for sample in entry.samples] == ["sub/0", "\\xff"]
        assert entry.ignored == ("1.video.npy", "2.video.npy")
        for sample in entry.samples:
            found = sample_members(str(path), entry, sample).decode("video.npy")
            np.testing.assert_array_equal(found, numbered_video(5)["video.npy"])
    assert [key for key, _ in stream_shard(str(path))] == ["sub/0", "\\xff"]
    assert ["1.video.npy" in message for message in caplog.messages] == [True] * 3


def _header(name: str, size: int, kind: bytes = b"0", data: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, max(size, 0)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" + (size % (1 << 88)).to_bytes(11, "big") if size < 0 else block[124:136]
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % 512)


_HEADERS = {
    "size below 0": _header("b.video.npy", -1024),
    "extended size below 0": _header("p", 14, b"x", b"14 size=-1024\n") + _header("b.video.npy", 0),
    "a size that never ends": _header("p", 29, b"x", b"29 size=99999999999999999999\n") + _header("b.video.npy", 0),
    "a name of 2 GiB": _header("l", 1 << 31, b"L"),
    "names of names": _header("l", 2, b"L", b"a\0") * 3000 + _header("b.video.npy", 0),
    "attributes of attributes": _header("p", 6, b"x", b"6 a=b\n") * 3000 + _header("b.video.npy", 0),
}


@pytest.mark.parametrize("name", _HEADERS)
def test_headers_that_lead_in_circles_or_fill_the_memory_are_refused(make_shards, tmp_path, name):
    content = _shards(make_shards("train", 1))[0].read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512) + _HEADERS[name] + bytes(1024)
    (tmp_path / "a.tar").write_bytes(content)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content))
    reads = [lambda: scan_shard(tmp_path / "a.tar"), lambda: scan_shard(tmp_path / "a.tar.gz", packed=True)]
    for read in (*reads, *(lambda path=path: [*stream_shard(str(path))] for path in tmp_path.glob("a.tar*"))):
        with pytest.raises(ShardError, match="whole tar"):
            read()


def test_what_a_stream_holds_at_once_is_limited_and_so_is_what_lies_behind_it(write_tar, tmp_path):
    path = write_tar({f"a.video.{number}": bytes(1000) for number in range(9)}, "a.tar")
    for _, members in stream_shard(str(path), 1000):
        assert len(members.read("video.3")) == 1000
        with pytest.raises(ShardError, match="together to take at most 4000"):
            members.read("video.4")
    (tmp_path / "b.tar").write_bytes(Path(path).read_bytes() + bytes(66 << 20))
    with pytest.raises(ShardError, match="behind its end"):
        [*stream_shard(str(tmp_path / "b.tar"))]


def test_a_pipe_is_no_index(make_shards):
    (path,) = _shards(make_shards("train", 1))
    path.with_name("index.json").unlink()
    os.mkfifo(path.with_name("index.json"))
    assert load_shards([path])[0].samples


@pytest.fixture
def some(make_shards):
    paths = [str(path) for path in _shards(make_shards(count=7, per_shard=2))]
    return paths, load_shards(paths)


def test_replaced_shards_are_refused(some):
    (path, other, *_), (shard, *_) = some
    data = Path(path).read_bytes()
    for content, message in ((data + bytes(512), f"{len(data)} bytes"), (Path(other).read_bytes(), "key 0 at byte")):
        Path(path).write_bytes(content)
        with pytest.raises(ShardError, match=message):
            sample_members(path, shard, shard.samples[0]).read("video.npy")
    (_, third, *_), (_, entry, *_) = some
    sample_members(third, entry, entry.samples[0]).read("video.npy")
    os.truncate(third, 2048)
    with pytest.raises(ShardError, match="cut off"):
        sample_members(third, entry, entry.samples[1]).read("video.npy")
