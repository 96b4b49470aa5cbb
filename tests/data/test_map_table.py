"""The table of world sizes, workers and shards, for mapped shards: in this process, and with real ones."""

from __future__ import annotations

import multiprocessing
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from partition_table import BATCH, SHARDS, VIDEOS, WORKERS, WORLDS, check_partition, write_videos

from ssync_pl.data import ShardDataModule


@pytest.fixture(scope="module")
def table_shards(tmp_path_factory):
    """Paths by (training, shards)."""
    return {
        (training, shards): write_videos(tmp_path_factory.mktemp(f"{videos}-{shards}"), videos, shards)
        for training, videos in VIDEOS.items()
        for shards in SHARDS
    }


def _loader(paths, training, rank, world, workers, start_method):
    split = "train" if training else "predict"
    data = ShardDataModule(
        **{split: paths}, batch_size=BATCH, clip_length=2, num_workers=workers, start_method=start_method
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
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_partition_is_exact(table_shards, training, shards, world):
    check_partition(partial(_loader, table_shards[training, shards], training), training, world, 0)


@pytest.mark.parametrize("training", [True, False])
def test_real_workers_change_nothing(table_shards, training):
    build = partial(_loader, table_shards[training, 5], training)
    alone = check_partition(build, training, 2, 0)
    assert check_partition(build, training, 2, 3, "fork") == alone


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_the_whole_table_with_real_processes(table_shards, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    multiprocessing.set_forkserver_preload(["torch.utils.data", "ssync_pl.data.dataset"])
    began, loaders, processes = time.monotonic(), 0, 0
    for (training, shards), paths in table_shards.items():
        build = partial(_loader, paths, training)
        for world in WORLDS:
            wanted = check_partition(build, training, world, 0)
            for workers in WORKERS[1:]:
                assert check_partition(build, training, world, workers, method) == wanted, (training, shards, world)
                loaders += world
                processes += world * workers
    print(f"{method}: {loaders} loaders, {processes} processes, {time.monotonic() - began:.0f} s")  # noqa: T201
