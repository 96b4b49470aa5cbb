from __future__ import annotations

import gzip
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ssync_pl.data import index as module
from ssync_pl.data.index import FolderIndex, ShardEntry, load_shards, parse_index, read_index, scan_shard, write_index
from ssync_pl.data.shards import ShardReader, ShardWriter
from ssync_pl.errors import ShardError


def _shards(pattern: str) -> list[Path]:
    return sorted(Path(pattern).parent.glob(Path(pattern).name))


def test_offsets_point_at_the_members(make_shards, numbered_video):
    path = _shards(make_shards(count=3))[0]
    data = path.read_bytes()
    entry = scan_shard(path)
    assert [sample.key for sample in entry.samples] == ["0", "1", "2"]
    for number, sample in enumerate(entry.samples):
        start, size = sample.members["video.npy"]
        member = data[start : start + size]
        assert member[:6] == b"\x93NUMPY"
        assert member[-8 * 8 * 3 :] == numbered_video(number)["video.npy"][-1].tobytes()
        start, size = sample.members["segmentations.npy.gz"]
        assert gzip.decompress(data[start : start + size])[:6] == b"\x93NUMPY"
        assert sample.frames == 6


def test_scan_equals_what_the_writer_recorded(make_shards):
    paths = _shards(make_shards())
    index = read_index(paths[0].parent)
    assert [index.shards[path.name] for path in paths] == [scan_shard(path) for path in paths]


def test_fields_shards_without_index_are_scanned_and_saved(write_tar, npy_bytes, tmp_path):
    video = npy_bytes(np.zeros((24, 4, 4, 3), np.uint8))
    path = write_tar(
        {
            "./": b"",
            "0.video.npy": video,
            "0.segmentations.npy": b"x",
            "__meta__/0.video.npy": b"x",
            "1.Video.NPY": video,
            "README": b"x",
        }
    )
    (entry,) = load_shards([path])
    assert [(sample.key, sorted(sample.members), sample.frames) for sample in entry.samples] == [
        ("0", ["segmentations.npy", "video.npy"], 24),
        ("1", ["video.npy"], 24),
    ]
    assert read_index(tmp_path).shards == {path.name: entry}


def test_gz_videos_have_frames_too(tmp_path, write_tar, npy_bytes):
    path = write_tar({"0.video.npy.gz": gzip.compress(npy_bytes(np.zeros((5, 4, 4, 3), np.uint8)))})
    assert scan_shard(path).samples[0].frames == 5


def test_a_fresh_index_spares_the_scan(make_shards, monkeypatch):
    paths = _shards(make_shards())
    expected = [scan_shard(path) for path in paths]
    monkeypatch.setattr(module, "scan_shard", lambda path: pytest.fail("scanned"))
    assert load_shards(paths) == expected


def test_stale_entries_are_rebuilt(make_shards, write_tar, npy_bytes, tmp_path):
    pattern = make_shards(count=3)
    path = _shards(pattern)[0]
    before = load_shards([path])
    os.replace(write_tar({"9.video.npy": npy_bytes(np.zeros((4, 2, 2, 3), np.uint8))}, "new.tar"), path)
    after = load_shards([path])
    assert [sample.key for sample in after[0].samples] == ["9"]
    assert after != before
    assert read_index(path.parent).shards[path.name] == after[0]


