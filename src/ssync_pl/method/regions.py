"""Where each map is trusted: boundaries of the encoder, interiors of the decoder."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NUM_NEIGHBOURS", "boundary_region", "count_differing_neighbours", "interior_region"]

NUM_NEIGHBOURS = 10
"""Eight patches around one in its frame, and the same place in the frame before and after."""


def _edge_pad(x: Tensor, dim: int) -> Tensor:
    return torch.cat([x.narrow(dim, 0, 1), x, x.narrow(dim, x.shape[dim] - 1, 1)], dim)


def count_differing_neighbours(
    labels: Tensor, patch_valid: Tensor | None = None, frame_index: Tensor | None = None
) -> Tensor:
    """For each patch, how many of its ten neighbours carry another label.

    A neighbour outside the clip counts as the patch at the clamped coordinates, as in the reference: at a border the
    straight-out neighbour is the patch itself, and the diagonal-out ones are its lateral neighbours, counted again.

    Args:
        labels: ``(B, T, H, W)`` integer labels.
        patch_valid: ``(B, T, H, W)`` bool; a patch without a map differs from nothing.
        frame_index: ``(B, T)`` integers; frames are neighbours only where these differ by exactly 1.

    Returns:
        ``(B, T, H, W)`` int64 counts in [0, 10].

    Example:
        >>> count_differing_neighbours(torch.tensor([[[[0, 0, 1]]]]))
        tensor([[[[0, 3, 3]]]])

    Source: SSync (arXiv 2606.15527), boundary and interior selection.
    """
    _, frames, height, width = labels.shape
    padded = _edge_pad(_edge_pad(labels, 2), 3)
    valid = None if patch_valid is None else _edge_pad(_edge_pad(patch_valid, 2), 3)
    count = torch.zeros_like(labels, dtype=torch.uint8)
    for dy in range(3):
        for dx in range(3):
            if dy == 1 and dx == 1:
                continue
            differs = padded[..., dy : dy + height, dx : dx + width] != labels
            if valid is not None:
                differs = differs & valid[..., dy : dy + height, dx : dx + width]
            count += differs
    if frames > 1:
        step = labels[:, 1:] != labels[:, :-1]
        if frame_index is not None:
            step = step & ((frame_index[:, 1:] - frame_index[:, :-1]).abs() == 1)[:, :, None, None]
        if patch_valid is None:
            count[:, 1:] += step
            count[:, :-1] += step
        else:
            count[:, 1:] += step & patch_valid[:, :-1]
            count[:, :-1] += step & patch_valid[:, 1:]
    return count.long()


def boundary_region(differing: Tensor, n_bd: int = 1, n_noise: int = 1) -> Tensor:
    """Patches at an object's edge in the encoder's map that are no isolated specks.

    Args:
        differing: ``(B, T, H, W)`` number of neighbours with another label, in [0, 10].
        n_bd: At least this many must differ, in [0, 10].
        n_noise: At least this many must agree, in [0, 10].

    Returns:
        ``(B, T, H, W)`` bool.

    Example:
        >>> boundary_region(torch.tensor([0, 1, 9, 10]))
        tensor([False,  True,  True, False])

    Source: SSync (arXiv 2606.15527), boundary refinement.
    """
    return (differing >= n_bd) & (NUM_NEIGHBOURS - differing >= n_noise)


def interior_region(differing: Tensor, n_nbd: int = 1) -> Tensor:
    """Patches inside an object of the decoder's map.

    Args:
        differing: ``(B, T, H, W)`` number of neighbours with another label, in [0, 10].
        n_nbd: Fewer than this many may differ, in [1, 11].

    Returns:
        ``(B, T, H, W)`` bool.

    Example:
        >>> interior_region(torch.tensor([0, 1]))
        tensor([ True, False])

    Source: SSync (arXiv 2606.15527), interior denoising.
    """
    return differing < n_nbd
