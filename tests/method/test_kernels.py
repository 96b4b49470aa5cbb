import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssync_pl.method import ssync_loss
from ssync_pl.method.maps import SSyncMaps

HERE = Path(__file__).parent
COMMAND = [
    sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "python_files=*_cases.py", "-o", "addopts=",
    "-o", "python_functions=case_*", str(HERE / "kernel_cases.py"), "--rootdir", str(HERE.parents[1]),
]  # fmt: skip
ON_DEVICE = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def passed(environment: dict[str, str]) -> int:
    done = subprocess.run(COMMAND, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])  # type: ignore[index]


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", minversion="3.1")  # the interpreter of 3.0 runs no `tl.arange` of a `constexpr`
    assert passed({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}) > 20


@pytest.mark.gpu
@ON_DEVICE
def test_kernels_on_the_device():
    assert passed({"TRITON_INTERPRET": "0"}) > 20


@pytest.mark.gpu
@ON_DEVICE
def test_nothing_waits_for_the_device_and_a_graph_can_hold_it():
    d, a = (torch.randn(4, 4, 11, 576, device="cuda", requires_grad=True) for _ in range(2))
    maps = SSyncMaps(attention_logits=d, mask_logits=a, grid=(24, 24))

    def step() -> torch.Tensor:
        loss = ssync_loss(maps).loss
        d.grad, a.grad = torch.autograd.grad(loss, (d, a))
        return loss

    expected = step().detach().clone()  # also the kernels' one trial
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.testing.assert_close(captured.detach(), expected)
