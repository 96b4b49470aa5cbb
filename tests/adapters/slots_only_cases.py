"""The hosts whose slot attention gives no map, as one table for the tests that hold for all of them."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import genera1z_savi_hosts
import junkeun_yi_savi_hosts
import slotformer_hosts
import sold_hosts
import torch
from torch import Tensor

from ssync_pl.adapters import Capture, HostAdapter
from ssync_pl.adapters.base import locate
from ssync_pl.adapters.savi import Genera1zSaviAdapter, JunkeunYiSaviAdapter, SlotFormerAdapter, SoldAdapter
from ssync_pl.method.maps import SSyncMaps


class Case(NamedTuple):
    adapter: type[HostAdapter]
    hosts: ModuleType
    name: str

    def host(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return self.hosts.HOSTS[self.name]()


FAMILIES = (
    (SoldAdapter, sold_hosts),
    (Genera1zSaviAdapter, genera1z_savi_hosts),
    (SlotFormerAdapter, slotformer_hosts),
    (JunkeunYiSaviAdapter, junkeun_yi_savi_hosts),
)
CASES = {name: Case(adapter, hosts, name) for adapter, hosts in FAMILIES for name in hosts.HOSTS}


class Heard(NamedTuple):
    """What one training loss of a host gave."""

    adapter: HostAdapter
    capture: Capture
    maps: SSyncMaps
    loss: Tensor


def hear(case: Case, host: Any) -> Heard:
    adapter, root, _ = locate("auto", host)
    assert type(adapter) is case.adapter
    capture = adapter.attach(root)
    capture.open()
    loss = case.hosts.training_loss(host)
    capture.close()
    assert not capture.is_empty
    return Heard(adapter, capture, adapter.collect(capture), loss)


def pooled(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of the probabilities over blocks of pixels, ``(B, T, S, N)``, written out."""
    rows, columns = masks.shape[-2] // grid[0], masks.shape[-1] // grid[1]
    blocks = masks.softmax(2).unflatten(-1, (grid[1], columns)).unflatten(-3, (grid[0], rows))
    return blocks.mean((-1, -3)).flatten(3)
