"""The table of world sizes, workers and shards: every video comes once, and all ranks get equally many batches."""

from __future__ import annotations

import itertools
import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssync_pl.data import ShardDataModule, ShardWriter
from ssync_pl.data.loader import EvalSampler, TrainSampler
from ssync_pl.data.sampling import consumer_row, mixed_row, plain_row, rank_clips

WORLDS, WORKERS, SHARDS, BATCH = (1, 2, 3, 8), (0, 1, 2, 4), (1, 2, 5, 30), 2


def clips_of(takes):
    """(shard, clip, real) of each clip of a row."""
    return [(take.shard, take.first + k, take.real) for take in takes for k in range(take.clips)]


def in_turns(parts, batch):
    """Put the batches of workers together as a loader does: in turns, leaving out those that have ended."""
    queues = [[part[k : k + batch] for k in range(0, len(part), batch)] for part in parts]
    return [one for turn in itertools.zip_longest(*queues) for one in turn if one]


@pytest.mark.parametrize("videos", [48, 37, 5])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shards", SHARDS)
def test_streams_share_each_pass_exactly(videos, training, shards):
    counts = np.diff(np.linspace(0, videos, shards + 1).round().astype(int)).tolist()
    whole = {(shard, clip) for shard, count in enumerate(counts) for clip in range(count)}
    for world, workers, epoch in itertools.product(WORLDS, WORKERS, (0, 1)):
        row = plain_row(counts, 3 if training else None, epoch, rotate=training)
        ranks = []
        for rank in range(world):
            number = max(workers, 1)
            parts = [
                clips_of(consumer_row(row, (rank, world), (worker, number), BATCH, pad=not training))
                for worker in range(number)
            ]
            batches = in_turns(parts, BATCH)
            assert sum(len(batch) < BATCH for batch in batches) <= (not training)
            ranks.append([clip for part in parts for clip in part])
            assert len(ranks[-1]) == rank_clips(videos, world, BATCH, pad=not training)
        real = [clip[:2] for rank in ranks for clip in rank if clip[2]]
        assert len(set(real)) == len(real), "a video came twice"
        assert set(real) <= whole
        if not training or videos % (world * BATCH) == 0:
            assert set(real) == whole


@pytest.mark.parametrize("start", [1, 4, 7])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_resumed_stream_begins_at_a_shard_and_has_as_many_batches_as_were_left(start, workers):
    row = plain_row([7] * 8, 0, 0)
    edges = {0, *np.cumsum([take.clips for take in row]).tolist()}
    order = {clip[:2]: number for number, clip in enumerate(clips_of(row))}
    for rank in range(2):
        left = 0
        for worker in range(workers):
            whole = clips_of(consumer_row(row, (rank, 2), (worker, workers), BATCH, pad=False))
            rest = clips_of(consumer_row(row, (rank, 2), (worker, workers), BATCH, pad=False, start=start))
            left += len(rest) // BATCH
            if rest:
                assert order[rest[0][:2]] in edges or rest[0] == whole[0]
                assert set(rest) <= set(whole)
        assert left == 28 // BATCH - start


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.5, 5.0)])
def test_a_stream_of_several_sets_follows_the_weights_and_comes_to_every_video(weights):
    sets, seen = [[3, 2, 4], [6, 1]], {}
    for epoch in range(60):
        clips = clips_of(mixed_row(sets, weights, seed=1, epoch=epoch))
        assert len(clips) == 16
        share = sum(shard < 3 for shard, *_ in clips)
        assert abs(share - 16 * weights[0] / sum(weights)) < 1
        for shard, clip, _ in clips:
            seen[shard, clip] = seen.get((shard, clip), 0) + 1
    for first, last in ((0, 3), (3, 5)):
        counts = [count for (shard, _), count in seen.items() if first <= shard < last]
        assert len(counts) == sum(sets[0 if first == 0 else 1])
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("videos", [48, 37, 5, 1])
@pytest.mark.parametrize("world", WORLDS)
def test_samplers_share_each_pass_exactly(videos, world):
    for epoch in (0, 3):
        samplers = [TrainSampler(videos, 7, rank, world) for rank in range(world)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        clips = [list(sampler) for sampler in samplers]
        assert {len(rank) for rank in clips} == {videos // world} == {len(samplers[0])}
        union = [clip for rank in clips for clip in rank]
        assert {clip // videos for clip in union} <= {epoch}
        assert len(set(union)) == len(union)
    repeats = [list(EvalSampler(videos, rank, world)) for rank in range(world)]
    assert {len(rank) for rank in repeats} == {-(-videos // world)}
    assert sorted(index for rank in repeats for index in rank if index < videos) == list(range(videos))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    with ShardWriter(folder, "t", 8) as writer:
        for key in range(37):
            writer.write(str(key), {"video.npy": np.full((3, 2, 2, 3), key, np.uint8)})
    return f"{folder}/t-*.tar"


def loader(pattern, training, rank, world, workers, backend, method):
    split = "train" if training else "predict"
    data = ShardDataModule(
        **{split: pattern},
        batch_size=BATCH,
        clip_length=2,
        num_workers=workers,
        backend=backend,
        shuffle_buffer=5,
        start_method=method,
    )
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        current_epoch=0,
        num_training_batches=float("inf"),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.setup("fit" if training else "predict")
    return data.train_dataloader() if training else data.predict_dataloader()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["mmap", "webdataset"])
@pytest.mark.parametrize(
    ("world", "workers", "method"),
    [
        (1, 0, None),
        (3, 0, None),
        (8, 0, None),
        (2, 2, "fork"),
        *(
            pytest.param(world, workers, method, marks=pytest.mark.slow)
            for world in WORLDS
            for workers in WORKERS[1:]
            for method in ("fork", "forkserver", "spawn")
        ),
    ],
)
def test_real_loaders_share_the_data_exactly(tiny, training, backend, world, workers, method):
    if method is not None and method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    keys, lengths = [], set()
    for rank in range(world):
        batches = list(one := loader(tiny, training, rank, world, workers, backend, method))
        lengths.add(len(batches))
        assert len(batches) == len(one)
        for batch in batches:
            real = [True] * BATCH if training else batch["batch_padding_mask"].tolist()
            assert batch["video"][:, 0, 0, 0, 0].tolist() == [int(key) for key in batch["__key__"]]
            keys += [key for key, counts in zip(batch["__key__"], real, strict=True) if counts]
    assert len(lengths) == 1
    assert len(set(keys)) == len(keys) == (37 // world // BATCH * BATCH * world if training else 37)
