from __future__ import annotations

import pytest
import torch
from tap_hosts import SLOTS, PicturesOnly, SlotsOnly, Unknown, UnknownHost, UnknownImages, tap_clip
from torch import Tensor, nn

from ssync_pl.adapters.discover import discover
from ssync_pl.adapters.paths import PathAdapter


def _runs(host: nn.Module, places: tuple[str, str]) -> tuple[int, int, int, int]:
    """Shape of the maps that the found places really give."""
    adapter = PathAdapter(*places)
    capture = adapter.attach(host)
    capture.open()
    host(tap_clip(2, 3))
    capture.close()
    maps = adapter.collect(capture)
    adapter.verify(capture, maps)
    capture.remove()
    return maps.shape


@pytest.mark.parametrize("attention", ["bsn", "bns"])
@pytest.mark.parametrize("masks", ["bsn", "bns", "btsn", "btshw", "bs1hw", "bshw1"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_what_is_found_works(attention: str, masks: str, iterations: int) -> None:
    host = Unknown(SlotsOnly(attention, iterations=iterations), PicturesOnly(masks))
    found = discover(host, lambda: host(tap_clip(2, 3))).pairs[0]
    assert found.places == ("softmax:binder", "softmax:painter")
    assert (found.batch, found.frames, found.attention.calls, found.masks.calls) == (2, 3, 3, 1)
    assert found.attention.has_gradient
    assert _runs(host, found.places) == (2, 3, SLOTS, 16)


def test_pixel_masks_and_heads() -> None:
    host = Unknown(SlotsOnly(heads=2), PicturesOnly("bs1hw", scale=2))
    found = discover(host, lambda: host(tap_clip(2, 3))).pairs[0]
    assert found.places == ("softmax:binder", "softmax:painter")
    assert _runs(host, found.places) == (2, 3, SLOTS, 16)


def test_a_softmax_in_a_module_of_its_own_is_found_at_the_module_of_a_frame() -> None:
    class Modular(SlotsOnly):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Softmax(1)
            self.softmax = lambda x, axis: self.inner(x)

    host = Unknown(Modular())
    found = discover(host, lambda: host(tap_clip(2, 3)))
    assert found.pairs[0].places == ("softmax:binder", "softmax:painter")
    assert ("binder.inner", 6) in {(spot.path, spot.calls) for spot in found.spots}


def test_softmaxes_of_the_host_s_own_methods() -> None:
    host = UnknownHost(UnknownImages())
    batch = {"image": tap_clip(2, 1)[:, 0]}
    found = discover(host, lambda: host.training_step(batch, 0))
    assert found.pairs[0].places == ("softmax:.", "softmax:.")
    assert (found.pairs[0].attention.axis, found.pairs[0].masks.axis) == (2, 1)


def test_softmaxes_without_gradient_come_last() -> None:
    class Twice(PicturesOnly):
        def forward(self, slots: Tensor) -> Tensor:
            out = super().forward(slots)
            with torch.no_grad():
                self.kept[-1].unflatten(3, (2, 8)).softmax(2)  # a picture for a log
            return out

    host = Unknown(decoder=Twice("btshw"))
    first, *others = discover(host, lambda: host(tap_clip(2, 3))).pairs
    assert first.masks.has_gradient
    assert first.masks.shape[-2:] == (4, 4)
    assert others
    assert not any(pair.masks.has_gradient for pair in others)


def test_hosts_without_slots() -> None:
    host = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(32, 10), nn.Softmax(1))
    found = discover(host, lambda: host(torch.rand(2, 3, 4, 4)))
    assert found.pairs == ()
    assert found.spots == ()
    transformer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    found = discover(transformer, lambda: transformer(torch.rand(2, 5, 8)))
    assert found.pairs == ()


def test_tokens_that_attend_to_tokens_are_no_slots() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2)).softmax(2) @ x

    host = nn.Sequential(Attention(), Attention())
    found = discover(host, lambda: host(torch.rand(2, 9, 4)))
    assert found.pairs == ()
    assert {spot.path for spot in found.spots} == {"0", "1"}


def test_the_host_is_left_as_it_was_even_when_it_fails() -> None:
    host = Unknown()
    with pytest.raises(RuntimeError):
        discover(host, lambda: host(torch.rand(1, 1, 5, 4, 4)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())
    assert not torch.overrides._get_current_function_mode_stack()
