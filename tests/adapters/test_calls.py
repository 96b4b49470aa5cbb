"""Parts of a call joined to logits, and their comparison with what the host used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ssync_pl.adapters import Capture, entry, watch_attention
from ssync_pl.adapters.calls import Projection, check_close, in_shape_of, scaled_product
from ssync_pl.errors import HostError


class Attention(nn.Module):
    scale = 0.5

    def __init__(self, iterations: int = 2) -> None:
        super().__init__()
        self.to_q, self.to_k, self.iterations = nn.Linear(4, 4), nn.Linear(4, 4), iterations

    def forward(self, slots: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        keys, probs = self.to_k(features), torch.zeros(len(slots), slots.shape[1], features.shape[1])
        for _ in range(self.iterations):
            probs = (torch.einsum("bsd,bnd->bsn", self.to_q(slots), keys) * self.scale).softmax(1)
            slots = slots + probs @ features
        return slots, probs


def listening(module: nn.Module) -> Capture:
    capture = Capture()
    watch_attention(capture, "attention", module, scaled_product, own=entry("1"))
    capture.open()
    return capture


def test_the_last_iteration_of_each_call_counts_and_projections_do_not_pile_up() -> None:
    torch.manual_seed(0)
    module = Attention()
    capture = listening(module)
    outputs = [module(torch.randn(2, 3, 4), torch.randn(2, 9, 4)) for _ in range(3)]
    assert (len(capture["attention to_k"]), len(capture["attention to_q"])) == (0, 0)
    for call, (_, probs) in zip(capture["attention"], outputs, strict=True):
        assert torch.equal(call.logits.softmax(1), probs)
        assert call.own is probs


def test_a_call_without_a_projection_or_another_output_is_refused() -> None:
    listening(module := Attention(iterations=0))
    with pytest.raises(HostError, match=r"Attention to call 'to_q' .*use_reentrant=False"):
        module(torch.randn(2, 3, 4), torch.randn(2, 9, 4))
    with pytest.raises(HostError, match="return its map as 'masks', but got dict with keys slots"):
        entry("masks")(nn.Identity(), {"slots": torch.zeros(1)})


@pytest.mark.parametrize(
    ("logits", "own"),
    [((6, 3, 8), (6, 3, 8)), ((18, 2, 4), (6, 3, 2, 4)), ((144, 1), (6, 3, 2, 4, 1)), ((18, 8), (6, 3, 2, 4))],
)
def test_folded_axes_are_unfolded(logits: tuple[int, ...], own: tuple[int, ...]) -> None:
    value = torch.arange(144.0).view(logits)
    unfolded, _ = in_shape_of(value, torch.zeros(own), nn.Identity())
    assert torch.equal(unfolded.flatten(), value.flatten())
    assert unfolded.shape == own


@pytest.mark.parametrize("own", [(2, 8, 4), (2, 4, 9), (4, 2, 8)])
def test_axes_in_another_order_are_refused(own: tuple[int, ...]) -> None:
    with pytest.raises(HostError, match="shape of its masks"):
        in_shape_of(torch.zeros(8, 8) if own == (2, 8, 4) else torch.zeros(2, 4, 8), torch.zeros(own), nn.Identity())


def test_the_autocast_of_the_host_comes_back_for_the_product() -> None:
    with Projection(torch.ones(1, 2), (True, torch.bfloat16)).precision():
        assert (torch.ones(1, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16), Projection(torch.ones(1, 2), (False, torch.bfloat16)).precision():
        assert (torch.ones(1, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_no_difference_and_more_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    probs = torch.randn(2, 3, 50).softmax(1)
    check_close(probs, probs.to(dtype), "masks", "the softmax")
    check_close(1000 * probs, 1000 * probs.to(dtype), "update", "the mean", scale=1000.0)
    for change in (0.1, -0.1, torch.nan):
        other = probs.to(dtype, copy=True)
        other[1, 2, 7] += change
        with pytest.raises(HostError, match=r"masks to be the softmax, but they differ by up to .*tolerance"):
            check_close(probs, other, "masks", "the softmax")
