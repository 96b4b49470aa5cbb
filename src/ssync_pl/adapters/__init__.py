"""Adapters turn any host into a pair of maps: a new family of hosts is a short spec over shared machinery."""

from ssync_pl.adapters import autoregressive, oclf, randsfq, slot_attention_package, solv, videosaur
from ssync_pl.adapters.base import HostAdapter, Located, adapter_names, locate, register_adapter
from ssync_pl.adapters.calls import MapCall, entry, watch_softmax
from ssync_pl.adapters.capture import Capture, submodule
from ssync_pl.adapters.grids import SlotMap, frame_size, join_sides, resolve_grid, stack_frames
from ssync_pl.adapters.paths import PathAdapter
from ssync_pl.adapters.savi import SaviAdapter
from ssync_pl.adapters.slot_model import GridAdapter, SlotModelAdapter

__all__ = ["Capture", "GridAdapter", "HostAdapter", "Located", "MapCall", "PathAdapter", "SaviAdapter", "SlotMap"]
__all__ += ["SlotModelAdapter"]
__all__ += ["adapter_names", "entry", "frame_size", "join_sides", "locate", "register_adapter", "resolve_grid"]
__all__ += ["stack_frames", "submodule", "watch_softmax"]
