"""Passes that stop in the middle and go on."""

from __future__ import annotations

import gc
import logging
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ssync_pl.data import ShardDataModule
from ssync_pl.errors import ConfigError

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "clip_length": 2, "batch_size": 2}


def _trainer(rank: int = 0, world: int = 1, epoch: int = 0) -> SimpleNamespace:
    progress = SimpleNamespace(current=SimpleNamespace(processed=10**9))
    return SimpleNamespace(
        global_rank=rank,
        world_size=world,
        current_epoch=epoch,
        num_training_batches=float("inf"),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        state=SimpleNamespace(fn="fit"),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )


def _module(pattern, rank=0, world=1, epoch=0, **options) -> ShardDataModule:
    data = ShardDataModule(pattern, **{**PLAIN, "num_workers": 0, **options})
    data.trainer = _trainer(rank, world, epoch)
    data.setup("fit")
    return data


def _keys(batches) -> list[tuple]:
    return [
        (tuple(b["__key__"]), tuple(b["flip"].tolist()), b["video"][..., 1].flatten(1)[:, 0].tolist()) for b in batches
    ]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 3), (3, 1)])
def test_a_pass_goes_on_where_it_stopped(make_shards, before, after):
    pattern = make_shards(count=23, per_shard=4)
    whole = {
        rank: [_keys(_module(pattern, rank, 2, epoch, num_workers=before).train_dataloader()) for epoch in (3, 4)]
        for rank in (0, 1)
    }
    for rank, (third, fourth) in whole.items():
        assert len(third) == 5
        assert third != fourth
        for stop in (1, 4, 5):
            loader = _module(pattern, rank, 2, 3, num_workers=before).train_dataloader()
            batches = iter(loader)
            for _ in range(stop):
                next(batches)
            state = loader.state_dict()
            del batches
            # Lightning still names the pass that was interrupted, even when its last batch was done.
            data = _module(pattern, rank, 2, 3, num_workers=after)
            resumed = data.train_dataloader()
            resumed.load_state_dict(state)
            assert _keys(resumed) == (third[stop:] or fourth)
            data.trainer.current_epoch = 4 if third[stop:] else 5
            assert (_keys(resumed) == fourth) == bool(third[stop:])


def test_batches_that_were_fetched_but_not_trained_on_do_not_count(make_shards):
    data = _module(make_shards(count=8))
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    assert loader.state_dict()["batches"] == 3
    data.trainer.fit_loop.epoch_loop.batch_progress.current.processed = 2
    assert loader.state_dict()["batches"] == 2


def test_a_limited_pass_ends_at_its_limit(make_shards):
    pattern = make_shards(count=8)
    data = _module(pattern)
    data.trainer.num_training_batches = 2
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches), next(batches)
    resumed = _module(pattern).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert _keys(resumed) == _keys(_module(pattern, epoch=1).train_dataloader())


@pytest.mark.parametrize(
    ("changes", "named"), [({"world": 3}, "world was 1, is 3"), ({"batch_size": 1}, "size"), ({"seed": 5}, "seed")]
)
def test_other_partitions_are_named_and_exact_at_the_next_pass(make_shards, caplog, changes, named):
    pattern = make_shards(count=12)
    loader = _module(pattern).train_dataloader()
    batches = iter(loader)
    next(batches)
    other = _module(pattern, **changes)
    resumed = other.train_dataloader()
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(loader.state_dict())
    assert named in caplog.text
    assert len(list(resumed)) == len(resumed) - 1
    other.trainer.current_epoch = 1
    assert _keys(resumed) == _keys(_module(pattern, epoch=1, **changes).train_dataloader())


def test_a_changed_number_of_processes_is_fine_between_passes(make_shards, caplog):
    pattern = make_shards(count=12)
    loader = _module(pattern).train_dataloader()
    assert len(list(loader)) == 6
    resumed = _module(pattern, 1, 3).train_dataloader()
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(loader.state_dict())
    assert not caplog.text
    assert _keys(resumed) == _keys(_module(pattern, 1, 3, epoch=1).train_dataloader())


