"""The fused block as one differentiable function of two maps of logits."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssync_pl.functional.distill import mean_over_ranks
from ssync_pl.functional.parts import BlockParts

__all__ = ["MAX_SLOTS", "fused_available", "fused_block"]

MAX_SLOTS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Patches a program: enough to fill a warp's loads, few enough that 64 slots stay in registers.
_PATCHES = 64


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def fused_available(attention_logits: Tensor, mask_logits: Tensor) -> bool:
    """Whether the fused path can take these maps: on a CUDA device with Triton, of a usual type, S at most 64.

    Args:
        attention_logits: ``(B, T, S, N)``.
        mask_logits: ``(B, T, S, N)``.

    Returns:
        True when `fused_block` will work. Under ``TRITON_INTERPRET=1`` maps on the CPU are taken too.

    Example:
        >>> fused_available(torch.zeros(1, 1, 65, 4), torch.zeros(1, 1, 65, 4))
        False
    """
    if not _has_triton() or type(attention_logits.detach()) is not Tensor:
        return False
    cuda = attention_logits.is_cuda and torch.version.hip is None
    if not cuda and os.environ.get("TRITON_INTERPRET", "") != "1":
        return False
    fits = attention_logits.dtype in _DTYPES and mask_logits.dtype in _DTYPES
    return fits and 0 < attention_logits.shape[2] <= MAX_SLOTS


def fused_block(
    attention_logits: Tensor,
    mask_logits: Tensor,
    grid: tuple[int, int],
    *,
    merge_threshold: float | None = 0.7,
    n_bd: int = 1,
    n_nbd: int = 1,
    n_noise: int = 1,
    sync_counts: bool = False,
) -> BlockParts:
    """Labels, merging, regions, both Brier losses, and in the backward pass both gradients.

    Five programs: statistics of both maps; the graph of slots; regions, over labels only; sums of the losses; and, in
    the backward pass, the gradients. Each map is read three times in all (the attention once more for its mean), each
    gradient written once. Nothing waits for the device and no shape depends on data, so that a CUDA graph can hold it.

    Args:
        attention_logits: ``(B, T, S, N)`` float32, bfloat16 or float16, any strides.
        mask_logits: ``(B, T, S, N)`` of one of these types, any strides.
        grid: ``(H, W)`` with ``H * W == N``.
        merge_threshold: Overlap above which slots are redundant, in [0, 1]; None switches merging off.
        n_bd: A boundary patch has at least this many differing neighbours.
        n_nbd: An interior patch has fewer differing neighbours than this.
        n_noise: A boundary patch has at least this many agreeing neighbours.
        sync_counts: Divide by the selected patches of all ranks.

    Returns:
        Losses, labels, regions and statistics.

    Example:
        >>> fused_block.__name__  # on a GPU: fused_block(dots, alpha, (24, 24)).boundary_loss.backward()
        'fused_block'

    Source: SSync (arXiv 2606.15527), Sec. 3; the same results as `ssync_loss` on the plain path.
    """
    outputs = _FusedBlock.apply(
        attention_logits, mask_logits, grid, merge_threshold, (n_bd, n_nbd, n_noise), sync_counts
    )
    return BlockParts(*outputs)


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        attention: Tensor,
        masks: Tensor,
        grid: tuple[int, int],
        merge_threshold: float | None,
        regions: tuple[int, int, int],
        sync_counts: bool,
    ) -> tuple[Any, ...]:
        # Deferred: kernels are compiled, or interpreted, as the environment says when they are first needed.
        from ssync_pl.kernels import programs

        batch, frames, slots, patches = attention.shape
        sizes = (frames, slots, patches)
        strides = (*attention.stride(), *masks.stride())
        padded = max(16, 1 << (slots - 1).bit_length())
        blocks = (-(-patches // _PATCHES), batch * frames)
        device = attention.device
        merge = merge_threshold is not None
        mean = attention.mean(dim=(1, 3), dtype=torch.float32) if merge else attention.new_empty(0, dtype=torch.float32)
        labels = torch.empty(4, batch, frames, patches, dtype=torch.uint8, device=device)
        selected = torch.empty(batch, frames, patches, dtype=torch.uint8, device=device)
        shared = torch.zeros(batch * frames if merge else 0, slots, slots, dtype=torch.float32, device=device)
        whole = torch.zeros(2 * batch * slots + 4, dtype=torch.int32, device=device)
        encoder_areas, decoder_areas = whole[: 2 * batch * slots].view(2, batch, slots)
        counts = whole[2 * batch * slots :]
        programs.read_maps[blocks](
            attention, masks, mean, labels[0], labels[1], shared, encoder_areas, decoder_areas, *sizes, *strides,
            MERGE=merge, SLOTS=padded, PATCHES=_PATCHES,
        )  # fmt: skip
        overlap = None
        if merge:
            overlap = torch.empty(batch, slots, slots, dtype=torch.float32, device=device)
            winners = torch.empty(batch, slots, dtype=torch.int32, device=device)
            programs.link_slots[(batch,)](
                shared, encoder_areas, overlap, winners, frames, slots, merge_threshold,
                SLOTS=padded, DOUBLINGS=max(slots - 1, 1).bit_length(),
            )  # fmt: skip
        else:
            winners = torch.arange(slots, dtype=torch.int32, device=device).repeat(batch, 1)
        programs.count_regions[blocks](
            labels[0], labels[1], winners, labels[2], labels[3], selected, counts, *sizes, *grid, *regions,
            PATCHES=_PATCHES,
        )  # fmt: skip
        partial = torch.empty(blocks[0] * blocks[1], 2, dtype=torch.float32, device=device)
        programs.sum_losses[blocks](
            attention, masks, labels[2], labels[3], selected, partial, *sizes, *strides,
            SLOTS=padded, PATCHES=_PATCHES,
        )  # fmt: skip
        entries = counts[:2].float() * slots
        if sync_counts:
            entries = mean_over_ranks(entries)
        entries = torch.where(entries > 0, entries, 1.0)
        boundary_loss, interior_loss = partial.sum(0) / entries
        ctx.save_for_backward(attention, masks, labels, selected, entries)
        ctx.launch = (blocks, sizes, strides, padded)
        others = (
            labels[0], labels[1], labels[2], labels[3], (selected & 1).bool(), (selected >> 1).bool(),
            winners, overlap, encoder_areas, decoder_areas, counts,
        )  # fmt: skip
        ctx.mark_non_differentiable(*(value for value in others if value is not None))
        ctx.set_materialize_grads(False)
        return (boundary_loss, interior_loss, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, boundary: Tensor | None, interior: Tensor | None, *_: Any) -> tuple[Any, ...]:
        from ssync_pl.kernels import programs

        attention, masks, labels, selected, entries = ctx.saved_tensors
        blocks, sizes, strides, padded = ctx.launch
        nothing = entries.new_zeros(2)
        scale = torch.stack(
            [nothing[0] if boundary is None else boundary, nothing[1] if interior is None else interior]
        )
        scale = scale.float() / entries
        by_attention = torch.empty(attention.shape, dtype=attention.dtype, device=attention.device)
        by_masks = torch.empty(masks.shape, dtype=masks.dtype, device=masks.device)
        programs.write_gradients[blocks](
            attention, masks, labels[2], labels[3], selected, scale[0], scale[1], by_attention, by_masks,
            *sizes, *strides, SLOTS=padded, PATCHES=_PATCHES,
        )  # fmt: skip
        # A side without weight gets None: its graph need not be walked.
        return (
            None if interior is None else by_attention,
            None if boundary is None else by_masks,
            None,
            None,
            None,
            None,
        )
