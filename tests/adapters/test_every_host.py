"""Exactly one adapter recognises each host of every family; nothing else is recognised."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from ssync_pl.adapters import adapter_names, base, locate
from ssync_pl.errors import HostError
from ssync_pl.hosts import DINOSAUR, SOLV, SAVi, SlotContrast, VideoSAUR

HERE = Path(__file__).parent
# File of stand-ins and the adapter that serves them. Hosts of `tap_hosts` are unknown on purpose.
FAMILIES = {
    "adaslot_hosts": "adaslot",
    "autoregressive_hosts": "autoregressive",
    "genera1z_savi_hosts": "genera1z-savi",
    "junkeun_yi_savi_hosts": "junkeun-yi-savi",
    "oclf_hosts": "oclf",
    "randsfq_hosts": "randsfq",
    "slot_package_hosts": "slot-attention",
    "slotformer_hosts": "slotformer",
    "sold_hosts": "sold",
    "solv_hosts": "solv",
    "tap_hosts": None,
    "videosaur_fork_hosts": "videosaur",
}
SMALL = {"backbone": None, "feature_dim": 8, "grid": (4, 4), "slot_dim": 8, "num_slots": 3}


def _hosts() -> dict[str, tuple[Callable[[], nn.Module], str | None]]:
    found: dict[str, tuple[Callable[[], nn.Module], str | None]] = {}
    for file, adapter in FAMILIES.items():
        spec = importlib.util.spec_from_file_location(file, HERE / f"{file}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, factory in module.HOSTS.items():
            found[f"{file}:{name}"] = (factory, adapter)
    found["ours:savi"] = (lambda: SAVi(num_slots=2), "savi")
    found["ours:videosaur"] = (lambda: VideoSAUR(**SMALL, similarity_weight=0), "videosaur")
    found["ours:slotcontrast"] = (lambda: SlotContrast(**SMALL), "videosaur")
    found["ours:dinosaur"] = (lambda: DINOSAUR(**SMALL), "videosaur")
    found["ours:solv"] = (lambda: SOLV(**SMALL, temporal_heads=2), "solv")
    found["other:linear"] = (lambda: nn.Linear(2, 2), None)
    found["other:transformer"] = (lambda: nn.Transformer(8, 2, 1, 1, 8), None)
    return found


HOSTS = _hosts()


@pytest.mark.parametrize("name", HOSTS)
def test_one_adapter_knows_it(name):
    factory, expected = HOSTS[name]
    host = factory()
    if expected is None:
        with pytest.raises(HostError, match="is none"):
            locate("auto", host)
        return
    # Refuses where several know it.
    located = locate("auto", host)
    assert located.adapter.name == expected
    assert locate(expected, host).root is located.root
    others = [name for name in adapter_names() if name != expected]
    assert not [name for name in others if base._REGISTRY[name]().match(located.root)]


def test_every_adapter_has_a_host_here():
    assert {adapter for _, adapter in HOSTS.values() if adapter} == set(adapter_names())
