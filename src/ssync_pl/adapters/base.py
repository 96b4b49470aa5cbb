"""What an adapter is, the registry of adapters, and what most of them need."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssync_pl.adapters.capture import Capture
from ssync_pl.errors import HostError
from ssync_pl.method.labels import compute_dtype
from ssync_pl.method.maps import SSyncMaps

__all__ = [
    "HostAdapter",
    "adapter_names",
    "frame_size",
    "maps_on_common_grid",
    "register_adapter",
    "registered_adapter",
    "resolve_grid",
    "stack_frames",
]


class HostAdapter(ABC):
    """Turns one family of hosts into `SSyncMaps`: recognise, listen, collect.

    Example:
        >>> class Mine(HostAdapter):
        ...     name = "mine"
        ...     def match(self, host): return hasattr(host, "my_attention")
        ...     def attach(self, host): return Capture()
        ...     def collect(self, capture, batch=None): raise HostError("nothing to collect")
        >>> Mine().match(nn.Identity())
        False
    """

    name: ClassVar[str]
    """Short name for ``adapter=...``."""

    @abstractmethod
    def match(self, host: nn.Module) -> bool:
        """Whether this adapter knows the host.

        Args:
            host: The model that is trained.

        Returns:
            True when `attach` will work.
        """

    @abstractmethod
    def attach(self, host: nn.Module) -> Capture:
        """Put hooks on the host.

        Args:
            host: The model that is trained.

        Returns:
            A closed capture; its ``remove()`` takes the hooks off again.
        """

    @abstractmethod
    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        """Turn what one training step produced into maps.

        Args:
            capture: Filled by one training step.
            batch: The batch of that step, for hosts whose grid follows from the size of the frames.

        Returns:
            Maps ``(B, T, S, N)``, attached to the graph.
        """

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        """Compare maps that were recomputed with what the host itself used; called in the first step only.

        Args:
            capture: Filled by one training step.
            maps: What `collect` made of it.

        Raises:
            HostError: They differ. Adapters that read the host's own tensors have nothing to compare.
        """
        return


_REGISTRY: dict[str, type[HostAdapter]] = {}


def register_adapter(adapter: type[HostAdapter]) -> type[HostAdapter]:
    """Make an adapter known by its name; works as a class decorator.

    Args:
        adapter: A class with a ``name`` that can be made without arguments. A later one of the same name replaces it.

    Returns:
        The class.

    Example:
        >>> @register_adapter
        ... class Mine(HostAdapter):
        ...     name = "mine-too"
        ...     def match(self, host): return False
        ...     def attach(self, host): return Capture()
        ...     def collect(self, capture, batch=None): raise HostError("nothing to collect")
        >>> "mine-too" in adapter_names()
        True
    """
    _REGISTRY[adapter.name] = adapter
    return adapter


def adapter_names() -> list[str]:
    """Names of all registered adapters.

    Returns:
        Sorted names.

    Example:
        >>> {"savi", "videosaur"} <= set(adapter_names())
        True
    """
    return sorted(_REGISTRY)


def registered_adapter(name: str) -> type[HostAdapter] | None:
    """The adapter of a name.

    Args:
        name: Such as ``"videosaur"``.

    Returns:
        The class, or None when there is none of that name.

    Example:
        >>> registered_adapter("nothing") is None
        True
    """
    return _REGISTRY.get(name)


def stack_frames(values: list[Tensor], name: str) -> Tensor:
    """Stack what a module gave for each frame into a clip.

    Args:
        values: T tensors ``(B, ...)``.
        name: Of the module, for the message.

    Returns:
        ``(B, T, ...)``.

    Raises:
        HostError: The module did not run, or shapes differ between frames, as with slots that grow inside a step.

    Example:
        >>> stack_frames([torch.zeros(2, 3), torch.zeros(2, 3)], "corrector").shape
        torch.Size([2, 2, 3])
    """
    if not values:
        raise HostError(f"Expected '{name}' to run inside the training step, but it did not.")
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) != 1:
        raise HostError(f"Expected '{name}' to give one shape for all frames, but got {shapes}.")
    return torch.stack(values, dim=1)


def resolve_grid(
    patches: int,
    explicit: tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
    frame: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Rows and columns of a flat axis of patches.

    In this order: given by the user; patch size with the frame's height and width; the one square patch size that
    cuts an oblong frame into this many patches; a perfect square, unless the frame is known to be oblong.

    Args:
        patches: N.
        explicit: ``(H, W)`` from the user.
        patch_size: Of the encoder, in pixels; one number, or height and width.
        frame: Height and width of the frames, in pixels.

    Returns:
        ``(H, W)`` with ``H * W == patches``.

    Raises:
        HostError: None of them fits; the message says what to pass.

    Example:
        >>> resolve_grid(48, patch_size=14, frame=(84, 112))
        (6, 8)
        >>> resolve_grid(144, frame=(112, 252))
        (8, 18)
        >>> resolve_grid(48)
        Traceback (most recent call last):
            ...
        ssync_pl.errors.HostError: Expected a grid for 48 patches, which is no square. Pass grid=(H, W).
    """
    if explicit is not None:
        if explicit[0] * explicit[1] != patches:
            raise HostError(f"Expected argument `grid` to have {patches} patches, but got {tuple(explicit)}.")
        return int(explicit[0]), int(explicit[1])
    if frame is not None:
        rows, columns = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size or (0, 0)
        if rows and columns and (frame[0] // rows) * (frame[1] // columns) == patches:
            return frame[0] // rows, frame[1] // columns
        if frame[0] != frame[1]:
            return _oblong_grid(patches, frame)
    side = math.isqrt(patches)
    if side * side == patches:
        return side, side
    raise HostError(f"Expected a grid for {patches} patches, which is no square. Pass grid=(H, W).")


def _oblong_grid(patches: int, frame: tuple[int, int]) -> tuple[int, int]:
    # Smaller patches are more patches, so the search ends at the first size that gives too many.
    for size in range(math.isqrt(frame[0] * frame[1] // patches), 0, -1):
        grid = (frame[0] // size, frame[1] // size)
        if grid[0] * grid[1] == patches:
            return grid
        if grid[0] * grid[1] > patches:
            break
    raise HostError(
        f"Expected a grid for {patches} patches, but no patch size cuts frames of {frame[0]} x {frame[1]} pixels into "
        "that many. Pass grid=(H, W)."
    )


def frame_size(batch: Any) -> tuple[int, int] | None:
    """Height and width of the frames of a batch, where it says so.

    Args:
        batch: A mapping (``video`` and ``image`` are looked at first), a sequence or a tensor. Frames are tensors of
            4 or 5 axes, ``(..., 3, H, W)`` or ``(..., H, W, 3)``; stored ``features`` are no frames.

    Returns:
        ``(H, W)`` in pixels, or None.

    Example:
        >>> frame_size({"video": torch.zeros(1, 2, 3, 84, 112)})
        (84, 112)
    """
    if isinstance(batch, Mapping):
        first = [batch[key] for key in ("video", "image") if key in batch]
        # Stored features (B, T, N, D) of a short clip would pass for frames of T colours.
        values = [*first, *(value for key, value in batch.items() if key != "features")]
    elif isinstance(batch, (list, tuple)):
        values = list(batch)
    else:
        values = [batch]
    for value in values:
        if not isinstance(value, Tensor) or value.ndim not in (4, 5):
            continue
        colours = (1, 3, 4)
        if value.shape[-3] in colours:
            return int(value.shape[-2]), int(value.shape[-1])
        if value.shape[-1] in colours:
            return int(value.shape[-3]), int(value.shape[-2])
    return None


def maps_on_common_grid(attention_logits: Tensor, grid: tuple[int, int], mask_logits: Tensor) -> SSyncMaps:
    """Maps of a host whose decoder draws on another grid than its attention reads.

    The finer map is averaged to the coarser grid as probabilities, which keeps the sum over slots at 1; its logits are
    averaged too, for merging only.

    Args:
        attention_logits: ``(B, T, S, N)``.
        grid: ``(H, W)`` of the attention.
        mask_logits: ``(B, T, S, h, w)`` of the decoder.

    Returns:
        Maps on the coarser of both grids.

    Raises:
        HostError: The two grids do not divide each other.

    Example:
        >>> maps_on_common_grid(torch.zeros(1, 1, 2, 4), (2, 2), torch.zeros(1, 1, 2, 8, 8))
        SSyncMaps(B=1, T=1, S=2, grid=(2, 2), attention=logits, masks=probs, dtype=torch.float32, device=cpu)
    """
    fine = (int(mask_logits.shape[-2]), int(mask_logits.shape[-1]))
    if fine == tuple(grid):
        return SSyncMaps(attention_logits=attention_logits, mask_logits=mask_logits.flatten(3), grid=grid)
    if fine[0] % grid[0] == 0 and fine[1] % grid[1] == 0:
        probs = _pool(mask_logits.to(compute_dtype(mask_logits.dtype)).softmax(2), grid)
        return SSyncMaps(attention_logits=attention_logits, mask_probs=probs.flatten(3), grid=grid)
    if grid[0] % fine[0] == 0 and grid[1] % fine[1] == 0:
        logits = attention_logits.to(compute_dtype(attention_logits.dtype)).unflatten(3, grid)
        return SSyncMaps(
            attention_logits=_pool(logits, fine).flatten(3),
            attention_probs=_pool(logits.softmax(2), fine).flatten(3),
            mask_logits=mask_logits.flatten(3),
            grid=fine,
        )
    raise HostError(
        f"Expected the decoder's grid {fine} and the attention's grid {tuple(grid)} to divide each other, but they do "
        "not. Change the decoder's size or the encoder's strides, or write a HostAdapter that resamples."
    )


def _pool(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    kernel = (maps.shape[-2] // grid[0], maps.shape[-1] // grid[1])
    return F.avg_pool2d(maps.flatten(0, 1), kernel).unflatten(0, maps.shape[:2])
