import copy
import pickle
from typing import Any

import pytest
import tap_hosts as taps
import torch
from host_table import hear
from stand_in_parts import DIM, GRID, B, N, S, forget
from tiny_hosts import make_trainer
from tiny_models import loader
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from ssync_pl import SSyncCallback, attach, ssync_loss
from ssync_pl.adapters.discover import discover
from ssync_pl.adapters.paths import PathAdapter
from ssync_pl.errors import HostError, ShapeError
from ssync_pl.method.maps import SSyncMaps

TAPS = ("softmax:binder", "softmax:painter")
NAMED = {"attention": TAPS[0], "masks": TAPS[1], "warmup_steps": 0}


def tapped(host: Any, *places: str, video: Any = None, check: bool = True) -> SSyncMaps:
    adapter = PathAdapter(*(places or TAPS), grid=GRID)
    capture = adapter.attach(host)
    forget(host)
    capture.open()
    host(taps.clip() if video is None else video)
    capture.close()
    maps = adapter.collect(capture)
    if check:
        adapter.verify(capture, maps)
    capture.remove()
    return maps


def assert_own(maps: SSyncMaps, host: taps.Unknown) -> None:
    attention, masks = host.own()
    assert torch.equal(maps.attention_logits, attention)
    assert torch.equal(maps.mask_logits, masks)


def assert_clean(host: nn.Module) -> None:
    assert not torch.overrides._get_current_function_mode_stack()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())


@pytest.mark.parametrize("softmax", taps.SOFTMAXES)
def test_every_way_to_call_a_softmax(softmax: str) -> None:
    host = taps.make_unknown(taps.SlotsOnly(softmax))
    maps = tapped(host)
    assert_own(maps, host)
    assert maps.slot_valid is None


@pytest.mark.parametrize("attention", ["method", "patches_first"])
@pytest.mark.parametrize("masks", taps.MASKS)
def test_every_layout_is_read_and_found(attention: str, masks: str) -> None:
    for frames in (1, 2, 3):
        host = taps.make_unknown(taps.SlotsOnly(attention), taps.PicturesOnly(masks))
        maps = tapped(host, video=taps.clip(frames))
        # One frame of two videos may as well be two frames of one: the sizes decide, the values are the same.
        assert maps.shape == (B, frames, S, N)
        assert_own(maps, host)
    found = discover(host, lambda: host(taps.clip(3))).pairs[0]
    assert found.places == TAPS
    assert (found.batch, found.frames, found.attention.calls, found.masks.calls) == (2, 3, 3, 1)
    assert found.attention.has_gradient


def test_one_side_by_its_output_and_one_by_its_softmax() -> None:
    host = taps.make_unknown()
    host.painter.register_forward_hook(lambda painter, args, output: {"masks": painter.own_logits[-1].softmax(2)})
    maps = tapped(host, TAPS[0], "painter:masks")
    assert torch.equal(maps.attention_logits, host.own()[0])
    assert torch.equal(maps.mask_probs, host.own()[1].softmax(2))
    assert_own(tapped(host, TAPS[0], "softmax:painter:-2"), host)


@pytest.mark.parametrize("loss", ["brier", "ce"])
def test_absent_slots_are_marked_and_give_finite_gradients(loss: Any) -> None:
    host = taps.make_unknown()
    host.binder.bias = torch.tensor([0.0, 0.0, 0.0, float("-inf")])[:, None]
    maps = tapped(host)
    assert maps.slot_valid.tolist() == [[True, True, True, False]] * B
    maps.check_values()
    output = ssync_loss(maps, loss=loss)
    assert output.loss > 0
    for gradient in torch.autograd.grad(output.loss, [host.binder.to_q.weight, host.painter.places]):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_slots_that_are_absent_later_are_marked_too() -> None:
    host = taps.make_unknown()
    with attach(host, **NAMED) as ssync:
        for gone in (False, True):
            host.binder.gone = torch.tensor([False, False, False, gone])[:, None]
            ssync.add(host(taps.clip()).square().mean())
            assert ssync.maps.slot_valid.tolist() == [[True, True, True, not gone]] * B


def test_softmaxes_in_methods_of_the_host_are_heard_in_the_whole_step() -> None:
    host, batch = taps.UnknownHost(), {"image": taps.clip(1)[:, 0]}
    heard = hear(host, PathAdapter("softmax:.", "softmax:."), batch)  # a step without a forward pass
    assert torch.equal(heard.maps().attention_logits[:, 0], host.attention.mT)
    assert torch.equal(heard.maps().mask_logits[:, 0], host.alpha.flatten(2))
    heard.capture.remove()
    pair = discover(host, lambda: host.training_step(batch, 0)).pairs[0]
    assert pair.places == ("softmax:.", "softmax:.")
    assert (pair.attention.axis, pair.masks.axis) == (2, 1)
    callback = SSyncCallback(attention="softmax:.", masks="softmax:.", warmup_steps=0)
    run = make_trainer(callback, steps=1)
    run.fit(host, loader(batch))
    assert run.callback_metrics["ssync/interior_loss"].isfinite()
    assert_clean(host)