def test_a_strange_state_is_refused(make_shards):
    with pytest.raises(ConfigError, match="state of a loader, version 1"):
        _module(make_shards()).train_dataloader().load_state_dict({"version": 7})


def test_loaders_leave_the_random_numbers_of_the_run_alone(make_shards):
    data = _module(make_shards(count=4))
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_another_pass_that_is_named_before_the_first_batch_changes_nothing(make_shards):
    # Lightning names its own idea of the pass between making the iterator and taking a batch.
    for workers in (0, 1):
        data = _module(make_shards(count=8, folder=f"w{workers}"), epoch=3, num_workers=workers)
        wanted = _keys(data.train_dataloader())
        loader = data.train_dataloader()
        batches = iter(loader)
        loader.sampler.set_epoch(7)
        assert _keys(batches) == wanted


def test_workers_end_with_their_loader(make_shards):
    gc.collect()
    gc.disable()
    try:
        batches = iter(_module(make_shards(count=8), num_workers=1).train_dataloader())
        next(batches)
        assert multiprocessing.active_children()
        del batches
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_a_second_iterator_does_not_turn_the_pass_back(make_shards):
    for backend in ("mmap", "webdataset"):
        loader = _module(make_shards(count=8, folder=backend), backend=backend).train_dataloader()
        batches = iter(loader)
        seen = [next(batches) for _ in range(3)]
        next(iter(loader))
        assert loader.state_dict()["batches"] == 3
        assert len(seen) + len(list(batches)) == 4
        assert loader.state_dict()["batches"] == 4


@pytest.mark.parametrize("backend", ["mmap", "webdataset"])
def test_without_a_trainer_every_loop_is_another_pass(make_shards, backend):
    data = ShardDataModule(make_shards(count=8), num_workers=0, backend=backend, **PLAIN)
    data.setup("fit")
    loader = data.train_dataloader()
    passes = [_keys(loader) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2]
    with_trainer = [
        _keys(_module(data.patterns["train"], epoch=e, backend=backend).train_dataloader()) for e in range(3)
    ]
    assert passes == with_trainer


def test_a_state_that_comes_with_another_verb_is_not_for_the_next_fit(make_shards):
    pattern = make_shards(count=8)
    data = _module(pattern)
    loader = data.train_dataloader()
    next(iter(loader))
    other = _module(pattern)
    other.trainer.state = SimpleNamespace(fn="validate")
    other.load_state_dict(data.state_dict())
    assert len(list(other.train_dataloader())) == 4
    other.trainer.state.fn = "fit"
    other.load_state_dict(loader.state_dict())
    assert len(list(other.train_dataloader())) == 3


def test_a_pass_of_unknown_length_that_ended_is_not_gone_on_with(make_shards, served):
    make_shards("train", count=6)
    url = f"{served}/shards/train-{{000000..000001}}.tar"
    for index in Path(make_shards("other", count=1)).parent.glob("index.json"):
        index.unlink()
    data = _module(url)
    loader = data.train_dataloader()
    assert len(list(loader)) == 3
    assert loader.state_dict()["ended"]
    resumed = _module(url, epoch=1).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert _keys(resumed) == _keys(_module(url, epoch=1).train_dataloader())


@pytest.mark.parametrize(("count", "per_shard", "weights"), [(11, 11, None), (11, 3, None), (32, 32, (3.0, 1.0))])
def test_a_stream_comes_to_every_video(make_shards, count, per_shard, weights):
    patterns = [make_shards(name, count=count, per_shard=per_shard, folder=name) for name in ("a", "b")]
    train = patterns[0] if weights is None else dict(zip(patterns, weights, strict=True))
    seen: set = set()
    data = _module(train, backend="webdataset", batch_size=4)
    for epoch in range(40):
        data.trainer.current_epoch = epoch
        for batch in data.train_dataloader():
            seen |= set(batch["__key__"])
    assert len(seen) == count
