from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ssync_pl.data.dataset import BAD_SAMPLES, Collate
from ssync_pl.data.samples import SampleRules
from ssync_pl.data.stream import PassLoader, ShardStream, fetch_index, stream_shard
from ssync_pl.errors import ShardError

pytest.importorskip("webdataset")


@pytest.fixture
def remote(make_shards, served):
    """Eleven videos in four shards, served with their index."""
    make_shards(count=11)
    return [f"{served}/shards/train-{number:06d}.tar" for number in range(4)]


def _identity(samples):
    return samples


def _emitted(stream: ShardStream, workers: int) -> list[dict]:
    loader = DataLoader(stream, batch_size=stream.batch_size, num_workers=workers, collate_fn=_identity)
    return [sample for batch in loader for sample in batch]


def test_stream_and_index_over_http(remote, numbered_video):
    entries = fetch_index(remote)
    assert [len(entry.samples) for entry in entries] == [3, 3, 3, 2]
    samples = dict(stream_shard(remote[1]))
    assert list(samples) == ["3", "4", "5"]
    assert sorted(samples["4"]) == ["segmentations.npy.gz", "video.npy"]
    stream = ShardStream(remote, entries, SampleRules(masks=True), batch_size=2)
    for sample in stream:
        want = numbered_video(int(sample["__key__"]))
        assert np.array_equal(sample["video"].numpy(), want["video.npy"])
        assert np.array_equal(sample["segmentations"].numpy(), want["segmentations.npy.gz"])


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_exact_partition_for_evaluation(remote, world, workers):
    entries = fetch_index(remote)
    streams = [ShardStream(remote, entries, SampleRules(), 2, rank, world) for rank in range(world)]
    ranks = [_emitted(stream, workers) for stream in streams]
    assert [len(each) for each in ranks] == [len(stream) for stream in streams] == [-(-11 // world)] * world
    real = [sample["__key__"] for each in ranks for sample in each if sample["real"]]
    assert sorted(real, key=int) == [str(number) for number in range(11)]


def test_ranks_without_videos_get_padding_only(remote):
    entries = fetch_index(remote[3:])
    ranks = [_emitted(ShardStream(remote[3:], entries, SampleRules(), 2, rank, 5), 0) for rank in range(5)]
    assert [[(sample["__key__"], sample["real"]) for sample in each] for each in ranks] == [
        [("9", True)],
        [("10", True)],
        [("10", False)],
        [("10", False)],
        [("10", False)],
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeats", [1, 2])
def test_exact_partition_for_training(remote, world, workers, repeats):
    entries = fetch_index(remote)
    rules = SampleRules(clip_length=2)
    streams = [ShardStream(remote, entries, rules, 2, rank, world, repeats) for rank in range(world)]
    ranks = [_emitted(stream, workers) for stream in streams]
    length = 11 * repeats // world // 2 * 2
    assert [len(each) for each in ranks] == [len(stream) for stream in streams] == [length] * world
    clips = [(sample["__key__"], int(sample["video"][0, 0, 0, 1])) for each in ranks for sample in each]
    if repeats == 1:
        assert len({key for key, _ in clips}) == len(clips)
    assert max([key for key, _ in clips].count(key) for key, _ in clips) <= repeats


def test_the_pass_reaches_persistent_workers(remote):
    epoch = {"now": 0}
    stream = ShardStream(remote, fetch_index(remote), SampleRules(clip_length=2), batch_size=2)
    loader = PassLoader(
        stream,
        lambda: epoch["now"],
        batch_size=2,
        num_workers=1,
        persistent_workers=True,
        collate_fn=_identity,
    )
    passes = []
    for epoch["now"] in (0, 1, 0):
        passes.append([(s["__key__"], int(s["video"][0, 0, 0, 1])) for batch in loader for s in batch])
    assert passes[0] == passes[2]
    assert passes[0] != passes[1]


def test_clips_equal_those_of_local_reading(remote, tmp_path):
    from ssync_pl.data.dataset import ShardDataset
    from ssync_pl.data.index import load_shards

    rules = SampleRules(clip_length=3, flip_probability=0.5, image_size=(8, 8), crop="random")
    paths = [str(path) for path in sorted((tmp_path / "shards").glob("*.tar"))]
    local = ShardDataset(paths, load_shards(paths), rules)
    mine = {local[index]["__key__"]: local[index] for index in range(len(local))}
    for sample in ShardStream(remote, fetch_index(remote), rules, batch_size=1):
        for name in ("video", "flip", "crop"):
            assert torch.equal(sample[name], mine[sample["__key__"]][name])


def test_without_index_one_process_reads_all(remote, tmp_path):
    (tmp_path / "shards" / "index.json").unlink()
    assert fetch_index(remote) is None
    stream = ShardStream(remote, None, SampleRules(), batch_size=2)
    for workers in (0, 2):
        assert sorted(int(sample["__key__"]) for sample in _emitted(stream, workers)) == list(range(11))
    with pytest.raises(TypeError, match=r"index\.json"):
        len(stream)
    with pytest.raises(ShardError, match=r"Expected `index\.json` beside the remote shards"):
        ShardStream(remote, None, SampleRules(), batch_size=2, rank=0, world=2)


def test_an_index_that_does_not_cover_all_is_not_used(remote):
    assert fetch_index([*remote, remote[0].replace("000000", "000009")]) is None


@pytest.mark.parametrize("keep", [700, 4000])
def test_truncated_downloads_are_refused(remote, tmp_path, keep):
    entries = fetch_index(remote)
    path = Path(tmp_path, "shards", "train-000001.tar")
    path.write_bytes(path.read_bytes()[:keep])
    stream = ShardStream(remote, entries, SampleRules(), batch_size=2)
    with pytest.raises(ShardError, match=r"train-000001\.tar"):
        list(stream)


def test_missing_shards_and_foreign_indices_are_refused(remote, tmp_path):
    entries = fetch_index(remote)
    shards = tmp_path / "shards"
    (shards / "train-000000.tar").write_bytes((shards / "train-000002.tar").read_bytes())
    with pytest.raises(ShardError, match=r"train-000000\.tar to hold the 3 samples that `index\.json` names"):
        list(ShardStream(remote[:1], entries[:1], SampleRules(), batch_size=2))
    (shards / "train-000000.tar").unlink()
    with pytest.raises(ShardError, match=r"to read http.*train-000000\.tar to its end"):
        list(ShardStream(remote[:1], entries[:1], SampleRules(), batch_size=2))


def test_skipping_keeps_the_count(write_tar, served, npy_bytes, numbered_video):
    good = [npy_bytes(numbered_video(number)["video.npy"]) for number in range(4)]
    write_tar(
        {"0.video.npy": good[0], "1.video.pkl": b"x", "2.video.npy": good[2], "3.video.npy": good[3][:-1]}, "a.tar"
    )
    url = f"{served}/a.tar"
    rules = SampleRules()
    with pytest.raises(ShardError, match=r"`video\.pkl` of .*a\.tar, key 1"):
        list(ShardStream([url], None, rules, batch_size=2))
    samples = list(ShardStream([url], None, rules, batch_size=2, skip_bad=True))
    assert [(sample["__key__"], sample["real"]) for sample in samples] == [
        ("0", True),
        ("2", True),
        ("2", False),
        ("2", False),
    ]
    bad = [place for sample in samples for place, _ in sample[BAD_SAMPLES]]
    assert bad == [f"{url}, key 1", f"{url}, key 3"]
    assert Collate(rules)(samples)["batch_padding_mask"].tolist() == [True, True, False, False]