def test_a_checkpointed_host_gets_the_gradients_of_its_own_tensors_unless_it_is_reentrant() -> None:
    plain, host = taps.make_unknown(), taps.make_unknown()
    host.checkpointing = "plain"
    total = ssync_loss(tapped(host)).loss
    plain(taps.clip())
    expected = ssync_loss(SSyncMaps(*plain.own(), grid=GRID)).loss
    assert torch.equal(total, expected)
    total.backward()
    expected.backward()
    torch.testing.assert_close([p.grad for p in host.parameters()], [p.grad for p in plain.parameters()])
    assert host.binder.to_q.weight.grad.any()
    capture = PathAdapter(*TAPS).attach(host)
    capture.open()
    with set_checkpoint_early_stop(False):  # so that the recomputation reaches the end of the module
        host(taps.clip()).square().mean().backward()
    assert len(capture[TAPS[0]]) == 2  # it is not heard
    capture.remove()
    host.checkpointing = "reentrant"
    with attach(host, **NAMED) as ssync, pytest.raises(HostError, match="reentrant activation checkpointing"):
        ssync.add(host(taps.clip()).square().mean())
    assert_clean(host)


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="PyTorch 2.4 hides modules of compiled hosts")
def test_compiled_hosts() -> None:
    torch._dynamo.reset()
    host = taps.make_unknown(taps.SlotsOnly(iterations=1))
    adapter = PathAdapter(TAPS[0], "softmax:.", grid=GRID)
    capture, compiled = adapter.attach(host), torch.compile(host, backend="eager")
    compiled(taps.clip(1))  # with a closed window
    for seed in (0, 1):
        forget(host)
        capture.clear()
        capture.open()
        compiled(taps.clip(1, seed))
        capture.close()
        assert_own(adapter.collect(capture), host)
    torch._dynamo.reset()


def test_nothing_of_the_host_changes_even_when_it_fails() -> None:
    host, plain, bad = taps.make_unknown(), taps.make_unknown(), torch.rand(1, 2, 5, 4, 4)
    keys = list(host.state_dict())
    capture = PathAdapter("softmax:binder", "softmax:.").attach(host)
    capture.open()
    assert torch.equal(host(taps.clip()), plain(taps.clip()))
    with pytest.raises(RuntimeError):
        host(bad)
    capture.close()
    forget(host)
    heard = len(capture["softmax:binder"])
    capture.open()
    copy.deepcopy(host)(taps.clip())
    pickle.loads(pickle.dumps(host.painter))(torch.rand(1, 1, S, DIM))
    assert len(capture["softmax:binder"]) == heard
    capture.remove()
    with pytest.raises(RuntimeError):
        discover(host, lambda: host(bad))
    assert list(host.state_dict()) == keys
    assert_clean(host)


def test_a_softmax_without_gradient_takes_no_place() -> None:
    class Logs(taps.PicturesOnly):
        def forward(self, slots: Tensor) -> Tensor:
            out = super().forward(slots)
            with torch.no_grad():
                picture = (self.own_logits[-1] * 100).flatten(0, 1)
                picture.softmax(1)
                picture.unflatten(2, GRID).softmax(1)
            return out

    host = taps.make_unknown(decoder=Logs())
    assert_own(tapped(host), host)
    first, *others = discover(host, lambda: host(taps.clip(3))).pairs
    assert first.masks.has_gradient
    assert others
    assert not any(pair.masks.has_gradient for pair in others)
    with torch.no_grad():
        assert not tapped(taps.make_unknown()).attention_logits.requires_grad


class Both(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(1) + x.softmax(2)


@pytest.mark.parametrize("axis", [1, 2])
def test_the_axis_may_be_named_where_the_shape_is_ambiguous(axis: int) -> None:
    value = torch.randn(2, N, N)  # as many patches as slots
    maps = tapped(nn.Sequential(Both(), Both()), f"softmax:0:{axis}", f"softmax:1:{axis}", video=value)
    assert torch.equal(maps.attention_logits[:, 0], value if axis == 1 else value.mT)


class InLoop(taps.Unknown):
    """Draws once per frame; the masks are made in a method of the model itself, or in a module."""

    def __init__(self, own_softmax: bool = False) -> None:
        super().__init__(taps.SlotsOnly(iterations=1))
        self.drawn = nn.Softmax(1) if own_softmax else None

    def attend(self, frame: Tensor, slots: Tensor, t: int) -> Tensor:
        slots = super().attend(frame, slots, t)
        alpha = (slots @ frame.transpose(1, 2)).unflatten(2, GRID)
        alpha.softmax(1) if self.drawn is None else self.drawn(alpha)
        return slots

    def draw(self, slots: Tensor) -> Tensor:
        return slots


class Growing(nn.Sequential):
    def forward(self, value: Tensor) -> None:
        for slots in (2, 3):
            self[0](torch.zeros(1, slots, 4))
        self[1](torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("host", "places", "message"),
    [
        (taps.Unknown, ("softmax:eyelid", TAPS[1]), "softmax to run inside 'eyelid' .* but none did"),
        (lambda: taps.Unknown(taps.SlotsOnly("module")), ("softmax:binder.inner", TAPS[1]), r"axis 1 in 6 call\(s\)"),
        (lambda: Growing(nn.Softmax(1), nn.Softmax(1)), ("softmax:0", "softmax:1"), "one shape in all calls"),
        (InLoop, ("softmax:.", "softmax:."), "the last"),
        (InLoop, (TAPS[0], "softmax:."), "the last"),
    ],
)
def test_modules_around_the_wrong_softmaxes_are_refused(host: Any, places: tuple[str, str], message: str) -> None:
    with pytest.raises((HostError, ShapeError), match=message):
        tapped(host(), *places, video=taps.clip(3))


def test_masks_of_each_frame_and_iterations_of_images_are_no_further_masks() -> None:
    assert tapped(InLoop(True), TAPS[0], "softmax:drawn", video=taps.clip(3), check=False).shape == (B, 3, S, N)
    for masks in ("softmax:.", "softmax:painter"):
        host = taps.make_unknown(taps.SlotsOnly(iterations=3))
        assert_own(tapped(host, TAPS[0], masks, video=taps.clip(1)), host)
