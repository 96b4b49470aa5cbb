"""Any host whose two maps are outputs of modules that the user names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ssync_pl.adapters.base import HostAdapter, frame_size, resolve_grid, stack_frames
from ssync_pl.adapters.capture import Capture, submodule
from ssync_pl.errors import ConfigError, HostError, ShapeError
from ssync_pl.maps import SSyncMaps

__all__ = ["MapKind", "PathAdapter"]

MapKind = Literal["logits", "probs"]


class PathAdapter(HostAdapter):
    """Reads both maps from named modules.

    A module's output is the map itself, or has it under a key: ``"processor.corrector:masks"`` (a dict's key, an
    attribute, or a position). Shapes understood: ``(B, S, N)`` for one frame of a call, stacked over the calls of a
    step; ``(B, T, S, N)``; ``(B, T, S, H, W)``.

    Args:
        attention: Path of the slot attention.
        masks: Path of the decoder.
        attention_kind: ``"probs"`` (softmax over slots) or ``"logits"``.
        masks_kind: The same for the decoder's map.
        grid: ``(H, W)`` patches; None reads it off the maps or the size of the batch's frames, or takes a square.

    Raises:
        ConfigError: A kind is unknown, or ``grid`` is not two numbers.

    Example:
        >>> adapter = PathAdapter("corrector:logits", "decoder", attention_kind="logits", grid=(6, 8))
        >>> adapter.name
        'paths'
    """

    name: ClassVar[str] = "paths"

    def __init__(
        self,
        attention: str,
        masks: str,
        attention_kind: MapKind = "probs",
        masks_kind: MapKind = "probs",
        grid: tuple[int, int] | None = None,
    ) -> None:
        for name, kind in (("attention_kind", attention_kind), ("masks_kind", masks_kind)):
            if kind not in ("logits", "probs"):
                raise ConfigError(f"Expected argument `{name}` to be 'logits' or 'probs', but got {kind!r}.")
        if grid is not None and (not isinstance(grid, (list, tuple)) or len(grid) != 2):
            raise ConfigError(f"Expected argument `grid` to be (H, W), but got {grid!r}.")
        self.attention = attention
        self.masks = masks
        self.attention_kind = attention_kind
        self.masks_kind = masks_kind
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]))

    def match(self, host: nn.Module) -> bool:
        """Whether both paths exist in the host.

        Args:
            host: The model that is trained.

        Returns:
            True when they do.

        Example:
            >>> PathAdapter("0", "1").match(nn.Sequential(nn.Identity(), nn.Identity()))
            True
        """
        try:
            for path in (self.attention, self.masks):
                submodule(host, path.partition(":")[0])
        except HostError:
            return False
        return True

    def attach(self, host: nn.Module) -> Capture:
        """Listen to both modules.

        Args:
            host: The model that is trained.

        Returns:
            A closed capture.

        Raises:
            HostError: A path does not exist.

        Example:
            >>> PathAdapter("0", "1").attach(nn.Sequential(nn.Identity(), nn.Identity())).silent
            ['0', '1']
        """
        capture = Capture()
        modules = {path: submodule(host, path.partition(":")[0]) for path in (self.attention, self.masks)}
        for path, module in modules.items():
            capture.watch(path, module, _Pick(path))
        return capture

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        """Bring both maps to ``(B, T, S, N)``.

        Args:
            capture: Filled by one training step.
            batch: The batch of that step.

        Returns:
            The maps.

        Raises:
            HostError: A map has a shape that is not understood, or there is no one grid for both.
            ShapeError: The two maps differ in shape.

        Example:
            >>> host = nn.Sequential(nn.Identity(), nn.Identity())
            >>> adapter = PathAdapter("0", "1")
            >>> capture = adapter.attach(host)
            >>> capture.open()
            >>> _ = host(torch.full((1, 2, 9), 0.5))
            >>> adapter.collect(capture).shape
            (1, 1, 2, 9)
        """
        attention, attention_grid = _to_clip(capture[self.attention], self.attention)
        masks, mask_grid = _to_clip(capture[self.masks], self.masks)
        if attention.shape != masks.shape:
            raise ShapeError(
                f"Expected '{self.attention}' and '{self.masks}' to give maps of one shape (B, T, S, N), but got "
                f"{tuple(attention.shape)} and {tuple(masks.shape)}. Both maps need the same slots and patches: where "
                "only the grids differ, write a small HostAdapter with `maps_on_common_grid`."
            )
        grids = {grid for grid in (self.grid, attention_grid, mask_grid) if grid is not None}
        if len(grids) > 1:
            raise HostError(
                f"Expected one grid of patches, but got {', '.join(map(str, sorted(grids)))} from argument `grid` and "
                "the maps' own rows and columns. Leave `grid` out, or make the maps agree."
            )
        grid = next(iter(grids), None)
        return SSyncMaps(
            **{f"attention_{self.attention_kind}": attention, f"mask_{self.masks_kind}": masks},
            grid=resolve_grid(attention.shape[-1], grid, frame=frame_size(batch)),
        )


class _Pick:
    """Finds the map in a module's output."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.key = path.partition(":")[2]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        value = output
        if self.key:
            if isinstance(output, Mapping):
                value = output.get(self.key)
            elif isinstance(output, (tuple, list)) and self.key.lstrip("-").isdigit():
                index = int(self.key)
                value = output[index] if -len(output) <= index < len(output) else None
            else:
                value = getattr(output, self.key, None)
        if not isinstance(value, Tensor):
            raise HostError(
                f"Expected a tensor at '{self.path}', but got {type(value).__name__} from an output of type "
                f"{_describe(output)}. Pick an entry with '{self.path.partition(':')[0]}:key'."
            )
        return value


def _describe(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"dict with keys {', '.join(map(str, output))}"
    if hasattr(output, "_fields"):
        return f"{type(output).__name__} with fields {', '.join(output._fields)}"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of {len(output)}"
    return type(output).__name__


def _to_clip(values: list[Tensor], path: str) -> tuple[Tensor, tuple[int, int] | None]:
    if not values:
        raise HostError(f"Expected '{path}' to run inside the training step, but it did not.")
    first = values[0]
    if first.ndim == 3:
        return stack_frames(values, path), None
    value = values[0] if len(values) == 1 else torch.empty(0)
    if value.ndim == 4:
        return value, None
    if value.ndim == 5:
        return value.flatten(3), (int(value.shape[-2]), int(value.shape[-1]))
    raise HostError(
        f"Expected '{path}' to give (B, S, N) once a frame, (B, T, S, N) or (B, T, S, H, W), but it gave "
        f"{tuple(first.shape)} in {len(values)} call(s). Write a small HostAdapter that reshapes it."
    )
