"""Every stand-in that a spec serves, with the maps that the host itself computed: one table for the tests of all."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import adaslot_hosts
import genera1z_savi_hosts
import junkeun_yi_savi_hosts
import oclf_hosts
import randsfq_hosts
import slotformer_hosts
import sold_hosts
import torch
import videosaur_fork_hosts
from torch import Tensor

from ssync_pl.adapters import Capture, HostAdapter, locate
from ssync_pl.method.maps import SSyncMaps

OWN = ("own", "first_alpha", "outputs", "attention_masks", "host_losses", "decision")
"""Prefixes of the names under which stand-ins keep tensors for tests."""


class Case(NamedTuple):
    adapter: str
    hosts: ModuleType
    name: str

    def host(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return self.hosts.HOSTS[self.name]()

    def batch(self, host: Any) -> Any:
        """What tells the size of the frames."""
        if self.adapter in ("oclf", "adaslot"):
            return oclf_hosts.oclf_batch(host.video)
        return videosaur_fork_hosts.videosaur_batch() if self.adapter == "videosaur" else None

    def parts(self, host: Any) -> tuple[Any, Any]:
        """Slot attention and decoder, each with a ``sharpen`` to tamper with."""
        if self.adapter in ("oclf", "adaslot"):
            return host.inner
        if self.adapter == "randsfq":
            return host.m.aggregat, host.m.decode
        if self.adapter == "videosaur":
            return getattr(host.processor, "module", host.processor).corrector, getattr(
                host.decoder, "module", host.decoder
            )
        return self.hosts.parts(host)

    def attention(self, host: Any) -> Any:
        """The slot attention as the frames call it."""
        return host.corrector if self.adapter == "junkeun-yi-savi" else self.parts(host)[0]

    def own_maps(self, host: Any, frames: int) -> tuple[Tensor, Tensor]:
        """What the host computed in its last step: ``(B, T, S, N)``, and ``(B, T, S, N)`` or ``(B, T, S, h, w)``."""
        if self.adapter not in ("oclf", "adaslot", "randsfq", "videosaur"):
            return self.hosts.own_maps(host)
        attention, decoder = self.parts(host)
        logits = torch.stack(attention.own_logits[-frames:], 1)
        if logits.ndim == 5:  # heads, which share a softmax with the slots
            logits = logits.squeeze(3) if logits.shape[3] == 1 else logits.float().logsumexp(3)
        if self.name == "oclf_savi_code":  # once per frame
            return logits, torch.stack(decoder.own_logits[-frames:], 1)
        kept = decoder.own_masks if hasattr(decoder, "own_masks") else decoder.own_logits
        return logits, kept[-1] if self.name == "oclf_savi" else kept[-1].unflatten(0, (-1, frames))


FAMILIES = {
    "adaslot": adaslot_hosts,
    "genera1z-savi": genera1z_savi_hosts,
    "junkeun-yi-savi": junkeun_yi_savi_hosts,
    "oclf": oclf_hosts,
    "randsfq": randsfq_hosts,
    "slotformer": slotformer_hosts,
    "sold": sold_hosts,
    "videosaur": videosaur_fork_hosts,
}
CASES = {name: Case(adapter, hosts, name) for adapter, hosts in FAMILIES.items() for name in hosts.HOSTS}


class Heard(NamedTuple):
    """What one training loss of a host gave."""

    adapter: HostAdapter
    capture: Capture
    maps: SSyncMaps
    loss: Tensor


def hear(case: Case, host: Any) -> Heard:
    adapter, root, _ = locate("auto", host)
    assert adapter.name == case.adapter
    capture = adapter.attach(root)
    capture.open()
    loss = case.hosts.training_loss(host)
    capture.close()
    assert not capture.is_empty
    return Heard(adapter, capture, adapter.collect(capture, case.batch(host)), loss)


def pooled(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of the probabilities over blocks of pixels, ``(B, T, S, N)``, written out."""
    rows, columns = masks.shape[-2] // grid[0], masks.shape[-1] // grid[1]
    blocks = masks.softmax(2).unflatten(-1, (grid[1], columns)).unflatten(-3, (grid[0], rows))
    return blocks.mean((-1, -3)).flatten(3)


def own_maps(case: Case, host: Any, maps: SSyncMaps) -> SSyncMaps:
    """Maps from the tensors that the host itself computed."""
    attention, masks = case.own_maps(host, maps.shape[1])
    if hasattr(case.parts(host)[1], "own_masks"):
        side = {"mask_probs": masks}
    elif masks.ndim == 4 or tuple(masks.shape[-2:]) == maps.grid:
        side = {"mask_logits": masks.flatten(3)}
    else:
        side = {"mask_probs": pooled(masks.float(), maps.grid)}
    return SSyncMaps(
        attention_logits=attention,
        attention_probs=maps.attention_probs,
        grid=maps.grid,
        slot_valid=maps.slot_valid,
        patch_valid=maps.patch_valid,
        **side,
    )
