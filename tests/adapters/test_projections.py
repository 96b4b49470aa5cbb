from __future__ import annotations

import pytest
import torch
from torch import nn

from ssync_pl.adapters import Capture
from ssync_pl.adapters.projections import (
    Projection,
    StartOfCall,
    require_projections,
    softmax_gap,
    take_projection,
)
from ssync_pl.errors import HostError


def _capture() -> tuple[Capture, nn.Linear, nn.Linear]:
    keys, queries, capture = nn.Linear(2, 2), nn.Linear(2, 2), Capture()
    capture.watch("to_k", keys, StartOfCall(capture, ("to_k", "to_q")))
    capture.watch("to_q", queries, take_projection)
    capture.open()
    return capture, keys, queries


def test_the_autocast_of_the_host_comes_back_for_the_product() -> None:
    capture, keys, _ = _capture()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = keys(torch.ones(1, 2))
    kept: Projection = capture.only("to_k")
    assert kept.value is value
    with kept.precision():
        assert (kept.value @ torch.ones(2, 2)).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16), Projection(torch.ones(1, 2), (False, torch.bfloat16)).precision():
        assert (torch.ones(1, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with Projection(torch.ones(1), None).precision():
        assert not torch.is_autocast_enabled("cpu")


def test_a_new_call_forgets_the_last_one() -> None:
    capture, keys, queries = _capture()
    for _ in range(2):
        keys(torch.ones(1, 2))
        queries(torch.ones(1, 2))
        last = queries(torch.ones(1, 2))
    assert len(capture["to_k"]) == 1
    assert len(capture["to_q"]) == 2
    assert capture["to_q"][-1].value is last


def test_a_projection_that_did_not_run_is_named() -> None:
    capture, keys, _ = _capture()
    keys(torch.ones(1, 2))
    require_projections(capture, keys, "to_k")
    with pytest.raises(
        HostError, match=r"Expected Linear to call its 'to_q' in each of its calls.*use_reentrant=False"
    ):
        require_projections(capture, keys, "to_k", "to_q")


def test_the_gap_is_the_largest_of_all_pairs() -> None:
    logits = torch.tensor([[0.0], [0.0], [-torch.inf]])
    exact, off = torch.tensor([[0.5], [0.5], [0.0]]), torch.tensor([[0.4], [0.6], [0.0]])
    assert softmax_gap([(logits, exact)], 0) == (0.0, 1e-5)
    gap, tolerance = softmax_gap([(logits, exact), (logits, off.bfloat16())], 0)
    assert gap == pytest.approx(0.1, abs=2e-3)
    assert tolerance == 4 * torch.finfo(torch.bfloat16).eps


def test_nothing_is_heard_in_a_backward_pass() -> None:
    capture, keys, _ = _capture()

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
            keys(torch.ones(1, 2))
            return grads[0]

    Again.apply(torch.ones(1, requires_grad=True)).sum().backward()
    assert not capture["to_k"]
    keys(torch.ones(1, 2))
    assert len(capture["to_k"]) == 1
