"""Adapters turn any host into a pair of maps: a new family of hosts is a short spec over shared machinery."""

from ssync_pl.adapters.autoregressive import AutoregressiveAdapter
from ssync_pl.adapters.base import (
    HostAdapter,
    Located,
    adapter_names,
    find_adapter,
    locate,
    register_adapter,
    registered_adapter,
)
from ssync_pl.adapters.calls import MapCall, entry, watch_alpha, watch_attention
from ssync_pl.adapters.capture import Capture, submodule
from ssync_pl.adapters.grids import frame_size, maps_on_common_grid, resolve_grid, stack_frames
from ssync_pl.adapters.oclf import AdaSlotAdapter, OclfAdapter
from ssync_pl.adapters.paths import PathAdapter
from ssync_pl.adapters.randsfq import RandSFQAdapter
from ssync_pl.adapters.savi import (
    Genera1zSaviAdapter,
    JunkeunYiSaviAdapter,
    SaviAdapter,
    SlotFormerAdapter,
    SoldAdapter,
)
from ssync_pl.adapters.slot_attention_package import SlotAttentionPackageAdapter
from ssync_pl.adapters.slot_model import GridAdapter, SlotModelAdapter
from ssync_pl.adapters.solv import SolvAdapter
from ssync_pl.adapters.videosaur import VideosaurAdapter

__all__ = [
    "AdaSlotAdapter",
    "AutoregressiveAdapter",
    "Capture",
    "Genera1zSaviAdapter",
    "GridAdapter",
    "HostAdapter",
    "JunkeunYiSaviAdapter",
    "Located",
    "MapCall",
    "OclfAdapter",
    "PathAdapter",
    "RandSFQAdapter",
    "SaviAdapter",
    "SlotAttentionPackageAdapter",
    "SlotFormerAdapter",
    "SlotModelAdapter",
    "SoldAdapter",
    "SolvAdapter",
    "VideosaurAdapter",
    "adapter_names",
    "entry",
    "find_adapter",
    "frame_size",
    "locate",
    "maps_on_common_grid",
    "register_adapter",
    "registered_adapter",
    "resolve_grid",
    "stack_frames",
    "submodule",
    "watch_alpha",
    "watch_attention",
]
