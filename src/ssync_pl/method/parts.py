"""What the fast paths of the block have in common."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["BlockOptions", "BlockParts", "BlockStatistics"]


class BlockOptions(NamedTuple):
    """What the block is asked for.

    Args:
        grid: ``(H, W)``.
        merge_threshold: None switches merging off.
        regions: ``n_bd``, ``n_nbd``, ``n_noise``.
        sync_counts: Divide by the selected patches of all ranks.

    Example:
        >>> BlockOptions((2, 2)).merge_threshold
        0.7
    """

    grid: tuple[int, int]
    merge_threshold: float | None = 0.7
    regions: tuple[int, int, int] = (1, 1, 1)
    sync_counts: bool = False


class BlockStatistics(NamedTuple):
    """What a fast path has counted already, in the form in which it is reported.

    Args:
        shares: ``(2, 4)`` floats: `BlockParts.counts`, and the same as shares of all patches.
        merged_slots: ``(B,)`` int64, slots that take another slot's label.
        used_slots: ``(2, B)`` floats, slots that win a patch of the encoder's and of the decoder's map.

    Example:
        >>> BlockStatistics._fields
        ('shares', 'merged_slots', 'used_slots')
    """

    shares: Tensor
    merged_slots: Tensor
    used_slots: Tensor


class BlockParts(NamedTuple):
    """What a fast path of the block computes; only the losses carry gradient.

    Args:
        boundary_loss: 0-dim, encoder → decoder.
        interior_loss: 0-dim, decoder → encoder.
        raw_encoder_labels: ``(B, T, N)`` integers.
        raw_decoder_labels: ``(B, T, N)`` integers.
        encoder_labels: ``(B, T, N)`` integers, merged.
        decoder_labels: ``(B, T, N)`` integers, merged.
        boundary: ``(B, T, N)`` bool.
        interior: ``(B, T, N)`` bool.
        winners: ``(B, S)`` integers.
        slot_iou: ``(B, S, S)``, None without merging.
        encoder_areas: ``(B, S)`` integers, patches that each slot wins, before merging.
        decoder_areas: ``(B, S)`` integers.
        counts: ``(4,)`` integers: boundary, interior, both, patches whose merged labels agree.
        statistics: None where they are still to be derived.
        loss: 0-dim, weighted total; None where it is still to be added up.

    Example:
        >>> BlockParts._fields[:2]
        ('boundary_loss', 'interior_loss')
    """

    boundary_loss: Tensor
    interior_loss: Tensor
    raw_encoder_labels: Tensor
    raw_decoder_labels: Tensor
    encoder_labels: Tensor
    decoder_labels: Tensor
    boundary: Tensor
    interior: Tensor
    winners: Tensor
    slot_iou: Tensor | None
    encoder_areas: Tensor
    decoder_areas: Tensor
    counts: Tensor
    statistics: BlockStatistics | None = None
    loss: Tensor | None = None
