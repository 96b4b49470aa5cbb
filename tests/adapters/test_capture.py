"""Hooks inside a window, and calls of slot attention that are joined from their parts."""

import pytest
import torch
from stand_in_parts import SlotAttention
from torch import Tensor, nn

from ssync_pl.adapters import Capture, entry, submodule, watch_attention
from ssync_pl.adapters.calls import check_close, scaled_product
from ssync_pl.errors import HostError

X = torch.zeros(1, 2)


def _watched() -> tuple[nn.Linear, Capture]:
    layer, capture = nn.Linear(2, 2), Capture()
    capture.watch("layer", layer)
    return layer, capture


def test_listens_only_inside_the_window() -> None:
    layer, capture = _watched()
    capture.watch("other", nn.Identity())
    capture.watch("input", layer, lambda module, args, kwargs: kwargs.get("input"), inputs=True)
    layer(X)
    assert capture["layer"] == []
    assert capture.silent == ["layer", "other", "input"]
    capture.open()
    outputs = [layer(input=torch.full((1, 2), float(i))) for i in range(3)]
    capture.close()
    layer(X)
    assert all(kept is output for kept, output in zip(capture["layer"], outputs, strict=True))
    assert len(capture["input"]) == 3
    assert capture.silent == ["other"]
    capture.remove()
    capture.remove()  # may be called again
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert capture["layer"] == []


def test_training_only_leaves_no_grad_out() -> None:
    layer, capture = _watched()
    capture.open(training_only=True)
    with torch.no_grad():
        assert not capture.is_open
        layer(X)
    assert capture["layer"] == []
    layer.eval()(X)  # a part that is frozen in evaluation mode is heard all the same
    assert len(capture["layer"]) == 1


def test_a_step_that_goes_past_hooks_is_told() -> None:
    host, capture = nn.Sequential(nn.Linear(2, 2)), Capture()
    capture.watch("host", host)
    capture.watch("0", host[0])
    capture.open()
    capture.refuse_bypass()  # nothing ran yet
    host.forward(X)
    with pytest.raises(HostError, match=r"hooks on 'host' .* method forward of Sequential"):
        capture.refuse_bypass()
    host(X)
    capture.refuse_bypass()


def test_paths_name_modules() -> None:
    host = nn.ModuleDict({"processor": nn.Sequential(nn.Identity(), nn.Linear(1, 3))})
    assert submodule(host, "processor.1").out_features == 3
    for path, children in (("processor.2", "0, 1"), ("decoder.mlp", "processor"), ("processor.0.weight", "none")):
        with pytest.raises(HostError, match=f"module at '{path}', but .* Its children: {children}"):
            submodule(host, path)


class _Attention(SlotAttention):
    def forward(self, slots: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.attend(features, slots) if self.iterations else (slots, features)


def test_the_last_iteration_of_each_call_counts_and_projections_do_not_pile_up() -> None:
    module, capture = _Attention(3), Capture()
    watch_attention(capture, "attention", module, scaled_product, own=entry("1"))
    capture.open()
    piled: list[int] = []
    module.gru.register_forward_hook(lambda *call: piled.append(len(capture["attention to_q"])))
    outputs = [module(torch.randn(2, 3, 8), torch.randn(2, 9, 8)) for _ in range(3)]
    assert piled == [1, 2, 2] * 3  # of each call, the last two are held
    assert (len(capture["attention to_k"]), len(capture["attention to_q"])) == (0, 0)
    for call, (_, probs) in zip(capture["attention"], outputs, strict=True):
        assert torch.equal(call.logits.softmax(1), probs)
        assert call.own is probs
    module.iterations = 0
    with pytest.raises(HostError, match=r"Attention to call 'to_q' .*use_reentrant=False"):
        module(torch.randn(2, 3, 8), torch.randn(2, 9, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_is_no_difference_and_more_is(dtype: torch.dtype) -> None:
    probs = torch.randn(2, 3, 50).softmax(1)
    check_close(1000 * probs, 1000 * probs.to(dtype), "update", "the mean", scale=1000.0)
    for change in (0.1, -0.1, torch.nan):
        other = probs.to(dtype, copy=True)
        other[1, 2, 7] += change
        with pytest.raises(HostError, match=r"masks to be the softmax, but they differ by up to .*tolerance"):
            check_close(probs, other, "masks", "the softmax")
