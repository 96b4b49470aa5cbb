"""Features of a frozen backbone, computed once and stored; what that asks of a backbone, and where one comes from."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from ssync_pl.errors import require


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


builders: list[Callable[[str, str | None], Backbone]] = []
"""Functions of a backbone's name and layer; `ssync_pl.hosts` adds its own when it is imported."""


def backbone_by_name(name: str, layer: str | None) -> Backbone:
    """Build a backbone with the last of the `builders`."""
    require(bool(builders), f"a package that builds backbone {name}", "none", advice="Add `import ssync_pl.hosts`.")
    return builders[-1](name, layer)
