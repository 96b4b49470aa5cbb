"""Counts shared over ranks: two processes with one video each equal one process with both."""

import pytest
import torch
import torch.distributed as dist
from ssync_workers import CASES, batch_of, rank_step

from ssync_pl.method import ssync_loss
from ssync_pl.method.maps import SSyncMaps


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
    d, a, grid = batch_of(case)
    leaves = [x.clone().requires_grad_() for x in (d, a)]
    expected = ssync_loss(SSyncMaps(*leaves, grid=grid), **CASES[case])
    grads = torch.autograd.grad(expected.loss, leaves)
    if case == "one patch":
        assert expected.boundary_count.item() == 1
    torch.testing.assert_close((ranks[0][case]["loss"] + ranks[1][case]["loss"]) / 2, expected.loss.detach())
    for side in range(2):
        together = torch.cat([ranks[rank][case]["grads"][side] for rank in range(2)])
        torch.testing.assert_close(together, grads[side])
    maps = SSyncMaps(d, a, grid=grid)  # without processes it changes nothing
    assert torch.equal(ssync_loss(maps, sync_counts=True).loss, ssync_loss(maps).loss)
