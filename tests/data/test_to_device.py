from __future__ import annotations

import time

import pytest
import torch

from ssync_pl.data.loader import copied_ahead

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize("count", [0, 1, 5])
def test_on_cuda_batches_arrive_whole_and_in_order(count):
    video = [torch.full((2, 3), number, dtype=torch.uint8) for number in range(count)]
    source = [{"video": video[n], "list": [torch.tensor(n)], "__key__": [str(n)]} for n in range(count)]
    batches = list(copied_ahead(iter(source), CUDA))
    assert [batch["__key__"] for batch in batches] == [[str(number)] for number in range(count)]
    for number, batch in enumerate(batches):
        assert batch["video"].is_cuda
        assert batch["list"][0].is_cuda
        assert (batch["video"] == number).all()


def test_copies_run_beside_the_computation():
    # 64 MiB a batch from pinned memory, and enough work a step to hide the copy.
    host = [{"video": torch.empty(64 << 20, dtype=torch.uint8).pin_memory()} for _ in range(4)]
    weight = torch.randn(4096, 4096, device="cuda")

    def run(ahead: bool) -> float:
        source = iter([host[step % 4] for step in range(40)])
        batches = copied_ahead(source, CUDA) if ahead else ({"video": b["video"].cuda()} for b in source)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for batch in batches:
            for _ in range(4):
                torch.tanh(weight @ weight)
            batch["video"].sum()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    run(True), run(False)
    assert min(run(True) for _ in range(3)) < min(run(False) for _ in range(3))
