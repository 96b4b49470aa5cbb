from __future__ import annotations

import pytest
import torch

from ssync_pl.adapters.agreement import check_close, check_softmax
from ssync_pl.errors import HostError


def test_rounding_of_the_hosts_precision_is_no_difference() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 50)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_softmax(logits, logits.softmax(1).to(dtype), 1, "masks")
    check_close(logits.bfloat16(), logits, "update", "the mean", scale=4.0)


@pytest.mark.parametrize("change", [1e-4, -1e-4, torch.nan])
def test_any_difference_beyond_it_is_refused(change: float) -> None:
    logits = torch.randn(2, 3, 50)
    own = logits.softmax(1)
    own[1, 2, 7] += change
    with pytest.raises(HostError, match=r"Expected the masks of x to be the softmax over slots .* differ by up to"):
        check_softmax(logits, own, 1, "masks of x")
    with pytest.raises(HostError, match=r"Expected the update to be the mean, but they differ by up to .*tolerance"):
        check_close(logits.softmax(1), own, "update", "the mean")


def test_the_scale_widens_the_tolerance() -> None:
    check_close(torch.tensor([1000.0]), torch.tensor([1000.005]), "update", "the mean", scale=1000.0)
    with pytest.raises(HostError, match="differ by up to"):
        check_close(torch.tensor([1000.0]), torch.tensor([1000.005]), "update", "the mean")
