from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tap_hosts import (
    DIM,
    SLOTS,
    SOFTMAXES,
    PicturesOnly,
    SlotsOnly,
    Unknown,
    UnknownImages,
    make_unknown,
    tap_clip,
)
from torch import Tensor, nn

from ssync_pl import ssync_loss
from ssync_pl.adapters import find_adapter
from ssync_pl.adapters.paths import PathAdapter
from ssync_pl.errors import HostError, ShapeError
from ssync_pl.hosts import SAVi, VideoSAUR
from ssync_pl.method.maps import SSyncMaps

TAPS = ("softmax:binder", "softmax:painter")


def tapped(
    host: Unknown, adapter: PathAdapter | None = None, video: Tensor | None = None, run: Any = None
) -> SSyncMaps:
    adapter = PathAdapter(*TAPS) if adapter is None else adapter
    capture = adapter.attach(host)
    host.forget()
    capture.open()
    video = tap_clip() if video is None else video
    host(video)
    capture.close()
    maps = adapter.collect(capture, {"video": video})
    adapter.verify(capture, maps)
    capture.remove()
    return maps


@pytest.mark.parametrize("softmax", SOFTMAXES)
def test_every_way_to_call_a_softmax(softmax: str) -> None:
    host = make_unknown(SlotsOnly(softmax=softmax))
    maps = tapped(host)
    attention, masks = host.own()
    assert torch.equal(maps.attention_logits, attention)
    assert torch.equal(maps.mask_logits, masks)
    assert maps.grid == (4, 4)


