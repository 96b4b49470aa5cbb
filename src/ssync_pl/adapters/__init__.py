"""Adapters turn any host into a pair of maps: a new host is one file with `match`, `attach` and `collect`."""

from ssync_pl.adapters.adaslot import AdaSlotAdapter
from ssync_pl.adapters.autoregressive import AutoregressiveAdapter
from ssync_pl.adapters.base import (
    HostAdapter,
    adapter_names,
    frame_size,
    maps_on_common_grid,
    register_adapter,
    registered_adapter,
    resolve_grid,
    stack_frames,
)
from ssync_pl.adapters.capture import Capture, submodule
from ssync_pl.adapters.genera1z_savi import Genera1zSaviAdapter
from ssync_pl.adapters.junkeun_yi_savi import JunkeunYiSaviAdapter
from ssync_pl.adapters.locate import Located, find_adapter, locate, resolve_adapter
from ssync_pl.adapters.oclf import OclfAdapter
from ssync_pl.adapters.paths import PathAdapter
from ssync_pl.adapters.randsfq import RandSFQAdapter
from ssync_pl.adapters.savi import SaviAdapter
from ssync_pl.adapters.slot_attention_package import SlotAttentionPackageAdapter
from ssync_pl.adapters.slotformer import SlotFormerAdapter
from ssync_pl.adapters.softmax_tap import SoftmaxTapAdapter
from ssync_pl.adapters.sold import SoldAdapter
from ssync_pl.adapters.solv import SolvAdapter
from ssync_pl.adapters.videosaur import VideosaurAdapter

__all__ = [
    "AdaSlotAdapter",
    "AutoregressiveAdapter",
    "Capture",
    "Genera1zSaviAdapter",
    "HostAdapter",
    "JunkeunYiSaviAdapter",
    "Located",
    "OclfAdapter",
    "PathAdapter",
    "RandSFQAdapter",
    "SaviAdapter",
    "SlotAttentionPackageAdapter",
    "SlotFormerAdapter",
    "SoftmaxTapAdapter",
    "SoldAdapter",
    "SolvAdapter",
    "VideosaurAdapter",
    "adapter_names",
    "find_adapter",
    "frame_size",
    "locate",
    "maps_on_common_grid",
    "register_adapter",
    "registered_adapter",
    "resolve_adapter",
    "resolve_grid",
    "stack_frames",
    "submodule",
]
