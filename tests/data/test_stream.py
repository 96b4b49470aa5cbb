from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from flaky_server import FlakyServer
from partition_table import BATCH, facts, keep, make_stream, simulate, write_videos
from torch.utils.data import DataLoader

from ssync_pl.data import stream_lanes
from ssync_pl.data.dataset import ShardDataset, split_short
from ssync_pl.data.index import SampleEntry, ShardEntry, load_shards, scan_packed, scan_shard
from ssync_pl.data.remote import RetryPolicy
from ssync_pl.data.samples import SampleRules
from ssync_pl.data.stream import ShardStream, fetch_index, stream_shard
from ssync_pl.data.stream_plan import mixed_shard_plan
from ssync_pl.errors import ConfigError, ShardError

pytest.importorskip("webdataset")

QUICK = RetryPolicy(timeout=0.4, delays=(0.01, 0.01))
CLIPS = SampleRules(clip_length=2)


@pytest.fixture
def local(make_shards, tmp_path):
    """Eleven videos in four shards, with their index."""
    make_shards(count=11)
    return [str(path) for path in sorted((tmp_path / "shards").glob("*.tar"))]


@pytest.fixture
def remote(local, served):
    """The same over HTTP."""
    return [f"{served}/shards/{Path(path).name}" for path in local]


def _keys(samples) -> list[str]:
    return [sample["__key__"] for sample in samples]


def test_stream_and_index_over_http(remote, numbered_video):
    entries = fetch_index(remote)
    assert [len(entry.samples) for entry in entries] == [3, 3, 3, 2]
    samples = dict(stream_shard(remote[1]))
    assert list(samples) == ["3", "4", "5"]
    assert sorted(samples["4"]) == ["segmentations.npy.gz", "video.npy"]
    stream = ShardStream(remote, entries, SampleRules(masks=True), batch_size=2, lanes=3)
    assert sorted(_keys(stream), key=int) == [str(number) for number in range(11)]
    for sample in stream:
        want = numbered_video(int(sample["__key__"]))
        assert np.array_equal(sample["video"].numpy(), want["video.npy"])
        assert np.array_equal(sample["segmentations"].numpy(), want["segmentations.npy.gz"])


def test_local_remote_and_packed_shards_give_the_same(remote, local, tmp_path):
    packed = [f"{tmp_path}/train-{number:06d}.{end}" for number, end in enumerate(["tar.gz", "tgz", "tar.gz", "tgz"])]
    for path, target in zip(local, packed, strict=True):
        Path(target).write_bytes(gzip.compress(Path(path).read_bytes()))
    entries = {"local": load_shards(local), "packed": [scan_packed(path) for path in packed]}
    rules = SampleRules(masks=True)
    streams = [
        ShardStream(local, entries["local"], rules, 2, lanes=2),
        ShardStream(remote, fetch_index(remote), rules, 2, lanes=2),
        ShardStream(packed, entries["packed"], rules, 2, lanes=2),
    ]
    assert facts(simulate(streams[0], 0)) == facts(simulate(streams[1], 2)) == facts(simulate(streams[2], 3))


def test_clips_equal_those_of_mapped_reading(remote, local):
    rules = SampleRules(clip_length=3, flip_probability=0.5, image_size=(8, 8), crop="random")
    mapped = ShardDataset(local, load_shards(local), rules)
    mine = {mapped[index]["__key__"]: mapped[index] for index in range(len(mapped))}
    for sample in ShardStream(remote, fetch_index(remote), rules, batch_size=1):
        for name in ("video", "flip", "crop"):
            assert torch.equal(sample[name], mine[sample["__key__"]][name])


