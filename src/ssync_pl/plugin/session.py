"""A host with hooks on it: from one training step's tensors to checked maps."""

from typing import Any

from torch import nn

from ssync_pl.adapters import HostAdapter, PathAdapter, locate
from ssync_pl.adapters.paths import MapKind
from ssync_pl.errors import HostError, require
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.engine import check_first


def adapter_from(
    adapter: str | HostAdapter,
    attention: str | None,
    masks: str | None,
    attention_kind: MapKind,
    masks_kind: MapKind,
    grid: tuple[int, int] | None,
) -> tuple[str | HostAdapter, tuple[int, int] | None]:
    """Settles the two ways to name a host's maps: by an adapter, or by the modules that give them."""
    require(isinstance(adapter, (str, HostAdapter)), "argument `adapter` to be a name or an adapter", repr(adapter))
    named, advice = f"{attention=}, {masks=}", "Name both modules, or neither and let `adapter` find them."
    together = (attention is None) == (masks is None)
    require(together, "arguments `attention` and `masks` to come together", named, advice=advice)
    if attention is not None and masks is not None:
        require(adapter == "auto", "either `adapter` or `attention` and `masks`", "both", advice="Leave one out.")
        return PathAdapter(attention, masks, attention_kind, masks_kind, grid), None
    alone, kinds = attention_kind == masks_kind == "probs", "`attention_kind` and `masks_kind`"
    require(alone, f"{kinds} only beside `attention` and `masks`", "them alone", advice="Adapters know these.")
    return adapter, grid


class HostSession:
    """Hooks on a host from `__init__` to `remove`, and the maps of each step."""

    def __init__(
        self, host: nn.Module, adapter: str | HostAdapter = "auto", grid: tuple[int, int] | None = None
    ) -> None:
        self.host = host
        self.adapter, self.root, self.path = locate(adapter, host, grid)
        self.capture = self.adapter.attach(self.root)
        self.checked = False

    def open(self, training_only: bool = False) -> None:
        """Starts to listen, on request only to what trains, and forgets what was heard before."""
        self.capture.clear()
        self.capture.open(self.root if training_only else None)

    def close(self) -> None:
        """Stops to listen, and lets go of the step's tensors."""
        self.capture.close()
        self.capture.clear()

    def collect(self, batch: Any, config: SSyncConfig) -> SSyncMaps:
        """Turns what was heard into maps ``(B, T, S, N)`` and checks the first ones; the batch may tell the grid."""
        self.capture.close()
        if self.capture.silent:
            self.capture.refuse_bypass()
            raise HostError(
                f"Expected the training step of {type(self.host).__name__} to run "
                f"{', '.join(repr(key) for key in self.capture.silent)}, but it did not. The adapter "
                f"'{self.adapter.name}' may be the wrong one, or the host was compiled and run before this training: "
                "call torch._dynamo.reset() first. Modules inside reentrant activation checkpointing run without "
                "gradients: use checkpoint(..., use_reentrant=False)."
            )
        maps = self.adapter.collect(self.capture, batch)
        if not self.checked:
            check_first(maps, type(self.host).__name__, config)
            self.adapter.verify(self.capture, maps)
            self.checked = True
        return maps

    def remove(self) -> None:
        """Takes every hook off the host; may be called again."""
        self.capture.remove()
