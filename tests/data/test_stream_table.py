"""The table of world sizes, workers and shards, for streams: in this process, and with real ones."""

from __future__ import annotations

import multiprocessing
import time

import pytest
from partition_table import (
    SHARDS,
    VIDEOS,
    WORKERS,
    WORLDS,
    check_partition,
    simulated_loader,
    stream_loader,
    write_videos,
)

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def table_shards(tmp_path_factory):
    """Paths by (training, shards)."""
    return {
        (training, shards): write_videos(tmp_path_factory.mktemp(f"{videos}-{shards}"), videos, shards)
        for training, videos in VIDEOS.items()
        for shards in SHARDS
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("world", WORLDS)
def test_every_partition_is_exact_and_the_same_for_all_workers(table_shards, training, shards, world):
    build = simulated_loader(table_shards[training, shards], training)
    runs = [check_partition(build, training, world, workers) for workers in (*WORKERS, 3)]
    assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize("training", [True, False])
def test_real_workers_give_what_simulated_ones_give(table_shards, training):
    paths = table_shards[training, 5]
    for workers in (0, 3):
        real = check_partition(stream_loader(paths, training), training, 2, workers, "fork")
        assert real == check_partition(simulated_loader(paths, training), training, 2, workers)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_the_whole_table_with_real_processes(table_shards, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    multiprocessing.set_forkserver_preload(["torch.utils.data", "ssync_pl.data.stream", "webdataset.tariterators"])
    began, loaders, processes = time.monotonic(), 0, 0
    for (training, shards), paths in table_shards.items():
        build = stream_loader(paths, training)
        for world in WORLDS:
            wanted = check_partition(simulated_loader(paths, training), training, world, 0)
            for workers in WORKERS:
                if workers == 0 and method != "fork":
                    continue  # no process is started
                assert check_partition(build, training, world, workers, method) == wanted, (training, shards, world)
                loaders += world
                processes += world * workers
    print(f"{method}: {loaders} loaders, {processes} processes, {time.monotonic() - began:.0f} s")  # noqa: T201