def test_ranks_without_videos_get_padding_only(remote):
    entries = fetch_index(remote[3:])
    ranks = [list(ShardStream(remote[3:], entries, SampleRules(), 2, rank, 5, lanes=2)) for rank in range(5)]
    assert [[(sample["__key__"], sample["real"]) for sample in each] for each in ranks] == [
        [("9", True)],
        [("10", True)],
        [("10", False)],
        [("10", False)],
        [("10", False)],
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lanes", [1, 3, 4])
def test_resuming_at_any_batch_gives_the_rest(tmp_path, training, lanes):
    paths = write_videos(tmp_path, 23, 5)
    for rank in range(2):
        whole = make_stream(paths, training, rank, 2, lanes=lanes)
        whole.set_pass(3)
        batches = facts(simulate(whole, 0))
        for start in range(len(batches) + 1):
            for workers in (1, 2, 3):
                resumed = make_stream(paths, training, rank, 2, lanes=1)
                resumed.set_pass(3, start, lanes)
                assert facts(simulate(resumed, workers)) == batches[start:]
                assert len(resumed) == len(whole)


def test_resuming_decodes_and_opens_only_what_is_left(tmp_path, monkeypatch):
    paths = write_videos(tmp_path, 24, 6)
    opened, built = [], []
    build = stream_lanes.ClipBuilder.build
    monkeypatch.setattr(
        stream_lanes, "stream_shard", lambda url, **options: opened.append(url) or stream_shard(url, **options)
    )
    monkeypatch.setattr(
        stream_lanes.ClipBuilder, "build", lambda self, *rest: built.append(rest[1]) or build(self, *rest)
    )
    stream = make_stream(paths, training=False, lanes=1)
    stream.set_pass(0, start=7)
    assert _keys(stream) == built == [str(number) for number in range(14, 24)]
    assert opened == paths[3:]
    # With a shuffle buffer too, each clip that is left is built once, and no other.
    built.clear()
    stream = make_stream(paths, training=True, lanes=2, shuffle_buffer=4)
    stream.set_pass(0, start=9)
    assert sorted(_keys(stream)) == sorted(built)
    assert len(built) == 24 - 9 * BATCH
    built.clear()
    stream.set_pass(0, start=12)
    opened.clear()
    assert list(stream) == built == opened == []


def test_one_lane_a_worker_is_read_by_it_alone(tmp_path, monkeypatch):
    paths = write_videos(tmp_path, 48, 6)
    stream = make_stream(paths, training=True, lanes=6)
    opened: list[str] = []
    monkeypatch.setattr(
        stream_lanes, "stream_shard", lambda url, **options: opened.append(url) or stream_shard(url, **options)
    )
    for workers in (1, 2, 3, 6):
        opened.clear()
        assert len(list(simulate(stream, workers))) == 24
        assert sorted(opened) == paths


def test_the_buffer_mixes_within_lanes_and_holds_few_clips(tmp_path, monkeypatch):
    paths = write_videos(tmp_path, 60, 2)
    most = 0
    take = stream_lanes.Lane.take

    def watched(self, position):
        nonlocal most
        found = take(self, position)
        most = max(most, len(self._held))
        return found

    monkeypatch.setattr(stream_lanes.Lane, "take", watched)
    stream = make_stream(paths, training=True, lanes=1, shuffle_buffer=8)
    order = [int(key) for key in _keys(stream)]
    assert most <= 8
    assert sorted(order) == list(range(60))
    first = 0 if order[0] < 30 else 30
    assert order[:10] != list(range(first, first + 10))
    assert max(abs(number - first) for number in order[:10]) <= 18


def test_clips_of_a_video_differ_and_visits_draw_anew(tmp_path):
    write_videos(tmp_path, 6, 1)
    rng = np.random.default_rng(0)
    from ssync_pl.data.shards import ShardWriter

    with ShardWriter(tmp_path, "long") as writer:
        for key in range(4):
            writer.write(str(key), {"video.npy": rng.integers(0, 256, (90, 2, 2, 3), dtype=np.uint8)})
    paths = [str(tmp_path / "long-000000.tar"), str(tmp_path / "s00-000000.tar")]
    entries = load_shards(paths)
    counts = [2 * len(entry.samples) for entry in entries]
    takes = partial(_mix_of_two, counts)
    stream = ShardStream(paths, entries, CLIPS, 2, clips_per_video=2, lanes=2, takes=takes)
    assert stream.clips_per_shard == counts == [8, 12]
    assert stream.clips == len(stream) == 20
    cuts: dict[str, list[int]] = {}
    for sample in stream:
        if sample["video"].unique().numel() > 2:
            cuts.setdefault(sample["__key__"], []).append(sample["cut"].start)
    # 15 of 20 clips come from the first set, whose 4 videos have 2 a visit
    assert sum(map(len, cuts.values())) == 15
    assert all(len(set(starts)) > 1 for starts in cuts.values())
    ranks = [ShardStream(paths, entries, CLIPS, 2, rank, 3, 2, lanes=2, takes=takes) for rank in range(3)]
    assert [len(list(rank)) for rank in ranks] == [len(rank) for rank in ranks] == [6, 6, 6]


def _mix_of_two(counts, epoch):
    return mixed_shard_plan([[counts[0]], [counts[1]]], [3.0, 1.0], seed=0, epoch=epoch)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_pass_and_start_reach_workers_that_live_on(tmp_path, method):
    paths = write_videos(tmp_path, 12, 3)
    stream = make_stream(paths, training=True, lanes=2)
    loader = DataLoader(
        stream, BATCH, num_workers=1, persistent_workers=True, collate_fn=keep, multiprocessing_context=method
    )
    seen = []
    for epoch, start in ((0, 0), (1, 0), (0, 2)):
        stream.set_pass(epoch, start)
        seen.append([_keys(batch) for batch in loader])
    assert seen[0] != seen[1]
    assert seen[0][2:] == seen[2]
    assert (stream.epoch, stream.start, stream.lanes) == (0, 2, 2)


def test_real_workers_resume_after_a_change_of_their_number(tmp_path):
    paths = write_videos(tmp_path, 24, 5)
    stream = make_stream(paths, training=True, lanes=4)
    whole = [_keys(batch) for batch in simulate(stream, 0)]
    stream.set_pass(0, start=5)
    loader = DataLoader(stream, BATCH, num_workers=2, collate_fn=keep, multiprocessing_context="fork")
    assert [_keys(batch) for batch in loader] == whole[5:]


def test_without_index_one_process_reads_all(remote, tmp_path, caplog):
    (tmp_path / "shards" / "index.json").unlink()
    assert fetch_index(remote) is None
    for rules in (SampleRules(), CLIPS):
        stream = ShardStream(remote, None, rules, batch_size=2, shuffle_buffer=3)
        batches = facts(simulate(stream, 0))
        assert sorted(int(s[0]) for batch in batches for s in batch) == list(range(11))
        assert facts(simulate(stream, 3)) == batches
        stream.set_pass(0, start=2)
        assert facts(simulate(stream, 2)) == batches[2:]
    assert "Only one of 3 workers reads" in caplog.text
    with pytest.raises(TypeError, match=r"index\.json"):
        len(stream)
    with pytest.raises(ShardError, match=r"Expected `index\.json` beside the remote shards"):
        ShardStream(remote, None, SampleRules(), batch_size=2, rank=0, world=2)


def test_an_index_that_does_not_cover_all_is_not_used(remote):
    assert fetch_index([*remote, remote[0].replace("000000", "000009")]) is None


@pytest.mark.parametrize("keep_bytes", [700, 4000])
@pytest.mark.parametrize("far", [True, False])
def test_truncated_shards_are_refused(remote, local, tmp_path, keep_bytes, far):
    entries = load_shards(local)
    path = Path(tmp_path, "shards", "train-000001.tar")
    path.write_bytes(path.read_bytes()[:keep_bytes])
    shards = remote if far else local
    with pytest.raises(ShardError, match=rf"train-000001\.tar to have \d+ bytes as .* but it has {keep_bytes}"):
        list(ShardStream(shards, entries, SampleRules(), batch_size=2))
    with pytest.raises(ShardError, match=r"train-000001\.tar to be a whole tar"):
        list(ShardStream(shards, None, SampleRules(), batch_size=2))


def test_a_packed_shard_that_was_cut_is_refused(local, tmp_path):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(Path(local[0]).read_bytes())[:-100])
    with pytest.raises(ShardError, match=r"a\.tar\.gz to be a whole tar, but reading it failed"):
        list(stream_shard(str(path)))


