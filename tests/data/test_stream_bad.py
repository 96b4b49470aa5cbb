"""Samples that cannot be decoded: refused, or replaced in the same way whatever reads them."""

from __future__ import annotations

import pytest
from partition_table import facts, simulate

from ssync_pl.data.dataset import BAD_SAMPLES, Collate
from ssync_pl.data.index import load_shards
from ssync_pl.data.samples import SampleRules
from ssync_pl.data.stream import ShardStream
from ssync_pl.errors import ShardError

pytest.importorskip("webdataset")

CLIPS = SampleRules(clip_length=2)


@pytest.fixture
def damaged(write_tar, npy_bytes, numbered_video):
    """Nine samples of one shard; 1, 3, 4 and 5 are bad."""
    good = [npy_bytes(numbered_video(number)["video.npy"]) for number in range(9)]
    members = {f"{number}.video.npy": data for number, data in enumerate(good)}
    members |= {f"{number}.video.npy": good[number][:-1] for number in (3, 5)}
    items = [("1.video.pkl", b"x") if name == "1.video.npy" else (name, data) for name, data in members.items()]
    items = [("4.notes.txt", b"x") if name == "4.video.npy" else (name, data) for name, data in items]
    return str(write_tar(dict(items), "a.tar"))


def test_bad_samples_raise_or_are_replaced_without_being_counted(damaged):
    entries = load_shards([damaged], save=False)
    rules = SampleRules()
    with pytest.raises(ShardError, match=r"`video\.pkl` of .*a\.tar, key 1"):
        list(ShardStream([damaged], entries, rules, batch_size=2))
    samples = list(ShardStream([damaged], entries, rules, batch_size=2, skip_bad=True))
    # batches (0 1) (2 3) (4 5) (6 7) (8): the third has nothing of its own
    assert [(sample["__key__"], sample["real"]) for sample in samples] == [
        ("0", True),
        ("0", False),
        ("2", True),
        ("2", False),
        ("0", False),
        ("0", False),
        ("6", True),
        ("7", True),
        ("8", True),
    ]
    bad = [place for sample in samples for place, _ in sample[BAD_SAMPLES]]
    assert bad == [f"{damaged}, key {number}" for number in (1, 3, 4, 5)]
    assert Collate(rules)(samples)["batch_padding_mask"].sum() == 5
    padded = [
        sample
        for rank in range(4)
        for sample in ShardStream([damaged], entries, rules, 1, rank, 4, skip_bad=True, lanes=2)
    ]
    assert sorted(sample["__key__"] for sample in padded if sample["real"]) == ["0", "2", "6", "7", "8"]


@pytest.mark.parametrize("rules", [SampleRules(), CLIPS])
@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_stand_ins_are_the_same_for_all_workers_and_after_resuming(damaged, rules, lanes, size):
    entries = load_shards([damaged], save=False)
    stream = ShardStream([damaged], entries, rules, size, skip_bad=True, lanes=lanes, shuffle_buffer=3)
    batches = facts(simulate(stream, 0))
    for start in range(len(batches)):
        stream.set_pass(0, start)
        for workers in (1, 2, 3):
            assert facts(simulate(stream, workers)) == batches[start:]


def test_nothing_readable_is_an_error(write_tar):
    path = str(write_tar({"0.video.npy": b"x", "1.video.npy": b"y"}, "a.tar"))
    for entries in (load_shards([path], save=False), None):
        with pytest.raises(ShardError, match=r"at least one readable sample, but all 2 failed; the last: .*key 1"):
            list(ShardStream([path], entries, SampleRules(), batch_size=2, skip_bad=True))


def test_skipping_without_an_index_keeps_the_count(damaged):
    samples = list(ShardStream([damaged], None, SampleRules(), batch_size=2, skip_bad=True))
    assert [sample["__key__"] for sample in samples] == ["0", "0", "2", "2", "2", "6", "7", "8"]
    assert sum(sample["real"] for sample in samples) == 5
