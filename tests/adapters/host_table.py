"""Every stand-in of every family, and the maps that it computed itself: the table that the contract test walks."""

from typing import Any, NamedTuple

import feature_hosts
import savi_hosts
import torch
from stand_in_parts import GRID, forget, parts
from torch import Tensor

from ssync_pl.adapters import Capture, HostAdapter, locate
from ssync_pl.method.maps import SSyncMaps

FAMILIES = {**feature_hosts.HOSTS, **savi_hosts.HOSTS}
CASES = {name: (adapter, make) for adapter, hosts in FAMILIES.items() for name, make in hosts.items()}
ONE_EACH = [next(iter(hosts)) for hosts in FAMILIES.values()]


def make_host(name: str) -> Any:
    torch.manual_seed(0)
    return CASES[name][1]()


class Heard(NamedTuple):
    adapter: HostAdapter
    capture: Capture
    batch: Any
    loss: Tensor

    def maps(self) -> SSyncMaps:
        return self.adapter.collect(self.capture, self.batch)


def hear(host: Any, adapter: HostAdapter | str = "auto", batch: Any = None) -> Heard:
    forget(host)
    found, root, _ = locate(adapter, host)
    capture = found.attach(root)
    batch = host.batch() if batch is None else batch
    capture.open()
    loss = host.training_step(batch, 0)
    capture.close()
    return Heard(found, capture, batch, loss)


def pooled(value: Tensor, grid: tuple[int, int]) -> Tensor:
    blocks = value.unflatten(-1, (grid[1], -1)).unflatten(-3, (grid[0], -1))
    return blocks.mean((-1, -3)).flatten(-2)


def own_maps(host: Any) -> SSyncMaps:
    attention, decoder = parts(host)
    seen, drawn, valid = torch.stack(attention.own_logits, 1), decoder.own_logits, host.existing
    logits, probs = attention.whole(seen)
    if probs is not None and valid is not None:
        logits, probs = attention.whole(seen.masked_fill(~valid[:, None, None, :, None], float("-inf")))
    if host.shown is not None:
        logits = torch.stack([one[at] for one, at in zip(logits, host.shown, strict=True)])
    masks = torch.stack(drawn, 1) if 1 < len(drawn) == logits.shape[1] else drawn[0]
    if host.clips:  # frames without an identity of slots
        logits, probs, masks = (one if one is None else one.flatten(0, 1)[:, None] for one in (logits, probs, masks))
    lead = logits.shape[:3]
    masks = masks.reshape(*lead, *masks.shape[(masks.shape[:3] == lead and 3) or 2 :])
    if masks.ndim == 4 and masks.shape[3] != logits.shape[3]:
        masks = masks.unflatten(3, (2 * GRID[0], 2 * GRID[1]))
    size = tuple(masks.shape[3:]) if masks.ndim == 5 else GRID
    grid = min(GRID, size)
    sides: dict[str, Any] = {"attention_logits": logits, "attention_probs": probs}
    if decoder.probs:
        sides["mask_probs"] = masks.flatten(3)
    elif size == grid:
        sides["mask_logits"] = masks.flatten(3)
    else:
        masks = masks.float()
        if valid is not None:
            absent = (valid.any(1, keepdim=True) & ~valid)[:, None, :, None, None]
            masks = masks.masked_fill(absent, float("-inf"))
        sides["mask_probs"] = pooled(masks.softmax(2), grid)
    if grid != GRID:
        probs = logits.softmax(2) if probs is None else probs
        fine = [one.unflatten(3, GRID) for one in (logits, probs)]
        sides["attention_logits"], sides["attention_probs"] = (pooled(one, grid) for one in fine)
    patches = None if valid is None else valid.any(1)[:, None, None].expand(*lead[:2], grid[0] * grid[1])
    return SSyncMaps(grid=grid, slot_valid=valid, patch_valid=patches, frame_index=host.shown, **sides)
