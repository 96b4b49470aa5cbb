"""Maps that users name by the softmax inside of a module, and how the doctor finds them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import tap_hosts as taps
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssync_pl import SSyncCallback, attach, ssync_loss
from ssync_pl.adapters.discover import discover
from ssync_pl.adapters.paths import PathAdapter
from ssync_pl.errors import HostError, ShapeError
from ssync_pl.method.maps import SSyncMaps

TAPS = ("softmax:binder", "softmax:painter")


def tapped(host: Any, *places: str, video: Any = None, check: bool = True, run: Any = None) -> SSyncMaps:
    adapter = PathAdapter(*(places or TAPS))
    capture = adapter.attach(host)
    if isinstance(host, taps.Unknown):
        host.forget()
    capture.open()
    (host if run is None else run)(taps.tap_clip() if video is None else video)
    capture.close()
    maps = adapter.collect(capture)
    if check:
        adapter.verify(capture, maps)
    capture.remove()
    return maps


def no_recorder_is_on() -> bool:
    return not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("softmax", taps.SOFTMAXES)
def test_every_way_to_call_a_softmax(softmax: str) -> None:
    host = taps.make_unknown(taps.SlotsOnly(softmax=softmax))
    maps = tapped(host)
    assert torch.equal(maps.attention_logits, host.own()[0])
    assert torch.equal(maps.mask_logits, host.own()[1])
    assert maps.grid == (4, 4)
    assert maps.slot_valid is None


@pytest.mark.parametrize("attention", ["bsn", "bns"])
@pytest.mark.parametrize("masks", ["bsn", "bns", "btsn", "btns", "bs1hw", "bshw1", "btshw"])
def test_every_layout_is_read_and_found(attention: str, masks: str) -> None:
    for frames in (1, 2, 3):
        host = taps.make_unknown(taps.SlotsOnly(attention, iterations=2), taps.PicturesOnly(masks))
        maps = tapped(host, video=taps.tap_clip(2, frames))
        # One frame of two videos may as well be two frames of one: the sizes decide, the values are the same.
        assert maps.shape == (2, frames, taps.SLOTS, 16)
        assert torch.equal(maps.attention_logits, host.own()[0])
        assert torch.equal(maps.mask_logits, host.own()[1])
    found = discover(host, lambda: host(taps.tap_clip(2, 3))).pairs[0]
    assert found.places == TAPS
    assert (found.batch, found.frames, found.attention.calls, found.masks.calls) == (2, 3, 3, 1)
    assert found.attention.has_gradient


def test_pixels_are_averaged_and_heads_count_as_their_mean() -> None:
    host = taps.make_unknown(taps.SlotsOnly(heads=2), taps.PicturesOnly("bs1hw", scale=2))
    maps = tapped(host)
    attention, masks = host.own()  # (B, T, heads, S, N)
    torch.testing.assert_close(maps.attention_probs, attention.softmax(3).mean(2))
    torch.testing.assert_close(maps.attention_logits, attention.mean(2))
    torch.testing.assert_close(maps.mask_probs, masks.softmax(2).unflatten(3, (4, 2, 4, 2)).mean((4, 6)).flatten(3))
    assert discover(host, lambda: host(taps.tap_clip(2, 3))).pairs[0].places == TAPS


def test_one_side_by_its_output_and_one_by_its_softmax() -> None:
    class Both(taps.PicturesOnly):
        def forward(self, slots: Tensor) -> Any:
            super().forward(slots)
            return {"masks": self.kept[-1].softmax(2)}

    host = taps.make_unknown(decoder=Both())
    maps = tapped(host, "softmax:binder", "painter:masks")
    assert torch.equal(maps.attention_logits, host.own()[0])
    assert torch.equal(maps.mask_probs, host.own()[1].softmax(2))
    assert torch.equal(tapped(host, "softmax:binder", "softmax:painter:-2").mask_logits, host.own()[1])


class Masked(taps.SlotsOnly):
    """Absent slots: filled in, by a mask that may change, or by a bias from elsewhere."""

    gone: Any = None
    bias: Any = 0.0

    def forward(self, slots: Tensor, features: Tensor) -> Tensor:
        logits = self.to_q(slots) @ self.to_k(features).transpose(1, 2) + self.bias
        logits = logits if self.gone is None else logits.masked_fill(self.gone, float("-inf"))
        self.kept.append(logits)
        return slots + self.update(self.softmax(logits, 1) @ features)


def test_absent_slots_are_marked_and_give_finite_gradients() -> None:
    host = taps.make_unknown(Masked())
    for loss in ("brier", "ce"):
        host.binder.bias = torch.tensor([0.0, 0.0, float("-inf")])[:, None]
        maps = tapped(host)
        assert maps.slot_valid.tolist() == [[True, True, False]] * 2
        maps.check_values()
        output = ssync_loss(maps, loss=loss)
        assert output.loss > 0
        for gradient in torch.autograd.grad(output.loss, [host.binder.to_q.weight, host.painter.position]):
            assert gradient.isfinite().all()
            assert gradient.any()


def test_slots_that_are_absent_later_are_marked_too() -> None:
    host, adapter = taps.make_unknown(Masked()), PathAdapter(*TAPS)
    capture = adapter.attach(host)
    for gone in (False, True):
        host.binder.gone = torch.tensor([False, False, gone]).view(1, 3, 1)
        capture.clear()
        capture.open()
        host(taps.tap_clip())
        capture.close()
        assert adapter.collect(capture).slot_valid.tolist() == [[True, True, not gone]] * 2


def test_softmaxes_in_methods_of_the_host_are_heard_in_the_whole_step() -> None:
    host, image = taps.UnknownImages(), taps.tap_clip(2, 1)[:, 0]
    features = host.eyes(image.flatten(2).transpose(1, 2))
    maps = tapped(host, "softmax:.", "softmax:.", run=lambda video: host.paint(host.bind(features)))  # no forward pass
    assert torch.equal(maps.attention_logits[:, 0], ((features + host.position) @ host.seeds.T).transpose(1, 2))
    assert torch.equal(maps.mask_logits[:, 0], host.bind(features) @ host.position.T)
    assert no_recorder_is_on()
    outer = taps.UnknownHost()
    pair = discover(outer, lambda: outer.training_step({"image": image}, 0)).pairs[0]
    assert pair.places == ("softmax:.", "softmax:.")
    assert (pair.attention.axis, pair.masks.axis) == (2, 1)
    callback = SSyncCallback(attention="softmax:.", masks="softmax:.", warmup_steps=0)
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(outer, DataLoader([{"image": image}], batch_size=None))
    assert trainer.callback_metrics["ssync/interior_loss"].isfinite()
    assert no_recorder_is_on()


@pytest.mark.parametrize("checkpointing", ["", "plain"])
def test_loss_and_gradients_are_those_of_the_hosts_own_tensors(checkpointing: str) -> None:
    plain, host = taps.make_unknown(), taps.make_unknown()
    host.checkpointing = checkpointing
    total = ssync_loss(tapped(host)).loss
    tapped(plain)
    attention, masks = plain.own()
    expected = ssync_loss(SSyncMaps(attention_logits=attention, mask_logits=masks, grid=(4, 4))).loss
    assert torch.equal(total, expected)
    total.backward()
    expected.backward()
    for one, two in zip(host.parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad)
    assert host.binder.to_q.weight.grad.any()


def test_recomputation_is_not_heard_and_reentrant_checkpointing_refused() -> None:
    host = taps.make_unknown()
    host.checkpointing = "plain"
    capture = PathAdapter(*TAPS).attach(host)
    capture.open()
    loss = host.loss_function(taps.tap_clip())
    loss.backward()
    assert len(capture["softmax:binder"]) == 2
    assert no_recorder_is_on()
    host.checkpointing = "reentrant"
    with (
        attach(host, attention=TAPS[0], masks=TAPS[1], warmup_steps=0) as ssync,
        pytest.raises(HostError, match="reentrant activation checkpointing"),
    ):
        ssync.add(host.loss_function(taps.tap_clip()))


def test_compiled_hosts() -> None:
    torch._dynamo.reset()
    host, adapter = taps.make_unknown(), PathAdapter("softmax:binder", "softmax:.")
    capture = adapter.attach(host)
    compiled = torch.compile(host, backend="eager")
    for seed in (0, 1):
        compiled(taps.tap_clip(seed=seed))  # with a closed window
        host.forget()
        capture.clear()
        capture.open()
        compiled(taps.tap_clip(seed=seed))
        capture.close()
        maps = adapter.collect(capture)
        assert torch.equal(maps.attention_logits, host.own()[0])
        assert torch.equal(maps.mask_logits, host.own()[1])
    torch._dynamo.reset()


def test_a_host_inside_ddp(tmp_path: Path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        host = taps.make_unknown()
        ddp = nn.parallel.DistributedDataParallel(host)
        with attach(ddp, attention=TAPS[0], masks=TAPS[1], warmup_steps=0) as ssync:
            for seed in range(2):
                host.forget()
                ssync.add(ddp(taps.tap_clip(seed=seed)).square().mean()).backward()
                assert torch.equal(ssync.maps.attention_logits, host.own()[0])
    finally:
        dist.destroy_process_group()


def test_nothing_of_the_host_changes_even_when_it_fails() -> None:
    host, plain = taps.make_unknown(), taps.make_unknown()
    keys = list(host.state_dict())
    capture = PathAdapter("softmax:binder", "softmax:.").attach(host)
    capture.open()
    assert torch.equal(host(taps.tap_clip()), plain(taps.tap_clip()))
    with pytest.raises(RuntimeError):
        host(torch.rand(1, 2, 5, 4, 4))
    capture.close()
    assert no_recorder_is_on()
    host.forget()
    heard = len(capture["softmax:binder"])
    capture.open()
    copy.deepcopy(host)(taps.tap_clip())
    pickle.loads(pickle.dumps(host.painter))(torch.rand(1, 1, taps.SLOTS, taps.DIM))
    assert len(capture["softmax:binder"]) == heard
    capture.remove()
    with pytest.raises(RuntimeError):
        discover(host, lambda: host(torch.rand(1, 1, 5, 4, 4)))
    assert list(host.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in host.modules())
    assert no_recorder_is_on()


class Logs(taps.PicturesOnly):
    """Draws a sharper picture for a log, after the masks."""

    def forward(self, slots: Tensor) -> Tensor:
        out = super().forward(slots)
        with torch.no_grad():
            picture = (self.kept[-1] * 100).flatten(0, 1)
            picture.softmax(1)
            picture.unflatten(2, (2, 8)).softmax(1)
        return out


def test_a_softmax_without_gradient_takes_no_place() -> None:
    host = taps.make_unknown(decoder=Logs("bsn"))
    assert torch.equal(tapped(host).mask_logits, host.own()[1])
    first, *others = discover(host, lambda: host(taps.tap_clip(2, 3))).pairs
    assert first.masks.has_gradient
    assert others
    assert not any(pair.masks.has_gradient for pair in others)
    with torch.no_grad():
        assert not tapped(taps.make_unknown(taps.SlotsOnly(iterations=3))).attention_logits.requires_grad


def test_the_axis_may_be_named_where_the_shape_is_ambiguous() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(1) + x.softmax(2)  # as many patches as slots

    host, a = nn.Sequential(Square(), Square()), torch.randn(2, 4, 4)
    for axis in (1, 2):
        maps = tapped(host, f"softmax:0:{axis}", f"softmax:1:{axis}", video=a)
        assert torch.equal(maps.attention_logits[:, 0], a if axis == 1 else a.transpose(1, 2))


class Modular(taps.SlotsOnly):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Softmax(1)
        self.softmax = lambda x, axis: self.inner(x)


class InLoop(nn.Module):
    """Attends and draws once per frame; the masks are made in a method of the model itself, or in a module."""

    def __init__(self, own_softmax: bool = False) -> None:
        super().__init__()
        self.binder, self.drawn = taps.SlotsOnly(iterations=1), nn.Softmax(1) if own_softmax else None

    def forward(self, video: Tensor) -> None:
        slots = torch.ones(len(video), taps.SLOTS, taps.DIM) * torch.arange(taps.SLOTS)[:, None]
        for frame in video.unbind(1):
            slots = self.binder(slots, frame)
            alpha = (slots @ frame.transpose(1, 2)).unflatten(2, (4, 4))
            alpha.softmax(1) if self.drawn is None else self.drawn(alpha)


class Growing(nn.Sequential):
    def forward(self, value: Tensor) -> None:
        for slots in (2, 3):
            self[0](torch.zeros(1, slots, 4))
        self[1](torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("host", "places", "video", "message"),
    [
        (taps.Unknown, ("softmax:eyes", "softmax:painter"), None, "softmax to run inside 'eyes' .* but none did"),
        (
            lambda: taps.make_unknown(Modular()),
            ("softmax:binder.inner", TAPS[1]),
            None,
            r"axis 1 in 4 call\(s\)",
        ),
        (lambda: Growing(nn.Softmax(1), nn.Softmax(1)), ("softmax:0", "softmax:1"), None, "one shape in all calls"),
        (InLoop, ("softmax:.", "softmax:."), torch.rand(2, 3, 16, taps.DIM), "the last"),
        (InLoop, ("softmax:binder", "softmax:."), torch.rand(2, 3, 16, taps.DIM), "the last"),
    ],
)
def test_modules_around_the_wrong_softmaxes_are_refused(host: Any, places: Any, video: Any, message: str) -> None:
    with pytest.raises((HostError, ShapeError), match=message):
        tapped(host(), *places, video=video)


def test_masks_of_each_frame_and_iterations_of_images_are_no_further_masks() -> None:
    maps = tapped(InLoop(True), "softmax:binder", "softmax:drawn", video=torch.rand(2, 3, 16, taps.DIM), check=False)
    assert maps.shape == (2, 3, taps.SLOTS, 16)
    for masks in ("softmax:.", "softmax:painter"):
        host = taps.make_unknown(taps.SlotsOnly(iterations=3), taps.PicturesOnly("bsn"))
        maps = tapped(host, "softmax:binder", masks, video=taps.tap_clip(2, 1))
        assert torch.equal(maps.mask_logits, host.own()[1])


class TokensToTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2)).softmax(2) @ x


@pytest.mark.parametrize(
    ("host", "value", "spots"),
    [
        (lambda: nn.Sequential(nn.Flatten(1), nn.Linear(48, 10), nn.Softmax(1)), torch.rand(2, 3, 4, 4), set()),
        (lambda: nn.TransformerEncoderLayer(8, 2, batch_first=True), torch.rand(2, 5, 8), set()),
        (lambda: nn.Sequential(TokensToTokens(), TokensToTokens()), torch.rand(2, 9, 4), {"0", "1"}),
    ],
)
def test_nothing_is_found_in_hosts_without_slots(host: Any, value: Tensor, spots: set[str]) -> None:
    module = host()
    found = discover(module, lambda: module(value))
    assert found.pairs == ()
    assert {spot.path for spot in found.spots} == spots
