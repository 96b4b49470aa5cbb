from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import pytest

from ssync_pl.data.decode import view_npy
from ssync_pl.data.index import load_shards
from ssync_pl.data.shards import ShardReader
from ssync_pl.errors import ShardError


@pytest.fixture
def opened(make_shards):
    paths = sorted(str(path) for path in Path(make_shards(count=7, per_shard=2)).parent.glob("*.tar"))
    return paths, load_shards(paths)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_reads_by_offset_and_closes(opened, numbered_video):
    paths, shards = opened
    reader = ShardReader(max_open=2)
    before = _open_files()
    for path, shard in zip(paths, shards, strict=True):
        for sample in shard.samples:
            frame = view_npy(reader.member(path, shard, sample, "video.npy"), "video.npy")[3].copy()
            assert (frame == numbered_video(int(sample.key))["video.npy"][3]).all()
    assert len(reader._files) == 2
    reader.close()
    assert not reader._files
    assert _open_files() == before
    assert len(reader.member(paths[0], shards[0], shards[0].samples[0], "video.npy")) > 0
    reader.close()


def test_pickles_without_files(opened):
    paths, shards = opened
    reader = ShardReader(max_open=3)
    reader.member(paths[0], shards[0], shards[0].samples[0], "video.npy")
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.max_open == 3
    assert not copy._files
    reader.close()


def _first_byte(reader, path, shard, queue):
    queue.put(bytes(reader.member(path, shard, shard.samples[1], "video.npy")[-3:]))


def test_a_fork_reads_with_inherited_files(opened):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork")
    paths, shards = opened
    reader = ShardReader()
    here = bytes(reader.member(paths[0], shards[0], shards[0].samples[1], "video.npy")[-3:])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_first_byte, args=(reader, paths[0], shards[0], queue))
    process.start()
    assert queue.get(timeout=120) == here
    process.join()
    reader.close()


def test_replaced_shards_are_refused(opened):
    paths, shards = opened
    reader = ShardReader()
    data = Path(paths[0]).read_bytes()
    Path(paths[0]).write_bytes(data + bytes(512))
    with pytest.raises(ShardError, match=rf"to have {len(data)} bytes as its index says"):
        reader.member(paths[0], shards[0], shards[0].samples[0], "video.npy")
    Path(paths[0]).write_bytes(Path(paths[1]).read_bytes())
    with pytest.raises(ShardError, match=r"key 0 at byte \d+ as its index says"):
        reader.member(paths[0], shards[0], shards[0].samples[0], "video.npy")
    reader.close()
