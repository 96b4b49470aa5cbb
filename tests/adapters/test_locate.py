"""Which adapter serves a host, and where inside the host."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssync_pl.adapters import PathAdapter, SaviAdapter, find_adapter, locate
from ssync_pl.errors import HostError
from ssync_pl.hosts import SAVi


def _savi() -> SAVi:
    return SAVi(num_slots=2, slot_dim=8, encoder_channels=(8,), encoder_strides=(2,), feature_dim=8)


def test_the_host_itself_comes_first():
    host = _savi()
    located = locate("auto", host)
    assert located.root is host
    assert located.path == ""
    # A host that is known stays the root, whatever its parts look like.
    host.teacher = _savi()
    assert locate("auto", host).root is host


@pytest.mark.parametrize("spec", ["auto", "savi", SaviAdapter()])
def test_a_model_inside_a_trainers_module_is_found(spec):
    inner = _savi()
    outer = nn.Module()
    outer.task = nn.Module()
    outer.task.model = inner
    outer.other = nn.Linear(1, 1)
    located = locate(spec, outer)
    assert located.root is inner
    assert located.path == "task.model"
    assert isinstance(located.adapter, SaviAdapter)


def test_wrappers_do_not_count_as_depth():
    inner = _savi()
    compiled = torch.compile(inner, backend="eager")
    outer = nn.Module()
    outer.task = nn.Module()
    outer.task.model = nn.DataParallel(compiled)
    located = locate("auto", outer)
    assert located.root is inner
    assert located.path == "task.model.module._orig_mod"
    assert outer.get_submodule(located.path) is inner
    # Only real wrappers are looked through: a user's own `module` is a child like any other.
    own = nn.Module()
    own.module = nn.Module()
    own.module.module = _savi()
    assert locate("auto", own).path == "module.module"


def test_too_deep_is_not_found():
    outer = nn.Module()
    outer.a = nn.Module()
    outer.a.b = nn.Module()
    outer.a.b.c = _savi()
    with pytest.raises(HostError, match=r"Module is none.*`ssync-pl doctor`"):
        find_adapter(outer)


def test_two_models_are_refused_by_their_places():
    outer = nn.ModuleDict({"student": _savi(), "teacher": _savi()})
    with pytest.raises(HostError, match=r"savi \(at student\), savi \(at teacher\) all do"):
        locate("auto", outer)


def test_one_model_in_two_places_is_one():
    inner = _savi()
    outer = nn.ModuleDict({"a": inner, "b": inner})
    assert locate("auto", outer).root is inner


def test_an_adapter_object_that_knows_nothing_here_is_left_to_complain():
    adapter = PathAdapter("x", "y")
    host = nn.Linear(1, 1)
    assert locate(adapter, host) == (adapter, host, "")
    with pytest.raises(HostError, match="no child 'x'"):
        adapter.attach(host)
