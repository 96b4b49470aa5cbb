"""Where each map is trusted: boundaries of the encoder, interiors of the decoder."""

import torch
from torch import Tensor

NUM_NEIGHBOURS = 10  # eight patches around one in its frame, and the same place in the frame before and after


def count_differing_neighbours(
    labels: Tensor, patch_valid: Tensor | None = None, frame_index: Tensor | None = None
) -> Tensor:
    """Counts for each patch how many of its ten neighbours carry another label.

    A neighbour outside the clip counts as the patch at the clamped coordinates, as in the reference: at a border the
    straight-out neighbour is the patch itself, and the diagonal-out ones are its lateral neighbours, counted again.

    Args:
        labels: ``(B, T, H, W)`` integer labels.
        patch_valid: ``(B, T, H, W)`` bool; a patch without a map differs from nothing.
        frame_index: ``(B, T)`` integers; frames are neighbours only where these differ by exactly 1.

    Returns:
        ``(B, T, H, W)`` uint8 counts in [0, 10].

    Examples:
        >>> count_differing_neighbours(torch.tensor([[[[0, 0, 1]]]]))
        tensor([[[[0, 3, 3]]]], dtype=torch.uint8)

    Source: SSync (arXiv 2606.15527), boundary and interior selection.
    """
    height, width = labels.shape[2:]
    padded = _repeat_edges(labels)
    valid = None if patch_valid is None else _repeat_edges(patch_valid)
    count = torch.zeros_like(labels, dtype=torch.uint8)
    for dy, dx in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)):
        there = (..., slice(dy, dy + height), slice(dx, dx + width))
        differs = padded[there] != labels
        count += differs if valid is None else differs & valid[there]
    step = labels[:, 1:] != labels[:, :-1]
    if frame_index is not None:
        step = step & (frame_index.diff(dim=1).abs() == 1)[:, :, None, None]
    count[:, 1:] += step if patch_valid is None else step & patch_valid[:, :-1]
    count[:, :-1] += step if patch_valid is None else step & patch_valid[:, 1:]
    return count


def _repeat_edges(x: Tensor) -> Tensor:
    x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
    return torch.cat([x[..., :1], x, x[..., -1:]], 3)


def boundary_region(differing: Tensor, n_bd: int = 1, n_noise: int = 1) -> Tensor:
    """Selects edges of the encoder's objects, no specks: ``n_bd`` neighbours differ at least, ``n_noise`` agree."""
    return (differing >= n_bd) & (differing <= NUM_NEIGHBOURS - n_noise)


def interior_region(differing: Tensor, n_nbd: int = 1) -> Tensor:
    """Selects insides of the decoder's objects: fewer than ``n_nbd`` neighbours differ."""
    return differing < n_nbd
