import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_table import CASES, ONE_EACH, hear, make_host, own_maps
from savi_hosts import TOKENS
from solv_hosts import SolvHost, packaged
from stand_in_parts import forget, parts
from tap_hosts import Unknown, UnknownHost
from tiny_models import tiny
from torch import nn

from ssync_pl import ssync_loss
from ssync_pl.adapters import PathAdapter, SaviAdapter, base, locate
from ssync_pl.adapters.base import HostAdapter, adapter_names, register_adapter
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.hosts import DINOSAUR, SAVi, SlotContrast, VideoSAUR
from ssync_pl.method.maps import SSyncMaps

EVERY = pytest.mark.parametrize("name", CASES)
OURS: dict[str, tuple[str, Callable[[], Any]]] = {
    "our_savi": ("savi", lambda: tiny(SAVi)),
    "our_coarse_savi": ("savi", lambda: tiny(SAVi, decoder_strides=(1,))),
    "our_videosaur": ("videosaur", lambda: tiny(VideoSAUR)),
    "our_slotcontrast": ("videosaur", lambda: tiny(SlotContrast)),
    "our_dinosaur": ("videosaur", lambda: tiny(DINOSAUR)),
}
OTHERS: dict[str, tuple[str | None, Callable[[], nn.Module]]] = {
    **{name: ("autoregressive", make) for name, make in TOKENS.items()},
    "solv": ("solv", SolvHost),
    "our_solv": ("solv", packaged),
    "unknown": (None, Unknown),
    "unknown_methods": (None, UnknownHost),
    "linear": (None, lambda: nn.Linear(2, 2)),
    "transformer": (None, lambda: nn.Transformer(8, 2, 1, 1, 8)),
}


@pytest.mark.parametrize("name", [*CASES, *OURS, *OTHERS])
def test_exactly_one_adapter_knows_it(name: str) -> None:
    expected, make = {**CASES, **OURS, **OTHERS}[name]
    host = make()
    if expected is None:
        with pytest.raises(HostError, match="is none"):
            locate("auto", host)
        return
    located = locate("auto", host)
    assert located.adapter.name == expected
    assert locate(expected, host).root is located.root
    assert not [o for o in adapter_names() if o != expected and base._REGISTRY[o]().match(located.root)]


def test_every_adapter_is_tested_here() -> None:
    assert {adapter for adapter, _ in {**CASES, **OURS, **OTHERS}.values() if adapter} == set(adapter_names())


@EVERY
def test_maps_and_loss_are_the_hosts_own_and_nothing_of_the_host_changes(name: str) -> None:
    host, twin = make_host(name), make_host(name)
    keys = list(host.state_dict())
    torch.manual_seed(1)
    heard = hear(host)
    maps, own, valid = heard.maps(), own_maps(host), host.existing
    assert maps.grid == own.grid
    for key in ("slot_valid", "patch_valid", "frame_index"):
        torch.testing.assert_close(getattr(maps, key), getattr(own, key))
    there = torch.ones(maps.shape, dtype=torch.bool) if valid is None else valid[:, None, :, None].expand(maps.shape)
    averaged = own.attention_probs is not None
    for key in ("attention_logits", "attention_probs", "mask_logits", "mask_probs"):
        mine, expected = getattr(maps, key), getattr(own, key)
        assert (mine is None) == (expected is None), key
        if mine is not None and (key == "mask_probs" or (averaged and key != "mask_logits")):
            torch.testing.assert_close(mine[there], expected[there])
        elif mine is not None:
            assert torch.equal(mine[there], expected[there]), key
    maps.check_values()
    heard.adapter.verify(heard.capture, maps)
    _check_loss(host, maps, own)
    torch.manual_seed(1)
    assert torch.equal(heard.loss, twin.training_step(twin.batch(), 0))
    heard.capture.remove()
    assert list(host.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in host.modules())


def _check_loss(host: Any, maps: Any, own: Any) -> None:
    mine, expected = ssync_loss(maps, merge=False), ssync_loss(own, merge=False)
    torch.testing.assert_close(mine.loss, expected.loss)
    parameters = [p for p in host.parameters() if p.requires_grad]
    one, two = (torch.autograd.grad(x.loss, parameters, retain_graph=True, allow_unused=True) for x in (mine, expected))
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)
    assert all(grad is None or grad.isfinite().all() for grad in one)
    for side, part in ((maps.attention, parts(host)[0]), (maps.masks, parts(host)[1])):
        side = side.masked_fill(side.isinf() | side.isnan(), 0.0).square().sum()
        grads = torch.autograd.grad(side, list(part.parameters()), retain_graph=True, allow_unused=True)
        assert any(grad is not None and grad.any() for grad in grads)


