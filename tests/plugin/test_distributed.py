import os
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ddp_workers import CASES, COUNTS, STEPS, dense_callback, dense_clips, dense_host, loss_and_gradients, run_rank
from metric_helpers import scores_of
from tiny_hosts import HandWritten, Recorder, fit, make_host, make_loader
from torch.utils.data import DataLoader

from ssync_pl.data import ShardWriter


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    folder = tmp_path_factory.mktemp("ranks")
    for split, count in (("train", 13), ("validation", 5)):
        with ShardWriter(folder, split, 3) as writer:
            for number in range(count):
                video, masks = np.full((6, 8, 8, 3), number, np.uint8), np.ones((6, 8, 8, 1), np.uint8)
                writer.write(str(number), {"video.npy": video, "segmentations.npy": masks})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # This process is one of the two: starting one more takes half as long as starting two.
    child = torch.multiprocessing.spawn(run_rank, args=(1, port, str(folder)), nprocs=1, join=False)
    before, here = dict(os.environ), Path.cwd()
    try:
        with warnings.catch_warnings():
            run_rank(0, 0, port, str(folder))
        while not child.join():
            pass
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
        for process in child.processes:  # where this rank failed, the other one waits for it
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_equal_weights_and_gradients(ranks, case):
    torch.testing.assert_close(ranks[0][case]["weights"], ranks[1][case]["weights"], rtol=0, atol=0)
    torch.testing.assert_close(ranks[0][case]["gradients"], ranks[1][case]["gradients"], rtol=0, atol=0)
    assert len(ranks[0][case]["gradients"]) == STEPS
    assert ranks[0][case]["hooks"] == ranks[1][case]["hooks"] == 0
    if case in ("plain", "find_unused", "dict"):  # as a host that calls the loss itself
        torch.testing.assert_close(ranks[0][case]["gradients"], ranks[0]["by_hand"]["gradients"])


def test_synchronised_counts_equal_one_process_on_the_joined_batch(ranks):
    one, recorder = make_host(HandWritten), Recorder()
    # Each rank takes 2 of the 4 clips of a step, every second one.
    fit(one, recorder, steps=2, loader=make_loader(8, batch_size=4))
    steps = ranks[0]["compiled"]["gradients"]
    torch.testing.assert_close(steps[:2], recorder.gradients, rtol=1e-4, atol=1e-6)
    local = ranks[0]["plain"]["gradients"]
    assert any(not torch.allclose(local[0][name], steps[0][name], rtol=1e-4, atol=1e-6) for name in steps[0])


@pytest.mark.parametrize("case", COUNTS)
def test_losses_of_ranks_with_synchronised_counts_equal_one_process(ranks, case):
    whole, *gradients = loss_and_gradients(case, slice(None))
    (one, *of_one), (two, *of_two) = (rank["counts"][case] for rank in ranks)
    torch.testing.assert_close((one + two) / 2, whole)  # as DDP averages
    torch.testing.assert_close([torch.cat(pair) / 2 for pair in zip(of_one, of_two, strict=True)], gradients)
    assert loss_and_gradients(case, slice(None), sync_counts=True)[0] == whole  # without processes, no difference


def test_all_ranks_stop_at_the_same_step_and_one_tells(ranks):
    assert ranks[0]["stop"]["step"] == ranks[1]["stop"]["step"] == 6
    assert all(rank["stop"]["stop"] for rank in ranks)
    assert [rank["stop"]["told"] for rank in ranks] == [1, 0]


def test_dense_alignment_trains_as_one_process_on_the_joined_batch(ranks):
    found = ranks[0]["dense"]
    torch.testing.assert_close(found, ranks[1]["dense"], rtol=0, atol=0)
    host, callback = dense_host(), dense_callback()
    torch.manual_seed(0)  # what the first rank drew
    fit(host, callback, steps=STEPS, loader=DataLoader(dense_clips(), batch_size=4))
    torch.testing.assert_close(found["projections"], callback.state_dict()["projections"], rtol=1e-3, atol=1e-5)


def test_two_processes_share_the_data_exactly(ranks):
    ranks = [rank["data"] for rank in ranks]
    assert [rank["steps"] for rank in ranks] == [6, 6]
    for epoch in range(2):
        first, second = (rank["trained"][epoch] for rank in ranks)
        assert len(first) == len(second) == 6
        assert len(set(first + second)) == 12
    assert ranks[0]["trained"][0] != ranks[0]["trained"][1]
    assert sorted(key for rank in ranks for key in rank["validated"]) == sorted(list("01234") * 2)


def test_metrics_are_those_of_one_process_on_all_videos(ranks):
    expected = scores_of(slice(None))
    assert [list(rank["metrics"]) for rank in ranks] == [list(expected)] * 2
    for rank in ranks:
        assert rank["metrics"] == pytest.approx(expected, abs=1e-12)