def test_same_size_other_content_is_noticed(make_shards, tmp_path, numbered_video):
    path = _shards(make_shards(count=3))[0]
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
    last = infos[-2]
    # Same length, but the last sample has another key.
    changed = tarfile.TarInfo(last.name.replace("2.", "5.", 1))
    changed.size = last.size
    header = changed.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(data[: last.offset] + header + data[last.offset + 512 :])
    (entry,) = load_shards([path])
    assert "5" in [sample.key for sample in entry.samples]


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "{}", '{"format": "x", "version": 1}', "[" * 100_000, "\xff", '{"version": 2, "shards": [{}]}'),
        '{"shards": [{"raw_data": {"basename": "shard.00000.mds"}}], "format": "mds"}',
    ],
)
def test_a_foreign_index_is_left_alone_and_ours_goes_beside_it(make_shards, text, caplog):
    paths = _shards(make_shards())
    expected, folder = load_shards(paths), paths[0].parent
    (folder / "index.json").write_text(text)
    assert load_shards(paths) == expected
    assert "index.json" in caplog.text
    assert (folder / "index.json").read_text() == text
    assert len(read_index(folder).shards) == len(paths)
    with ShardWriter(folder, "more") as writer:
        writer.write("0", {"info.json": 1})
    assert (folder / "index.json").read_text() == text
    assert sorted(read_index(folder).shards)[0] == "more-000000.tar"
    (folder / "ssync_index.json").write_text(text)
    assert load_shards(paths) == expected
    assert (folder / "ssync_index.json").read_text() == text


def test_an_index_of_another_version_is_ours_and_replaced(make_shards):
    paths = _shards(make_shards())
    expected = load_shards(paths)
    (paths[0].parent / "index.json").write_text('{"format": "ssync_pl.shards", "version": 99}')
    assert load_shards(paths) == expected
    assert len(read_index(paths[0].parent).shards) == len(paths)


def test_names_that_are_not_utf8_are_named_and_left_out(write_tar, npy_bytes, caplog):
    video = npy_bytes(np.zeros((4, 2, 2, 3), np.uint8))
    path = write_tar({"\udcff.video.npy": video, "é.video.npy": video})
    for _ in range(2):
        (entry,) = load_shards([path])
        assert [sample.key for sample in entry.samples] == ["é"]
        assert entry.ignored == ("\\xff.video.npy",)
        assert "xff.video.npy" in caplog.text
        caplog.clear()
    assert len(ShardReader().member(str(path), entry, entry.samples[0], "video.npy")) == len(video)


def test_offsets_outside_of_the_shard_are_refused():
    raw = {"format": "ssync_pl.shards", "version": 1, "recipe": {}, "shards": []}
    raw["shards"] = [{"name": "a.tar", "size": 1000, "samples": [{"key": "0", "members": {"video.npy": [512, 600]}}]}]
    with pytest.raises(ShardError, match="outside"):
        parse_index(json.dumps(raw))


def test_write_keeps_recipe_and_leaves_no_temporary_file(tmp_path):
    entry = ShardEntry("a.tar", 10240, ())
    write_index(tmp_path, [entry], {"seed": 1})
    assert read_index(tmp_path) == FolderIndex({"a.tar": entry}, {"seed": 1})
    with pytest.raises(TypeError):
        write_index(tmp_path, [], {"bad": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]
    assert read_index(tmp_path).recipe == {"seed": 1}


def test_read_only_folders_work(make_shards, monkeypatch):
    paths = _shards(make_shards())
    (paths[0].parent / "index.json").unlink()

    def refuse(*args, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr(module, "write_index", refuse)
    assert len(load_shards(paths)) == 3


def test_truncated_tars_are_refused_wherever_they_end(make_shards):
    path = _shards(make_shards(count=3))[0]
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        boundary = tar.getmembers()[-1].offset
        end = tar.offset
    for keep in (0, 100, 600, 2000, boundary, boundary + 512, end - 1, end):
        path.write_bytes(data[:keep])
        with pytest.raises(ShardError, match=r"train-000000\.tar to be a whole"):
            scan_shard(path)
    path.write_bytes(data[: end + 512])
    assert len(scan_shard(path).samples) == 3


def test_compressed_tars_and_doubled_members_are_refused(tmp_path, write_tar):
    path = write_tar({"0.info.json": b"{}"})
    (tmp_path / "train.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ShardError, match="unpack it"):
        scan_shard(tmp_path / "train.tar.gz")
    with tarfile.open(tmp_path / "double.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("0.info.json"))
    with pytest.raises(ShardError, match=r"key 0 holds `info\.json` twice"):
        scan_shard(tmp_path / "double.tar")