@pytest.mark.parametrize("attention", ["bsn", "bns"])
@pytest.mark.parametrize("masks", ["bsn", "bns", "btsn", "btns", "bs1hw", "bshw1", "btshw"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_every_layout(attention: str, masks: str, frames: int) -> None:
    host = make_unknown(SlotsOnly(attention), PicturesOnly(masks))
    maps = tapped(host, video=tap_clip(2, frames))
    own = host.own()
    # One frame of two videos may as well be two frames of one: the sizes decide, the values are the same.
    assert maps.shape == (2, frames, SLOTS, 16)
    assert torch.equal(maps.attention_logits, own[0])
    assert torch.equal(maps.mask_logits, own[1])


def test_masks_of_pixels_are_averaged() -> None:
    host = make_unknown(decoder=PicturesOnly("bs1hw", scale=2))
    maps = tapped(host)
    expected = host.own()[1].softmax(2).unflatten(3, (4, 2, 4, 2)).mean((4, 6)).flatten(3)
    assert torch.allclose(maps.mask_probs, expected)
    assert torch.equal(maps.attention_logits, host.own()[0])
    assert maps.grid == (4, 4)


def test_heads_count_as_their_mean() -> None:
    host = make_unknown(SlotsOnly(heads=2))
    maps = tapped(host)
    own = host.own()[0]  # (B, T, heads, S, N)
    assert torch.allclose(maps.attention_probs, own.softmax(3).mean(2))
    assert torch.allclose(maps.attention_logits, own.mean(2))


def test_one_side_by_its_output_and_one_by_its_softmax() -> None:
    class Both(PicturesOnly):
        def forward(self, slots: Tensor) -> Any:
            super().forward(slots)
            return {"masks": self.kept[-1].softmax(2)}

    host = make_unknown(decoder=Both())
    maps = tapped(host, PathAdapter("softmax:binder", "painter:masks"))
    assert torch.equal(maps.attention_logits, host.own()[0])
    assert torch.equal(maps.mask_probs, host.own()[1].softmax(2))
    maps = tapped(host, PathAdapter("softmax:binder", "softmax:painter:-2"))
    assert torch.equal(maps.mask_logits, host.own()[1])


def test_absent_slots_are_marked_and_give_finite_gradients() -> None:
    attention = SlotsOnly()
    attention.absent = 1
    host = make_unknown(attention)
    for loss in ("brier", "ce"):
        maps = tapped(host)
        assert maps.slot_valid is not None
        assert maps.slot_valid.tolist() == [[True, True, False]] * 2
        maps.check_values()
        output = ssync_loss(maps, loss=loss)
        gradients = torch.autograd.grad(output.loss, [host.binder.to_q.weight, host.painter.position])
        assert output.loss.isfinite()
        assert output.loss > 0
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


def test_slots_are_not_marked_where_all_are_there() -> None:
    assert tapped(make_unknown()).slot_valid is None


def test_slots_that_are_absent_later_are_marked_too() -> None:
    class Sometimes(SlotsOnly):
        def forward(self, slots: Tensor, features: Tensor) -> Tensor:
            logits = (self.to_q(slots) @ self.to_k(features).transpose(1, 2)).masked_fill(self.gone, float("-inf"))
            self.kept.append(logits)
            return slots + self.update(self.softmax(logits, 1) @ features)

    host = make_unknown(Sometimes())
    adapter = PathAdapter(*TAPS)
    capture = adapter.attach(host)
    for gone in (False, True):
        host.binder.gone = torch.tensor([[[False]], [[False]], [[gone]]]).view(1, 3, 1)
        capture.clear()
        capture.open()
        host(tap_clip())
        capture.close()
        assert adapter.collect(capture).slot_valid.tolist() == [[True, True, not gone]] * 2


def test_absent_slots_of_a_mask_from_elsewhere_are_found_in_the_first_step() -> None:
    class Biased(SlotsOnly):
        def forward(self, slots: Tensor, features: Tensor) -> Tensor:
            logits = self.to_q(slots) @ self.to_k(features).transpose(1, 2) + self.bias
            self.kept.append(logits)
            return slots + self.update(self.softmax(logits, 1) @ features)

    host = make_unknown(Biased())
    host.binder.bias = torch.tensor([0.0, 0.0, float("-inf")])[:, None]
    assert tapped(host).slot_valid.tolist() == [[True, True, False]] * 2


def test_softmaxes_in_methods_of_the_host_are_heard_in_the_whole_step() -> None:
    host = UnknownImages()
    adapter = PathAdapter("softmax:.", "softmax:.")
    capture = adapter.attach(host)
    image = tap_clip(2, 1)[:, 0]
    features = host.eyes(image.flatten(2).transpose(1, 2))
    capture.open()
    slots = host.bind(features)  # no forward pass at all
    host.paint(slots)
    capture.close()
    maps = adapter.collect(capture)
    assert torch.equal(maps.attention_logits[:, 0], ((features + host.position) @ host.seeds.T).transpose(1, 2))
    assert torch.equal(maps.mask_logits[:, 0], slots @ host.position.T)
    assert not torch.overrides._get_current_function_mode_stack()


def test_loss_and_gradients_are_those_of_the_host_s_own_tensors() -> None:
    host = make_unknown()
    maps = tapped(host)
    total = ssync_loss(maps).loss
    attention, masks = host.own()
    expected = ssync_loss(SSyncMaps(attention_logits=attention, mask_logits=masks, grid=(4, 4))).loss
    assert torch.equal(total, expected)
    weights = [host.binder.to_q.weight, host.binder.to_k.weight, host.painter.position, host.eyes.weight]
    gradients = (torch.autograd.grad(value, weights, retain_graph=True) for value in (total, expected))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
        assert one.any()


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_hosts(whole: bool) -> None:
    torch._dynamo.reset()
    host = make_unknown()
    adapter = PathAdapter(*TAPS) if not whole else PathAdapter("softmax:binder", "softmax:.")
    capture = adapter.attach(host)
    compiled = torch.compile(host, backend="eager")
    own = []
    for seed in (0, 1):
        compiled(tap_clip(seed=seed))  # with a closed window
        host.forget()
        capture.clear()
        capture.open()
        compiled(tap_clip(seed=seed))
        capture.close()
        maps = adapter.collect(capture)
        assert torch.equal(maps.attention_logits, host.own()[0])
        assert torch.equal(maps.mask_logits, host.own()[1])
        own.append(maps)
    assert not torch.equal(own[0].attention_logits, own[1].attention_logits)
    torch._dynamo.reset()


def test_checkpointed_attention() -> None:
    host = make_unknown()
    host.checkpointing = "plain"
    maps = tapped(host)
    ssync_loss(maps).loss.backward()
    expected = make_unknown()
    ssync_loss(tapped(expected)).loss.backward()
    assert torch.allclose(host.binder.to_q.weight.grad, expected.binder.to_q.weight.grad)
    assert host.binder.to_q.weight.grad.any()


def test_recomputation_is_not_heard() -> None:
    host = make_unknown()
    host.checkpointing = "plain"
    adapter = PathAdapter(*TAPS)
    capture = adapter.attach(host)
    capture.open()
    loss = host.loss_function(tap_clip())
    capture.close()
    calls = len(capture["softmax:binder"])
    loss.backward()
    assert len(capture["softmax:binder"]) == calls == 2
    assert not torch.overrides._get_current_function_mode_stack()


def test_autocast_keeps_the_precision_of_the_host() -> None:
    host = make_unknown()
    with torch.autocast("cpu", torch.bfloat16):
        maps = tapped(host)
    assert maps.attention_logits.dtype == torch.bfloat16
    assert torch.equal(maps.attention_logits, host.own()[0])
    ssync_loss(maps).loss.backward()
    assert host.binder.to_q.weight.grad.isfinite().all()


def test_nothing_of_the_host_changes() -> None:
    host, plain = make_unknown(), make_unknown()
    before = {name: value.clone() for name, value in host.state_dict().items()}
    capture = PathAdapter(*TAPS).attach(host)
    capture.open()
    torch.manual_seed(7)
    out = host(tap_clip())
    after = torch.rand(1)
    capture.remove()
    torch.manual_seed(7)
    assert torch.equal(out, plain(tap_clip()))
    assert torch.equal(after, torch.rand(1))
    assert list(host.state_dict()) == list(before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_forward_pass_that_fails_leaves_no_recorder_on() -> None:
    host = make_unknown()
    capture = PathAdapter("softmax:binder", "softmax:.").attach(host)
    capture.open()
    with pytest.raises(RuntimeError):
        host(torch.rand(1, 2, 5, 4, 4))
    capture.close()
    assert not torch.overrides._get_current_function_mode_stack()


def test_copies_of_a_host_are_silent() -> None:
    host = make_unknown()
    capture = PathAdapter("softmax:binder", "softmax:.").attach(host)
    capture.open()
    twin = copy.deepcopy(host)
    twin(tap_clip())
    assert not capture["softmax:binder"]
    capture.close()
    host.forget()
    pickle.loads(pickle.dumps(host.painter))(torch.rand(1, 1, SLOTS, DIM))
    capture.remove()


def test_a_softmax_without_gradient_takes_no_place() -> None:
    class Logs(PicturesOnly):
        def forward(self, slots: Tensor) -> Tensor:
            out = super().forward(slots)
            with torch.no_grad():
                (self.kept[-1] * 100).flatten(0, 1).softmax(1)  # a sharper picture for a log
            return out

    host = make_unknown(decoder=Logs("bsn"))
    maps = tapped(host)
    assert torch.equal(maps.mask_logits, host.own()[1])
    with torch.no_grad():
        maps = tapped(make_unknown(SlotsOnly(iterations=3)))
    assert not maps.attention_logits.requires_grad


def test_the_axis_may_be_named_where_the_shape_is_ambiguous() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(1) + x.softmax(2)  # as many patches as slots

    host = nn.ModuleDict({"a": Square(), "b": Square()})
    a, b = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    for axis in (1, 2):
        adapter = PathAdapter(f"softmax:a:{axis}", f"softmax:b:{axis}")
        capture = adapter.attach(host)
        capture.open()
        host["a"](a)
        host["b"](b)
        capture.close()
        maps = adapter.collect(capture)
        adapter.verify(capture, maps)
        assert torch.equal(maps.attention_logits[:, 0], a if axis == 1 else a.transpose(1, 2))


def test_a_module_without_a_softmax_is_refused() -> None:
    with pytest.raises(HostError, match="softmax to run inside 'eyes' in the training step, but none did"):
        tapped(make_unknown(), PathAdapter("softmax:eyes", "softmax:painter"))


def test_a_module_around_the_wrong_loop_is_refused() -> None:
    class Looped(SlotsOnly):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Softmax(1)
            self.softmax = lambda x, axis: self.inner(x)

    with pytest.raises(ShapeError, match=r"\(2, 3, 16\) with slots on axis 1 in 4 call\(s\) and 'softmax:painter'"):
        tapped(make_unknown(Looped()), PathAdapter("softmax:binder.inner", "softmax:painter"))


def test_slots_that_grow_inside_a_step_are_refused() -> None:
    host = nn.ModuleDict({"a": nn.Softmax(1), "b": nn.Softmax(1)})
    adapter = PathAdapter("softmax:a", "softmax:b")
    capture = adapter.attach(host)
    capture.open()
    for slots in (2, 3):
        host["a"](torch.zeros(1, slots, 4))
    host["b"](torch.zeros(2, 3, 4))
    with pytest.raises(HostError, match="to have one shape in all calls"):
        adapter.collect(capture)


@pytest.mark.parametrize("name", ["savi", "videosaur"])
def test_the_tap_hears_what_an_adapter_reads(name: str) -> None:
    torch.manual_seed(0)
    if name == "savi":
        host: Any = SAVi(num_slots=3, slot_dim=8, encoder_channels=(8,), encoder_strides=(2,), feature_dim=8,
                         decoder_broadcast=(4, 4), decoder_channels=(8,), decoder_strides=(2,))  # fmt: skip
        batch, places = {"video": torch.rand(2, 2, 3, 16, 16)}, ("softmax:corrector", "softmax:decoder")
    else:
        host = VideoSAUR(num_slots=3, slot_dim=8, backbone=None, feature_dim=5, grid=(4, 4), decoder_hidden=(8,))
        batch = {"features": torch.rand(2, 2, 16, 5)}
        places = ("softmax:processor.module.corrector", "softmax:decoder.module")
    adapters = (find_adapter(host), PathAdapter(*places))
    captures = [adapter.attach(host) for adapter in adapters]
    for capture in captures:
        capture.open()
    host.training_step(batch, 0)
    for capture in captures:
        capture.close()
    one, two = (adapter.collect(capture, batch) for adapter, capture in zip(adapters, captures, strict=True))
    assert one.shape == two.shape
    assert torch.equal(one.attention_logits, two.attention_logits)
    assert torch.equal(one.masks, two.masks)


class _DrawsInItsLoop(nn.Module):
    """Attends and draws once per frame; the masks are made in a method of the model itself."""

    def __init__(self, own_softmax: bool) -> None:
        super().__init__()
        self.binder = SlotsOnly(iterations=1)
        self.drawn = nn.Softmax(1) if own_softmax else None

    def forward(self, video: Tensor) -> Tensor:
        slots, frames = torch.ones(len(video), SLOTS, DIM) * torch.arange(SLOTS)[:, None], []
        for frame in video.unbind(1):
            slots = self.binder(slots, frame)
            alpha = slots @ frame.transpose(1, 2)
            alpha = alpha.unflatten(2, (4, 4))
            frames.append(alpha.softmax(1) if self.drawn is None else self.drawn(alpha))
        return torch.stack(frames, 1)


def test_masks_of_which_only_the_last_frame_would_count_are_refused() -> None:
    video = torch.rand(2, 3, 16, DIM)
    for places in (("softmax:.", "softmax:."), ("softmax:binder", "softmax:.")):
        host, adapter = _DrawsInItsLoop(own_softmax=False), PathAdapter(*places)
        capture = adapter.attach(host)
        capture.open()
        host(video)
        capture.close()
        with pytest.raises((HostError, ShapeError), match="the last"):
            adapter.collect(capture)
    host, adapter = _DrawsInItsLoop(own_softmax=True), PathAdapter("softmax:binder", "softmax:drawn")
    capture = adapter.attach(host)
    capture.open()
    host(video)
    capture.close()
    assert adapter.collect(capture).shape == (2, 3, SLOTS, 16)


@pytest.mark.parametrize("places", [("softmax:binder", "softmax:."), ("softmax:binder", "softmax:painter")])
def test_one_softmax_per_call_of_images_is_enough(places: tuple[str, str]) -> None:
    """The iterations of an attention inside of the masks' module, of the same shape, are no further masks."""
    host = make_unknown(SlotsOnly(iterations=3), PicturesOnly("bsn"))
    maps = tapped(host, PathAdapter(*places), video=tap_clip(2, 1))
    assert torch.equal(maps.mask_logits, host.own()[1])