def test_missing_shards_and_foreign_indices_are_refused(remote, local, tmp_path):
    entries = fetch_index(remote)
    shards = tmp_path / "shards"
    (shards / "train-000000.tar").write_bytes((shards / "train-000002.tar").read_bytes())
    for first in (remote[:1], local[:1]):
        with pytest.raises(
            ShardError, match=r"train-000000\.tar to hold the 3 samples .*sample 1 \(key 0\) is missing"
        ):
            list(ShardStream(first, entries[:1], SampleRules(), batch_size=2))
    (shards / "train-000000.tar").unlink()
    with pytest.raises(ShardError, match=r"to read http.*train-000000\.tar to its end.*404"):
        list(ShardStream(remote[:1], entries[:1], SampleRules(), batch_size=2))
    with pytest.raises(ShardError, match=r"to read .*train-000000\.tar, but it cannot be opened \(No such file"):
        list(ShardStream(local[:1], entries[:1], SampleRules(), batch_size=2))


def test_a_shaky_server_changes_nothing(local, tmp_path):
    server = FlakyServer(tmp_path)
    try:
        urls = [f"{server.url}/shards/{Path(path).name}?token=secret" for path in local]
        entries = load_shards(local)
        wanted = facts(simulate(ShardStream(local, entries, CLIPS, 2, lanes=2), 0))
        stream = ShardStream(urls, entries, CLIPS, 2, lanes=2, policy=QUICK)
        server.script = [("cut", 2000), ("status", 500), ("stall", 900), ("cut", 0), ("whole",), ("status", 503)]
        assert facts(simulate(stream, 2)) == wanted
        assert not server.script
        server.script = [("status", 404)]
        with pytest.raises(ShardError, match=r"\.tar\?token=… to its end, .* the server answered 404"):
            list(stream)
    finally:
        server.close()


