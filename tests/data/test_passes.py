import collections
import itertools
import multiprocessing

import numpy as np
import pytest

from ssync_pl.data import ShardWriter, sampling
from ssync_pl.data.dataset import ShardDataset, ShardSource
from ssync_pl.data.index import SampleEntry, ShardEntry
from ssync_pl.data.samples import SampleRules
from ssync_pl.data.stream import ShardStream

WORLDS, WORKERS, SHARDS, BATCH = (1, 2, 3, 8), (1, 2, 4), (1, 2, 5, 30), 2
CLIPS = SampleRules(clip_length=2, seed=3)


def source(counts):
    """Shards that are never read, with so many videos each."""
    videos = [tuple(SampleEntry(f"{n}/{k}", {}) for k in range(count)) for n, count in enumerate(counts)]
    entries = [ShardEntry(f"{n}.tar", 0, samples) for n, samples in enumerate(videos)]
    return ShardSource([entry.name for entry in entries], entries)


def in_turns(parts):
    """Put the batches of workers together as a loader does: in turns, leaving out those that have ended."""
    queues = [[part[k : k + BATCH].tolist() for k in range(0, len(part), BATCH)] for part in parts]
    return [batch for turn in itertools.zip_longest(*queues) for batch in turn if batch]


def parts_of_workers(data, epoch, workers, start=0):
    part = data.part(epoch)
    return [sampling.worker_part(part, worker, workers, BATCH, start) for worker in range(workers)]


@pytest.mark.parametrize("kind", [ShardDataset, ShardStream])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("videos", [48, 37, 5, 1])
def test_ranks_and_workers_share_each_pass_exactly(kind, training, videos):
    for shards, world, epoch in itertools.product(SHARDS, WORLDS, (0, 1)):
        counts = np.diff(np.linspace(0, videos, shards + 1).round().astype(int)).tolist()
        read = []
        for rank in range(world):
            rules = CLIPS if training else SampleRules()
            data = kind(source(counts), rules, batch_size=BATCH, rank=rank, world=world)
            part = data.part(epoch)
            assert -(-len(part) // BATCH) == len(data)
            for workers in WORKERS if kind is ShardStream else ():
                pieces = parts_of_workers(data, epoch, workers)
                assert np.concatenate(pieces).tolist() == part.tolist()
                batches = in_turns(pieces)
                assert len(batches) == len(data)
                assert sum(len(batch) < BATCH for batch in batches) <= (not training)
            read += [data.place(clip) for clip in part]
        real = [video for visit, _, video, counts in read if counts]
        assert len(set(real)) == len(real), "a video came twice"
        assert {visit for visit, *_ in read} <= ({epoch} if training else {0, 1})
        assert len(real) == (videos // (world * BATCH) * world * BATCH if training else videos)


def test_clips_of_a_video_are_numbered_and_a_stream_comes_to_the_rest_in_other_passes():
    for kind in (ShardDataset, ShardStream):
        data = kind(source([3, 4]), CLIPS, clips_per_video=3)
        clips = [data.place(clip)[1:3] for clip in data.part(2)]
        assert sorted(clips) == sorted(itertools.product(range(3), range(7)))
    left = ShardStream(source([11]), CLIPS, batch_size=4)
    assert {video for epoch in range(40) for video in left.part(epoch) % 11} == set(range(11))


def test_permutation_is_a_function_of_seed_and_pass_without_favourites():
    orders = {(seed, epoch): sampling.permutation(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    # Written down so that a change of NumPy or of this code, which would change resumed runs, is noticed.
    assert sampling.permutation(8, 0, 0).tolist() == [5, 7, 3, 2, 6, 4, 0, 1]
    places = np.array([np.argsort(sampling.permutation(10, 0, epoch))[3] for epoch in range(2000)])
    assert 140 < np.bincount(places, minlength=10).min() <= np.bincount(places, minlength=10).max() < 260


def test_draws_depend_on_everything_and_cover_all_starts():
    words = [("a/7", 0, 0, 0), ("a/8", 0, 0, 0), ("a/7", 1, 0, 0), ("a/7", 0, 1, 0), ("a/7", 0, 0, 1)]
    assert len({sampling.draw_clip(*word, 1000, 0.5) for word in words * 2}) == 5
    draws = [sampling.draw_clip("a/7", 0, 0, epoch, 5, 0.25) for epoch in range(4000)]
    starts = collections.Counter(draw.start for draw in draws)
    assert set(starts) == set(range(5))
    assert min(starts.values()) > 700
    assert 0.22 < np.mean([draw.flip for draw in draws]) < 0.28
    assert all(0 <= draw.top < 1 and 0 <= draw.left < 1 for draw in draws)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    with ShardWriter(folder, "t", 8) as writer:
        for key in range(37):
            writer.write(str(key), {"video.npy": np.full((3, 2, 2, 3), key, np.uint8)})
    return f"{folder}/t-*.tar"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["mmap", "webdataset"])
@pytest.mark.parametrize(
    ("world", "workers", "method"),
    [
        (3, 0, None),
        (1, 2, "fork"),
        *(
            pytest.param(world, workers, method, marks=pytest.mark.slow)
            for world in WORLDS
            for workers in WORKERS
            for method in ("fork", "forkserver", "spawn")
        ),
    ],
)
def test_real_loaders_share_the_data_exactly(tiny, opened, training, backend, world, workers, method):
    if method is not None and method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    keys, lengths = [], set()
    for rank in range(world):
        options = {"num_workers": workers, "backend": backend, "shuffle_buffer": 5, "start_method": method}
        stage = "fit" if training else "predict"
        data = opened(tiny if training else None, rank, world, stage=stage, predict=tiny, **options)
        loader = data.train_dataloader() if training else data.predict_dataloader()
        batches = list(loader)
        lengths.add(len(batches))
        assert len(batches) == len(loader)
        for batch in batches:
            real = [True] * BATCH if training else batch["batch_padding_mask"].tolist()
            assert batch["video"][:, 0, 0, 0, 0].tolist() == [int(key) for key in batch["__key__"]]
            keys += [key for key, counts in zip(batch["__key__"], real, strict=True) if counts]
    assert len(lengths) == 1
    assert len(set(keys)) == len(keys) == (37 // world // BATCH * BATCH * world if training else 37)
