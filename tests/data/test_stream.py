"""Streams: the same samples as shards that are read in place, in parts that fit, whatever goes wrong."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from ssync_pl.data.dataset import BAD_SAMPLES, Collate, ShardDataset
from ssync_pl.data.index import load_shards, scan_shard
from ssync_pl.data.samples import SampleRules
from ssync_pl.data.shards import ShardWriter
from ssync_pl.data.stream import ShardStream
from ssync_pl.errors import ShardError

CLIPS = SampleRules(clip_length=2, flip_probability=0.5, masks=True)


@pytest.fixture
def local(make_shards):
    return sorted(str(path) for path in Path(make_shards(count=7)).parent.glob("*.tar"))


def facts(batches):
    """All that a batch holds, by key."""
    found = {}
    for batch in batches:
        for row, key in enumerate(batch["__key__"]):
            found[key] = {name: value[row].tolist() for name, value in batch.items() if hasattr(value, "shape")}
    return found


@pytest.mark.parametrize("rules", [CLIPS, SampleRules(masks=True)], ids=["training", "evaluation"])
def test_every_way_to_read_gives_the_same_samples(local, served, tmp_path, rules):
    packed = [tmp_path / "packed" / f"{Path(path).name}.gz" for path in local]
    packed[0].parent.mkdir()
    for path, target in zip(local, packed, strict=True):
        target.write_bytes(gzip.compress(Path(path).read_bytes()))
    entries = load_shards(local)
    dataset = ShardDataset(local, entries, rules)
    wanted = facts([Collate(rules)([dataset[number]]) for number in range(7)])
    far = [f"{served}/shards/{Path(path).name}" for path in local]
    for urls, shards in ((local, entries), (far, entries), (far, None)):
        assert facts(ShardStream(urls, shards, rules, 1)) == wanted
    packed_entries = [scan_shard(path, packed=True) for path in packed]
    assert [entry.samples for entry in packed_entries] == [entry.samples for entry in entries]
    if not rules.training:  # what is drawn hangs on the shard's name
        assert facts(ShardStream([str(path) for path in packed], packed_entries, rules, 1)) == wanted


def test_order_is_a_function_of_seed_and_pass(local):
    def keys(seed=0, epoch=0, **options):
        stream = ShardStream(local, load_shards(local), SampleRules(clip_length=2, seed=seed), 1, **options)
        stream.set_pass(epoch)
        return [batch["__key__"][0] for batch in stream]

    assert keys() == keys()
    assert len({tuple(keys(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert keys(shuffle_buffer=0) != keys(shuffle_buffer=7)
    assert keys(epoch=1, rank=1, world=2) == keys(epoch=1, rank=1, world=2)


def test_clips_of_a_video_differ_and_every_pass_draws_anew(local):
    stream = ShardStream(local, load_shards(local), SampleRules(clip_length=2), 2, clips_per_video=3, shuffle_buffer=0)
    starts = {}
    for epoch in range(6):
        stream.set_pass(epoch)
        batches = list(stream)
        assert len(batches) == len(stream) == 10
        for batch in batches:
            for key, video in zip(batch["__key__"], batch["video"], strict=True):
                starts.setdefault(key, set()).add(int(video[0, 0, 0, 1]))
    assert all(len(found) > 2 for found in starts.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_pass_goes_on_at_a_shard_and_says_so(local, caplog, workers):
    stream = ShardStream(local, load_shards(local), SampleRules(clip_length=2), 1, shuffle_buffer=0)
    loader = DataLoader(stream, None, num_workers=workers, persistent_workers=workers > 0)
    whole = [batch["__key__"][0] for batch in loader]
    assert len(whole) == 7
    stream.set_pass(0, start=4)
    assert "middle of pass 0" in caplog.text
    rest = [batch["__key__"][0] for batch in loader]
    assert len(rest) == 3
    if not workers:
        begin = whole.index(rest[0])
        assert begin <= 4
        assert rest == whole[begin : begin + 3]
    stream.set_pass(1)
    assert sorted(batch["__key__"][0] for batch in loader) == sorted(whole)


def test_without_an_index_only_one_process_reads(local, served):
    far = [f"{served}/shards/{Path(path).name}" for path in local]
    stream = ShardStream(far, None, SampleRules(), 2)
    for workers in (0, 2):
        keys = [key for batch in DataLoader(stream, None, num_workers=workers) for key in batch["__key__"]]
        assert sorted(keys) == list("0123456")
    with pytest.raises(TypeError, match="index"):
        len(stream)
    with pytest.raises(ShardError, match="index"):
        ShardStream(far, None, SampleRules(), 2, 0, 2)


@pytest.fixture
def damaged(write_tar, npy_bytes, numbered_video):
    good = [npy_bytes(numbered_video(number)["video.npy"]) for number in range(6)]
    members = {f"{n}.video.npy": data[:50] if n in (0, 3) else data for n, data in enumerate(good)}
    path = write_tar(members)
    return [str(path)], load_shards([path])


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("rules", [SampleRules(), SampleRules(clip_length=2)], ids=["evaluation", "training"])
def test_bad_samples_raise_or_are_replaced_without_being_counted(damaged, rules, workers):
    with pytest.raises(ShardError, match="key 0"):
        list(ShardStream(*damaged, rules, 1, shuffle_buffer=0))
    stream = ShardStream(*damaged, rules, 1, skip_bad=True, shuffle_buffer=0)
    batches = [batch for worker in range(workers) for batch in stream.emit(worker, workers)]
    assert len(batches) == 6
    assert sorted(place[-1] for batch in batches for place, _ in batch[BAD_SAMPLES]) == ["0", "3"]
    if not rules.training:
        real = [batch["__key__"][0] for batch in batches if batch["batch_padding_mask"].all()]
        assert sorted(real) == ["1", "2", "4", "5"]


def test_where_nothing_is_readable_that_is_an_error(write_tar):
    path = write_tar({f"{number}.video.npy": b"x" for number in range(3)})
    for entries in (load_shards([path]), None):
        with pytest.raises(ShardError, match="at least one readable sample"):
            list(ShardStream([str(path)], entries, SampleRules(), 1, skip_bad=True))


def test_members_over_the_limit_are_bad_samples_and_not_read(write_tar, npy_bytes):
    frames = np.zeros((4, 8, 8, 3), np.uint8)
    path = write_tar(
        {
            "0.video.npy": npy_bytes(np.zeros((40, 8, 8, 3), np.uint8)),
            "1.video.npy.gz": gzip.compress(npy_bytes(np.zeros((40, 8, 8, 3), np.uint8))),
            "2.video.npy": npy_bytes(frames),
        }
    )
    for rules in (SampleRules(), SampleRules(clip_length=2)):
        stream = ShardStream([str(path)], load_shards([path]), rules, 3, skip_bad=True, max_bytes=2000)
        (batch,) = stream
        assert sorted(place[-1] for place, _ in batch[BAD_SAMPLES]) == ["0", "1"]
        assert all("max_member_bytes" in message for _, message in batch[BAD_SAMPLES])


def test_a_shard_and_an_index_that_do_not_belong_together_are_refused(local, tmp_path, numbered_video):
    entries = load_shards(local)
    with ShardWriter(tmp_path / "other", "train", 3) as writer:
        for key in ("0", "9"):
            writer.write(key, numbered_video(0))
    for urls in ([str(tmp_path / "other/train-000000.tar"), *local[1:]], [local[2], *local[1:]]):
        with pytest.raises(ShardError, match="do not belong together"):
            list(ShardStream(urls, entries, SampleRules(), 1))
