"""A host with hooks on it: from one training step's tensors to checked maps."""

from typing import Any

from torch import nn

from ssync_pl.adapters import HostAdapter, locate
from ssync_pl.adapters.checks import check_first
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.config import SSyncConfig


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
            check_first(maps, type(self.host).__name__, config.boundary_weight, config.interior_weight)
            self.adapter.verify(self.capture, maps)
            self.checked = True
        return maps

    def remove(self) -> None:
        """Takes every hook off the host; may be called again."""
        self.capture.remove()
