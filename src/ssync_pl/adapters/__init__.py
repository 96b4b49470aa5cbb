"""Adapters turn any host into a pair of maps: a new host is one file with `match`, `attach` and `collect`."""

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
from ssync_pl.adapters.locate import Located, find_adapter, locate, resolve_adapter
from ssync_pl.adapters.paths import PathAdapter
from ssync_pl.adapters.savi import SaviAdapter
from ssync_pl.adapters.videosaur import VideosaurAdapter

__all__ = [
    "Capture",
    "HostAdapter",
    "Located",
    "PathAdapter",
    "SaviAdapter",
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
