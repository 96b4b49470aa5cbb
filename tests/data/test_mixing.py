"""Sets that are mixed by weight."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ssync_pl.data import ShardDataModule
from ssync_pl.data.sampling import mixed_pass, shares_by_weight
from ssync_pl.errors import ConfigError

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "clip_length": 2, "batch_size": 2, "num_workers": 0}


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [0.1, 5.0], [3.0, 2.0, 1.0]])
@pytest.mark.parametrize("total", [1, 7, 100])
def test_shares_sum_up_and_follow_the_weights(total, weights):
    shares = shares_by_weight(total, weights)
    assert sum(shares) == total
    assert all(abs(share - total * weight / sum(weights)) < 1 for share, weight in zip(shares, weights, strict=True))


def test_every_set_runs_through_its_videos_before_any_comes_again():
    # A set of 5 gets 9 of 12 clips, a set of 7 the other 3.
    sets = [(np.arange(5), 3.0), (np.arange(5, 12), 1.0)]
    visits: dict[int, list[int]] = {}
    for epoch in range(20):
        drawn = mixed_pass(12, sets, seed=1, epoch=epoch)
        assert len(drawn) == 12
        assert (drawn % 12 < 5).sum() == 9
        for index in drawn.tolist():
            visits.setdefault(index % 12, []).append(index // 12)
        for members, _ in sets:
            counts = [len(visits.get(int(clip), [])) for clip in members]
            assert max(counts) - min(counts) <= 1
    assert all(sorted(seen) == list(range(len(seen))) for seen in visits.values())
    first, again = mixed_pass(12, sets, 1, 0), mixed_pass(12, sets, 1, 0)
    assert (first == again).all()
    assert (first != mixed_pass(12, sets, 2, 0)).any()


def _videos(data: ShardDataModule, epoch: int) -> list[int]:
    data.trainer.current_epoch = epoch
    return [int(video[0, 0, 0, 0]) for batch in data.train_dataloader() for video in batch["video"]]


def _module(train, rank=0, world=1, **options) -> ShardDataModule:
    data = ShardDataModule(train, **{**PLAIN, **options})
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        current_epoch=0,
        num_training_batches=float("inf"),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.setup("fit")
    return data


@pytest.fixture
def two_sets(make_shards, tmp_path, numbered_video):
    from ssync_pl.data.shards import ShardWriter

    first = make_shards("a", count=6, folder="a")
    with ShardWriter(tmp_path / "b", "b", 4) as writer:
        for number in range(10):
            writer.write(str(number), numbered_video(100 + number))
    return first, str(tmp_path / "b" / "b-*.tar")


@pytest.mark.parametrize("backend", ["mmap", "webdataset"])
@pytest.mark.parametrize("workers", [0, 2])
def test_both_backends_mix_by_weight(two_sets, backend, workers):
    first, second = two_sets
    for world in (1, 2):
        modules = [
            _module({first: 3, second: 1}, rank, world, backend=backend, num_workers=workers) for rank in range(world)
        ]
        for epoch in (0, 1):
            videos = [video for data in modules for video in _videos(data, epoch)]
            assert len(videos) == 16
            assert sum(video < 100 for video in videos) == 12
            assert set(Counter(video for video in videos if video < 100).values()) == {2}
    orders = {tuple(_videos(modules[0], epoch)) for epoch in range(3)}
    assert len(orders) == 3


def test_mixtures_that_make_no_sense_are_refused(two_sets):
    first, second = two_sets
    for weights in ({first: 0.0, second: 1.0}, {first: -1.0}, {first: float("nan")}):
        with pytest.raises(ConfigError, match="weights of mixed sets to be positive"):
            _module(weights)
    with pytest.raises(ConfigError, match="each shard once"):
        _module({first: 1.0, first.replace("a-*", "a-000000"): 1.0})
    with pytest.raises(ConfigError, match="at least one set"):
        _module({})
    for backend in ("mmap", "webdataset"):
        with pytest.raises(ConfigError, match=r"set 1 of 2 .*gives 0. Raise its weight"):
            _module({first: 1e-6, second: 1.0}, backend=backend).train_dataloader()
