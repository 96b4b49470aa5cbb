"""Which adapter serves a host, and where inside the host; adapters of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ssync_pl.adapters import (
    Capture,
    HostAdapter,
    PathAdapter,
    SaviAdapter,
    adapter_names,
    base,
    locate,
    register_adapter,
)
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.hosts import SAVi
from ssync_pl.method.maps import SSyncMaps


class _Flat(HostAdapter):
    name = "flat"

    def match(self, host: nn.Module) -> bool:
        return isinstance(host, nn.Flatten)

    def attach(self, host: nn.Module) -> Capture:
        return Capture()

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        raise HostError("nothing to collect")


class _FlatToo(_Flat):
    name = "flat-too"


def _savi() -> SAVi:
    return SAVi(num_slots=2, slot_dim=8, encoder_channels=(8,), encoder_strides=(2,), feature_dim=8)


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
    register_adapter(_FlatToo)
    with pytest.raises(HostError, match=r"flat \(at the host\), flat-too \(at the host\) all do"):
        locate("auto", nn.Flatten())


@pytest.mark.parametrize("spec", ["auto", "savi", SaviAdapter()])
def test_a_model_inside_a_trainers_module_is_found(spec: Any) -> None:
    inner = _savi()
    inner.teacher = _savi()  # a host that is known stays the root, whatever its parts look like
    assert locate(spec, inner)[1:] == (inner, "")
    located = locate(spec, _nested("task.model", inner))
    assert located[1:] == (inner, "task.model")
    assert isinstance(located.adapter, SaviAdapter)
    assert locate(spec, nn.ModuleDict({"a": inner, "b": inner})).root is inner  # in two places, it is one


def test_wrappers_do_not_count_as_depth() -> None:
    inner = _savi()
    outer = _nested("task.model", nn.DataParallel(torch.compile(inner, backend="eager")))
    assert locate("auto", outer)[1:] == (inner, "task.model.module._orig_mod")
    # Only real wrappers are looked through: a user's own `module` is a child like any other.
    assert locate("auto", _nested("module.module", _savi())).path == "module.module"


@pytest.mark.parametrize(
    ("spec", "host", "grid", "error", "message"),
    [
        ("auto", _nested("a.b.c", _savi()), None, HostError, r"ModuleDict is none.*`ssync-pl doctor`"),
        ("auto", nn.ModuleDict({"one": _savi(), "two": _savi()}), None, HostError, r"savi \(at one\), savi \(at two\)"),
        ("auto", nn.ModuleDict({"slot_attention": nn.Identity()}), None, HostError, r"Candidates: slot_attention\."),
        ("auto", nn.Identity(), None, HostError, "Candidates: none found by name"),
        ("savi", nn.Identity(), None, HostError, "'savi' knows, but Identity lacks"),
        ("savy", nn.Identity(), None, ConfigError, "`adapter` to be 'auto' or one of .*savi.*, but got 'savy'"),
        ("auto", _savi(), (4, 4), ConfigError, "reads it off the host"),
        (PathAdapter("a", "b"), nn.Identity(), (4, 4), ConfigError, "Give it to the adapter"),
    ],
)
def test_what_cannot_be_located_is_refused(spec: Any, host: Any, grid: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        locate(spec, host, grid)