@EVERY
def test_autocast_of_the_host_is_kept(name: str) -> None:
    host = make_host(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heard = hear(host)
    maps, own, valid = heard.maps(), own_maps(host), host.existing
    there = slice(None) if valid is None else valid[:, None, :, None].expand(maps.shape)
    if own.attention_probs is None:
        assert torch.equal(maps.attention_logits[there], own.attention_logits[there])
    assert own.mask_logits is None or torch.equal(maps.mask_logits[there], own.mask_logits[there])
    heard.adapter.verify(heard.capture, maps)
    assert ssync_loss(maps).loss.isfinite()


@pytest.mark.parametrize("name", ["slotformer", "genera1z"])  # whose softmax is outside of the modules that are heard
def test_a_host_that_changes_its_masks_is_refused(name: str) -> None:
    host = make_host(name)
    parts(host)[1].sharpen = 3.0
    heard = hear(host)
    with pytest.raises(HostError, match="but they differ by up to"):
        heard.adapter.verify(heard.capture, heard.maps())


@pytest.mark.parametrize("name", ONE_EACH)
def test_copies_are_not_heard_replicas_and_second_passes_are_refused(name: str) -> None:
    host = make_host(name)
    heard = hear(host)
    counts = {key: len(values) for key, values in heard.capture._records.items()}
    forget(host)
    heard.capture.open()
    twin = copy.deepcopy(host)
    twin.training_step(heard.batch, 0)
    assert {key: len(values) for key, values in heard.capture._records.items()} == counts
    if CASES[name][0] not in ("oclf", "adaslot", "slot-attention"):  # two passes of images are two frames there
        host.training_step(heard.batch, 0)
        with pytest.raises(HostError, match=r"to run once inside|the slot attention saw, but it ran on"):
            heard.maps()
    for module in host.modules():
        module._is_replica = True  # as on the copies that torch.nn.DataParallel runs in threads
    with pytest.raises(HostError, match="DataParallel"):
        host.training_step(heard.batch, 0)
    heard.capture.remove()


@pytest.mark.parametrize("name", ["our_savi", "our_coarse_savi"])
def test_the_softmax_of_our_savi_reads_what_its_adapter_hears_and_a_second_pass_is_refused(name: str) -> None:
    host, video = OURS[name][1](), torch.rand(2, 2, 3, 16, 16)
    adapters: tuple[HostAdapter, ...] = (SaviAdapter(), PathAdapter("softmax:corrector", "softmax:decoder"))
    captures = [adapter.attach(host) for adapter in adapters]
    for capture in captures:
        capture.open()
    host(video)
    one, two = (adapter.collect(capture) for adapter, capture in zip(adapters, captures, strict=True))
    assert one.grid == two.grid
    assert torch.equal(one.attention_logits, two.attention_logits)
    assert torch.equal(one.masks, two.masks)
    host(video)
    with pytest.raises(HostError, match=r"'decoder' to run once .* ran 2 times"):
        adapters[0].collect(captures[0])


class _Flat(HostAdapter):
    name = "flat"

    def match(self, host: nn.Module) -> bool:
        return isinstance(host, nn.Flatten)

    def attach(self, host: nn.Module) -> base.Capture:
        return base.Capture()

    def collect(self, capture: base.Capture, batch: Any = None) -> SSyncMaps:
        raise HostError("nothing to collect")


def _nested(path: str, inner: nn.Module) -> nn.Module:
    for name in reversed(path.split(".")):
        inner = nn.ModuleDict({name: inner})
    return inner


def test_registered_adapters_are_found_by_host_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    assert register_adapter(_Flat) is _Flat
    assert "flat" in adapter_names() == sorted(adapter_names())
    for found in (locate("auto", nn.Flatten()).adapter, locate("flat", nn.Flatten()).adapter):
        assert isinstance(found, _Flat)
    own, host = PathAdapter("x", "y"), nn.Linear(1, 1)
    assert locate(own, host) == (own, host, "")  # which is left to complain itself
    with pytest.raises(HostError, match="no child 'x'"):
        own.attach(host)
    register_adapter(type("FlatToo", (_Flat,), {"name": "flat-too"}))
    with pytest.raises(HostError, match=r"flat \(at the host\), flat-too \(at the host\) all do"):
        locate("auto", nn.Flatten())


@pytest.mark.parametrize("spec", ["auto", "savi", SaviAdapter()])
def test_a_model_inside_a_trainers_module_is_found_and_wrappers_do_not_count_as_depth(spec: Any) -> None:
    inner = tiny(SAVi)
    inner.teacher = tiny(SAVi)  # a host that is known stays the root, whatever its parts look like
    assert locate(spec, inner)[1:] == (inner, "")
    located = locate(spec, _nested("task.model", inner))
    assert located[1:] == (inner, "task.model")
    assert isinstance(located.adapter, SaviAdapter)
    assert locate(spec, nn.ModuleDict({"a": inner, "b": inner})).root is inner  # in two places, it is one
    outer = _nested("task.model", nn.DataParallel(torch.compile(inner, backend="eager")))
    assert locate("auto", outer)[1:] == (inner, "task.model.module._orig_mod")
    # Only real wrappers are looked through: a user's own `module` is a child like any other.
    assert locate("auto", _nested("module.module", tiny(SAVi))).path == "module.module"


@pytest.mark.parametrize(
    ("spec", "host", "grid", "error", "message"),
    [
        ("auto", _nested("a.b.c", tiny(SAVi)), None, HostError, r"ModuleDict is none.*`ssync-pl doctor`"),
        ("auto", nn.ModuleDict({"a": tiny(SAVi), "b": tiny(SAVi)}), None, HostError, r"savi \(at a\), savi \(at b"),
        ("auto", nn.ModuleDict({"slot_attention": nn.Identity()}), None, HostError, r"Candidates: slot_attention\."),
        ("auto", nn.Identity(), None, HostError, "Candidates: none found by name"),
        ("savi", nn.Identity(), None, HostError, "'savi' knows, but Identity lacks"),
        ("savy", nn.Identity(), None, ConfigError, "`adapter` to be 'auto' or one of .*savi.*, but got 'savy'"),
        ("auto", tiny(SAVi), (4, 4), ConfigError, "reads it off the host"),
        (PathAdapter("a", "b"), nn.Identity(), (4, 4), ConfigError, "Give it to the adapter"),
    ],
)
def test_what_cannot_be_located_is_refused(spec: Any, host: Any, grid: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        locate(spec, host, grid)
