"""From one value an item to a score."""

from __future__ import annotations

import torch
from torch import Tensor

from ssync_pl.errors import ConfigError

__all__ = ["reduce_values", "validate_level"]


def validate_level(level: str, reduction: str) -> None:
    """Refuse unknown choices of `level` and `reduction`.

    Args:
        level: must be "video" or "image".
        reduction: must be "mean" or "none".

    Raises:
        ConfigError: if one is something else.

    Example:
        >>> validate_level("video", "mean")
    """
    if level not in ("video", "image"):
        raise ConfigError(f"Expected argument `level` to be 'video' or 'image', but got {level!r}.")
    if reduction not in ("mean", "none"):
        raise ConfigError(f"Expected argument `reduction` to be 'mean' or 'none', but got {reduction!r}.")


def reduce_values(values: Tensor, counted: Tensor, reduction: str = "mean") -> Tensor:
    """Mean over the items that count, or all items with NaN for those that do not.

    Args:
        values: one value an item, any shape.
        counted: bool of the same shape.
        reduction: "mean" or "none".

    Returns:
        Scalar (NaN if nothing counts), or the shape of `values`.

    Example:
        >>> import torch
        >>> reduce_values(torch.tensor([1.0, 3.0]), torch.tensor([True, False])).item()
        1.0
    """
    if reduction == "none":
        return values.masked_fill(~counted, torch.nan)
    return values.masked_fill(~counted, 0.0).sum() / counted.sum()
