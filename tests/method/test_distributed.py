"""Counts shared over ranks: two processes with one video each equal one process with both."""

import pytest
import torch
import torch.distributed as dist
from ssync_workers import CASES, loss_and_gradients, rank_step


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    folder = str(tmp_path_factory.mktemp("ranks"))
    # This process is one of the two: starting one more takes half as long as starting two.
    child = torch.multiprocessing.spawn(rank_step, args=(1, folder), nprocs=1, join=False)
    try:
        rank_step(0, 0, folder)
        while not child.join():
            pass
    finally:
        for process in child.processes:  # where this rank failed, the other one waits for it
            process.kill()
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_together_equal_one_process(ranks, case):
    expected, gradients = loss_and_gradients(case, slice(None))
    (one, of_one), (two, of_two) = (rank[case] for rank in ranks)
    torch.testing.assert_close((one + two) / 2, expected)  # as DDP averages
    for mine, yours, whole in zip(of_one, of_two, gradients, strict=True):
        torch.testing.assert_close(torch.cat([mine, yours]) / 2, whole)
    assert loss_and_gradients(case, slice(None), sync_counts=True)[0] == expected  # without processes, no difference
