"""The fused block as one differentiable function of two maps of logits."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssync_pl.method.direct import refuse_second_pass
from ssync_pl.method.distill import mean_over_ranks
from ssync_pl.method.parts import BlockParts, BlockStatistics

__all__ = ["MAX_SLOTS", "fused_available", "fused_block"]

MAX_SLOTS = 64
_MAX_IMAGES = 65535  # what a grid of programs holds along its second axis
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """How a kernel is cut into programs.

    Args:
        patches: Of one step of a program, a power of two (of the graph step: pairs of slots; of the last: programs).
        steps: Of a program.
        warps: Of a program.

    Example:
        >>> LABELS.patches * LABELS.steps
        192
    """

    patches: int
    steps: int
    warps: int


# Measured on an H100 at 24 x 24 patches, where many small programs hide the time that memory takes to answer.
LABELS = Launch(64, 3, 2)
COVERAGE = Launch(128, 5, 4)
LINK = Launch(2048, 1, 2)
TEACH = Launch(128, 1, 4)
FINISH = Launch(1024, 1, 8)
GRADIENTS = Launch(128, 1, 4)


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
    batch, frames, slots, _ = attention_logits.shape
    return fits and 0 < slots <= MAX_SLOTS and batch * frames <= _MAX_IMAGES


def fused_block(
    attention_logits: Tensor,
    mask_logits: Tensor,
    grid: tuple[int, int],
    *,
    merge_threshold: float | None = 0.7,
    n_bd: int = 1,
    n_nbd: int = 1,
    n_noise: int = 1,
    weights: tuple[float, float] = (1.0, 1.0),
    sync_counts: bool = False,
) -> BlockParts:
    """Labels, merging, regions, both Brier losses, and in the backward pass both gradients.

    Six kernels: labels of both maps and sums of the attention; overlaps of coverage; the graph of slots; regions and
    losses; their totals; and, in the backward pass, the gradients. Each map is fetched three times at most (the
    attention once more for its coverage), each gradient written once. Nothing waits for the device and no shape
    depends on data, so that a CUDA graph can hold it.

    Args:
        attention_logits: ``(B, T, S, N)`` float32, bfloat16 or float16, any strides.
        mask_logits: ``(B, T, S, N)`` of one of these types, any strides.
        grid: ``(H, W)`` with ``H * W == N``.
        merge_threshold: Overlap above which slots are redundant, in [0, 1]; None switches merging off.
        n_bd: A boundary patch has at least this many differing neighbours.
        n_nbd: An interior patch has fewer differing neighbours than this.
        n_noise: A boundary patch has at least this many agreeing neighbours.
        weights: Of both losses in the total.
        sync_counts: Divide by the selected patches of all ranks.

    Returns:
        Losses, labels, regions and statistics.

    Example:
        >>> fused_block.__name__  # on a GPU: fused_block(dots, alpha, (24, 24)).boundary_loss.backward()
        'fused_block'

    Source: SSync (arXiv 2606.15527), Sec. 3; the same results as `ssync_loss` on the plain path.
    """
    with _on_device(attention_logits):
        outputs = _FusedBlock.apply(
            attention_logits, mask_logits, grid, merge_threshold, (n_bd, n_nbd, n_noise), weights, sync_counts
        )
    *parts, shares, merged_slots, used, loss = outputs
    return BlockParts(*parts, BlockStatistics(shares, merged_slots, used), loss)  # type: ignore[call-arg]


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        attention: Tensor,
        masks: Tensor,
        grid: tuple[int, int],
        merge_threshold: float | None,
        regions: tuple[int, int, int],
        weights: tuple[float, float],
        sync_counts: bool,
    ) -> tuple[Any, ...]:
        # Deferred: kernels are compiled, or interpreted, as the environment says when they are first needed.
        from ssync_pl.method.triton import programs

        batch, frames, slots, patches = attention.shape
        images = batch * frames
        strides = (*attention.stride(), *masks.stride())
        padded = max(16, 1 << (slots - 1).bit_length())
        merge = merge_threshold is not None
        new = functools.partial(torch.empty, device=attention.device)

        wide = max(32, min(LABELS.patches, 1024 // padded))  # the accumulators of 64 slots have to fit, too
        parts = -(-patches // (wide * LABELS.steps))
        small = new(2, images, patches, dtype=torch.uint8)
        raw = new(2, batch, frames, patches, dtype=torch.int64)
        sums = new(images * parts if merge else 0, slots, dtype=torch.float32)
        areas = new(2, images, parts, slots, dtype=torch.int32)
        programs.label_maps[(parts, images, 2)](
            attention, masks, small, raw, sums, areas, frames, patches, *strides,
            MERGE=merge, SLOTS=padded, NUM_SLOTS=slots, PATCHES=wide, STEPS=LABELS.steps, num_warps=wide // 32,
        )  # fmt: skip

        shared_parts = 1
        overlap = new(batch if merge else 0, slots, slots, dtype=torch.float32)
        shared = overlap
        if merge:
            wide = max(32, min(COVERAGE.patches, 2048 // padded))
            shared_parts = -(-patches // (wide * COVERAGE.steps))
            shared = new(images, shared_parts, slots, slots, dtype=torch.float32)
            programs.share_coverage[(shared_parts, images)](
                attention, sums, shared, frames, parts, patches, *strides[:4],
                SLOTS=padded, NUM_SLOTS=slots, PATCHES=wide, STEPS=COVERAGE.steps, num_warps=COVERAGE.warps,
            )  # fmt: skip
        winners, merged_slots = new(batch, slots, dtype=torch.int64), new(batch, dtype=torch.int64)
        used, total_areas = new(2, batch, dtype=torch.float32), new(2, batch, slots, dtype=torch.int32)
        programs.link_slots[(batch,)](
            shared, areas, overlap, winners, merged_slots, used, total_areas, frames, shared_parts, parts,
            merge_threshold if merge else 1.0,
            MERGE=merge, SLOTS=padded, NUM_SLOTS=slots, FRAMES=max(1, LINK.patches // padded**2),
            DOUBLINGS=max(slots - 1, 1).bit_length(), num_warps=LINK.warps if padded == 16 else 4,
        )  # fmt: skip

        blocks = -(-patches // TEACH.patches)
        merged, selected = torch.empty_like(raw), new(2, batch, frames, patches, dtype=torch.bool)
        targets = torch.empty_like(small)
        partial = new(images * blocks, 2, dtype=torch.float32)
        partial_counts = new(images * blocks, 4, dtype=torch.int32)
        programs.teach[(blocks, images)](
            attention, masks, small, winners, merged, targets, selected.view(torch.int8), partial, partial_counts,
            frames, patches, *grid, *regions, *strides,
            NUM_SLOTS=slots, PATCHES=TEACH.patches, num_warps=TEACH.warps,
        )  # fmt: skip
        # Tensors of their own and no views of one, so that a script may add to them in place.
        total, boundary, interior = (new((), dtype=torch.float32) for _ in range(3))
        found, entries = new(2, dtype=torch.float32), new(2, dtype=torch.float32)
        counts, shares = new(4, dtype=torch.int32), new(2, 4, dtype=torch.float32)
        programs.finish[(1,)](
            partial, partial_counts, total, boundary, interior, found, entries, counts, shares, *weights,
            images * blocks, slots, images * patches, PROGRAMS=FINISH.patches, num_warps=FINISH.warps,
        )  # fmt: skip
        if sync_counts:
            entries = mean_over_ranks(shares[0, :2] * slots)
            entries = torch.where(entries > 0, entries, 1.0)
            boundary, interior = found / entries
            boundary, interior = boundary.clone(), interior.clone()
            total = weights[0] * boundary + weights[1] * interior
        ctx.save_for_backward(attention, masks, targets, selected, entries)
        ctx.weights, ctx.sizes = weights, (frames, patches, *strides)
        others = (
            raw[0], raw[1], merged[0], merged[1], selected[0], selected[1], winners, overlap if merge else None,
            total_areas[0], total_areas[1], counts, shares, merged_slots, used,
        )  # fmt: skip
        ctx.mark_non_differentiable(*(value for value in others if value is not None))
        ctx.set_materialize_grads(False)
        return (boundary, interior, *others, total)

    @staticmethod
    def backward(ctx: Any, boundary: Tensor | None, interior: Tensor | None, *rest: Any) -> tuple[Any, ...]:
        from ssync_pl.method.triton import programs

        attention, masks, targets, selected, entries = ctx.saved_tensors
        total = rest[-1]
        new = functools.partial(torch.empty, device=attention.device)
        to_boundary, to_interior = (0.0, 0.0) if total is None else ctx.weights
        # A side that nothing asks for gets None: its graph need not be walked.
        by_masks = None if total is None and boundary is None else new(masks.shape, dtype=masks.dtype)
        by_attention = None if total is None and interior is None else new(attention.shape, dtype=attention.dtype)
        sides = (by_masks is not None) + (by_attention is not None)
        if sides:
            # What is not there is not touched; its place in the call needs some tensor.
            images, patches = attention.shape[0] * attention.shape[1], attention.shape[3]
            with _on_device(attention):
                programs.write_gradients[(-(-patches // GRADIENTS.patches), images, sides)](
                    attention, masks, targets, selected.view(torch.int8),
                    *(entries if value is None else value for value in (total, boundary, interior)), entries,
                    attention if by_attention is None else by_attention, masks if by_masks is None else by_masks,
                    to_boundary, to_interior, float(boundary is not None), float(interior is not None), *ctx.sizes,
                    FIRST=int(by_masks is None), NUM_SLOTS=attention.shape[2], PATCHES=GRADIENTS.patches,
                    num_warps=GRADIENTS.warps,
                )  # fmt: skip
        if torch.is_grad_enabled():
            upstream = (total, boundary, interior)
            by_attention, by_masks = (
                None if gradient is None else _Once.apply(gradient, of, *upstream)
                for gradient, of in ((by_attention, attention), (by_masks, masks))
            )
        return by_attention, by_masks, None, None, None, None, None


class _Once(torch.autograd.Function):
    """A gradient, tied to what it depends on, so that a derivative of it is refused and not taken for zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        refuse_second_pass()


def _on_device(of: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the maps."""
    return torch.cuda.device(of.device) if of.is_cuda else contextlib.nullcontext()
