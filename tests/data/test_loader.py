import gc
import logging
import multiprocessing
import weakref
from pathlib import Path

import pytest
import torch

from ssync_pl.data import ShardDataModule
from ssync_pl.data.loader import copied_ahead
from ssync_pl.errors import ConfigError


def _keys(batches) -> list[tuple]:
    return [(*b["__key__"], *b["flip"].tolist(), b["video"][..., 1].flatten(1)[:, 0].tolist()) for b in batches]


def _stopped(data, stop):
    """The state of a loader that gave some batches."""
    loader = data.train_dataloader()
    batches = iter(loader)
    for _ in range(stop):
        next(batches)
    return loader.state_dict()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_pass_goes_on_where_it_stopped(make_shards, opened, workers):
    pattern = make_shards(count=23, per_shard=4)
    for rank in (0, 1):
        third, fourth = (_keys(opened(pattern, rank, 2, epoch).train_dataloader()) for epoch in (3, 4))
        assert len(third) == 5
        assert third != fourth
        for stop in (1, 4, 5) if workers == 0 else (3 - rank,):
            state = _stopped(opened(pattern, rank, 2, 3), stop)
            # Lightning still names the pass that was interrupted, even when its last batch was done.
            data = opened(pattern, rank, 2, 3, num_workers=workers)
            resumed = data.train_dataloader()
            resumed.load_state_dict(state)
            assert _keys(resumed) == (third[stop:] or fourth)
            data.trainer.current_epoch = 4 if third[stop:] else 5
            assert (_keys(resumed) == fourth) == bool(third[stop:])


def test_only_batches_that_were_trained_on_count_and_a_limited_pass_ends_at_its_limit(make_shards, opened):
    pattern = make_shards(count=8)
    data = opened(pattern)
    assert _stopped(data, 3)["batches"] == 3
    data.trainer.fit_loop.epoch_loop.batch_progress.current.processed = 2
    assert _stopped(data, 3)["batches"] == 2
    data.trainer.num_training_batches = 2
    resumed = opened(pattern).train_dataloader()
    resumed.load_state_dict(_stopped(data, 2))
    assert _keys(resumed) == _keys(opened(pattern, epoch=1).train_dataloader())


@pytest.mark.parametrize(
    ("changes", "named"), [({"world": 3}, "world was 1, is 3"), ({"batch_size": 1}, "size"), ({"seed": 5}, "seed")]
)
def test_other_partitions_are_named_and_exact_at_the_next_pass(make_shards, opened, caplog, changes, named):
    pattern = make_shards(count=12)
    other = opened(pattern, **changes)
    resumed = other.train_dataloader()
    resumed.load_state_dict(_stopped(opened(pattern), 1))
    assert named in caplog.text
    assert len(list(resumed)) == len(resumed) - 1
    other.trainer.current_epoch = 1
    assert _keys(resumed) == _keys(opened(pattern, epoch=1, **changes).train_dataloader())
    caplog.clear()
    resumed = opened(pattern, **changes).train_dataloader()
    resumed.load_state_dict(_stopped(opened(pattern), 6))  # between passes any change is fine
    assert not caplog.text
    assert _keys(resumed) == _keys(opened(pattern, epoch=1, **changes).train_dataloader())


def test_a_strange_state_is_refused_and_random_numbers_of_the_run_left_alone(make_shards, opened):
    before = torch.get_rng_state()
    loader = opened(make_shards(count=4)).train_dataloader()
    list(loader)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ConfigError, match="state of a loader, version 1"):
        loader.load_state_dict({"version": 7})


def test_workers_end_with_their_loader(make_shards, opened):
    gc.collect()
    gc.disable()  # no cycle of references keeps them
    garbage = torch.nn.Module()
    garbage.__dict__["cycle"], reference = garbage, weakref.ref(garbage)
    del garbage
    try:
        batches = iter(opened(make_shards(count=8), num_workers=1).train_dataloader())
        next(batches)
        assert multiprocessing.active_children()
        assert reference() is None  # gone before the fork: in a worker, garbage of PyAV would hang
        del batches
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", ["mmap", "webdataset"])
def test_without_a_trainer_every_loop_is_another_pass(make_shards, opened, backend):
    data = ShardDataModule(make_shards(count=8), num_workers=0, backend=backend, batch_size=2, clip_length=2)
    data.setup("fit")
    loader = data.train_dataloader()
    passes = [_keys(loader) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2]
    named = [opened(data.patterns["train"], epoch=epoch, backend=backend) for epoch in range(3)]
    assert passes == [_keys(one.train_dataloader()) for one in named]


def test_a_state_that_comes_with_another_verb_is_not_for_the_next_fit(make_shards, opened):
    pattern = make_shards(count=8)
    data, other = opened(pattern), opened(pattern)
    data.trainer.train_dataloader = loader = data.train_dataloader()
    next(iter(loader))
    for verb, left in (("validate", 4), ("fit", 3)):
        other.trainer.state.fn = verb
        other.load_state_dict(data.state_dict())
        assert len(list(other.train_dataloader())) == left


def test_a_pass_of_unknown_length_that_ended_is_not_gone_on_with(make_shards, opened, served, caplog):
    caplog.set_level(logging.WARNING)
    (Path(make_shards(count=6)).parent / "index.json").unlink()
    url = f"{served}/shards/train-{{000000..000001}}.tar"
    data = opened(url)
    loader = data.train_dataloader()
    assert len(list(loader)) == 3
    assert loader.state_dict()["ended"]
    again = opened(url, epoch=1)
    resumed = again.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    passes = [_keys(resumed) for _ in range(2)]
    assert passes[0] == passes[1]  # both are the trainer's pass
    assert passes[0] != _keys(loader)
    assert not caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 1, 5])
def test_on_cuda_batches_arrive_whole_and_in_order(count):
    source = ({"video": torch.full((9,), n), "list": [torch.tensor(n)], "__key__": [str(n)]} for n in range(count))
    batches = list(copied_ahead(source, torch.device("cuda")))
    assert [batch["__key__"] for batch in batches] == [[str(number)] for number in range(count)]
    for number, batch in enumerate(batches):
        assert batch["video"].is_cuda
        assert batch["list"][0].is_cuda
        assert (batch["video"] == number).all()