def test_samples_left_out_of_the_entries_are_passed_over(local):
    entries = load_shards(local)
    fewer = [ShardEntry(entry.name, entry.size, entry.samples[1:]) for entry in entries]
    assert _keys(ShardStream(local, fewer, SampleRules(), 2)) == ["1", "2", "4", "5", "7", "8", "10"]


def test_short_videos_split_off_leave_the_rest(tmp_path):
    from ssync_pl.data.shards import ShardWriter

    with ShardWriter(tmp_path, "a") as writer:
        for key, frames in enumerate((5, 2, 5, 1, 5)):
            writer.write(str(key), {"video.npy": np.zeros((frames, 2, 2, 3), np.uint8)})
    paths = [str(tmp_path / "a-000000.tar")]
    kept = [split_short(entry, 4, 1)[0] for entry in load_shards(paths)]
    assert sorted(_keys(ShardStream(paths, kept, SampleRules(clip_length=4), 1))) == ["0", "2", "4"]


def test_bad_settings_are_refused():
    entry = ShardEntry("a.tar", 0, (SampleEntry("7", {"video.npy": (512, 1)}),))
    with pytest.raises(ConfigError, match="`lanes` to be at least 1, but got 0"):
        ShardStream(["a.tar"], [entry], CLIPS, 2, lanes=0)
    with pytest.raises(ConfigError, match="one index entry for each of 1 shards, but got 2"):
        ShardStream(["a.tar"], [entry, entry], CLIPS, 2)
    with pytest.raises(ConfigError, match="`takes` only for training"):
        ShardStream(["a.tar"], [entry], SampleRules(), 2, takes=lambda epoch: [])
    stream = ShardStream(["a.tar"], [entry], CLIPS, 2, takes=lambda epoch: [(0, 0, 2)])
    with pytest.raises(ConfigError, match=r"`takes` to plan shards in \[0, 1\).* but got \(0, 0, 2, 0\)"):
        len(stream)
    with pytest.raises(ConfigError, match="`start` to be at least 0, but got -1"):
        stream.set_pass(0, -1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_tar_that_was_cut_between_members_is_not_taken_for_whole(make_shards, tmp_path, packed, lost):
    make_shards("train", count=3, per_shard=3)
    path = tmp_path / "shards" / "train-000000.tar"
    entry = scan_shard(path)
    if lost:
        cut = min(offset for offset, _ in entry.samples[-lost].members.values()) - 512
        path.write_bytes(path.read_bytes()[:cut])
    if packed:
        whole = path
        path = whole.with_suffix(".tar.gz")
        path.write_bytes(gzip.compress(whole.read_bytes()))
    if lost:
        with pytest.raises(ShardError, match="no end-of-archive mark"):
            list(stream_shard(str(path)))
    else:
        assert len(list(stream_shard(str(path)))) == 3
