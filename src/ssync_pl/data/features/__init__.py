"""Features of a frozen backbone, computed once and stored in shards beside those of the videos.

Here: what a cache asks of a backbone, and where a data module that knows only a name gets one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from ssync_pl.errors import ConfigError

__all__ = ["Backbone", "backbone_by_name", "offer_backbones"]


class Backbone(Protocol):
    """A frozen network: called with normalised frames (M, 3, H, W), it returns features (M, N, D) and their grid."""

    name: str
    layer: str  # one or several, joined by `+`
    layer_dims: tuple[int, ...]  # channels of each of them
    dim: int  # their sum, D
    fingerprint: str  # SHA-256 of the weights
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, frames: Tensor, /) -> tuple[Tensor, tuple[int, int]]:
        """Compute features."""

    def to(self, device: Any, /) -> Any:
        """Move it to a device."""


_offered: list[Callable[[str, str | None], Backbone]] = []


def offer_backbones(load: Callable[[str, str | None], Backbone]) -> None:
    """Say how a backbone is built from its name and layer; `ssync_pl.hosts` does so when it is imported."""
    _offered[:] = [load]


def backbone_by_name(name: str, layer: str | None) -> Backbone:
    """Build a backbone as the last call of `offer_backbones` says."""
    if not _offered:
        raise ConfigError(f"Expected a package that builds backbone {name}, but got none. Add `import ssync_pl.hosts`.")
    return _offered[0](name, layer)
