"""Dense alignment in two processes with gloo trains as one process on the joined batch does."""

import socket

import pytest
import torch
import torch.distributed as dist
from dense_ddp_worker import STEPS, make_callback, make_clips, make_host, run_rank
from tiny_hosts import fit
from torch.utils.data import DataLoader


def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, args=(port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)

    host, callback = make_host(), make_callback()
    torch.manual_seed(0)  # what the first rank drew
    fit(host, callback, steps=STEPS, loader=DataLoader(make_clips(), batch_size=4))
    projections = callback.state_dict()["projections"]
    torch.testing.assert_close(ranks[0]["projections"], projections, rtol=1e-3, atol=1e-5)
