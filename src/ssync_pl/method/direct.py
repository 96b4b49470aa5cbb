"""The block with both gradients formed beside the losses: the fast path without a fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ssync_pl.errors import SSyncError
from ssync_pl.method.distill import mean_over_ranks
from ssync_pl.method.labels import compute_dtype
from ssync_pl.method.merging import component_winners, temporal_slot_iou
from ssync_pl.method.parts import BlockOptions, BlockParts
from ssync_pl.method.regions import NUM_NEIGHBOURS

__all__ = ["EAGER", "Stages", "direct_block", "refuse_second_pass", "run_block"]


def direct_block(
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
    """Labels, merging, regions, both Brier losses and both gradients in one forward pass.

    A patch's gradient needs nothing but its own probabilities and label, so that it is formed where these are at hand;
    the backward pass only scales it. Same results as the plain path of `ssync_loss`, in two maps' memory beside the two
    gradients. Both maps go through each step together, and comparisons write numbers, never bools, which PyTorch does
    not vectorise on CPUs.

    Args:
        attention_logits: ``(B, T, S, N)`` floating point, any strides.
        mask_logits: ``(B, T, S, N)``; where one side is float64, so must be the other.
        grid: ``(H, W)`` with ``H * W == N``.
        merge_threshold: Overlap above which slots are redundant, in [0, 1]; None switches merging off.
        n_bd: A boundary patch has at least this many differing neighbours.
        n_nbd: An interior patch has fewer differing neighbours than this.
        n_noise: A boundary patch has at least this many agreeing neighbours.
        sync_counts: Divide by the selected patches of all ranks.

    Returns:
        Losses, labels, regions and statistics.

    Raises:
        SSyncError: In a backward pass through the gradients, which are constants here.

    Example:
        >>> d = torch.tensor([[[[2.0, 0.0], [0.0, 2.0]]]], requires_grad=True)
        >>> a = torch.zeros(1, 1, 2, 2, requires_grad=True)
        >>> parts = direct_block(d, a, (1, 2))
        >>> parts.boundary_loss.backward()
        >>> parts.boundary.tolist(), a.grad.flatten().tolist()
        ([[[True, True]]], [-0.125, 0.125, 0.125, -0.125])

    Source: SSync (arXiv 2606.15527), Sec. 3.
    """
    options = BlockOptions(grid, merge_threshold, (n_bd, n_nbd, n_noise), sync_counts)
    return run_block(attention_logits, mask_logits, options, EAGER)


class Stages(NamedTuple):
    """The two steps that read whole maps and are made of arithmetic only.

    Args:
        labels: From probabilities ``(2, B, T, S, N)`` and an array of their shape to spoil, labels ``(2, B, T, N)``.
        losses: Mean scores ``(2,)`` of probabilities against the teachers' labels ``(2, B, T, N)``. Weights of that
            shape and the share of a patch ``(2,)`` select; gradients are left in the array to spoil.

    Example:
        >>> EAGER.labels(torch.tensor([0.2, 0.5, 0.5]).view(1, 1, 1, 3, 1), torch.empty(1, 1, 1, 3, 1)).item()
        1
    """

    labels: Callable[[Tensor, Tensor], Tensor]
    losses: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[bool, bool]], Tensor]


def run_block(attention: Tensor, masks: Tensor, options: BlockOptions, stages: Stages) -> BlockParts:
    """The block with these stages, with a graph where a gradient is wanted.

    Args:
        attention: ``(B, T, S, N)`` logits.
        masks: ``(B, T, S, N)`` logits.
        options: What is asked for.
        stages: Eager or compiled.

    Returns:
        Losses, labels, regions and statistics.

    Example:
        >>> maps = torch.zeros(2, 1, 1, 2, 4)
        >>> float(run_block(*maps, BlockOptions((2, 2)), EAGER).interior_loss)
        0.25
    """
    if torch.is_grad_enabled() and (attention.requires_grad or masks.requires_grad):
        return BlockParts(*_DirectBlock.apply(attention, masks, options, stages))
    with torch.no_grad():
        parts, _ = _forward(attention, masks, options, stages, (False, False))
    return parts


class _DirectBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, attention: Tensor, masks: Tensor, options: BlockOptions, stages: Stages
    ) -> tuple[Tensor | None, ...]:
        wanted = (ctx.needs_input_grad[1], ctx.needs_input_grad[0])
        parts, gradients = _forward(attention, masks, options, stages, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (masks.dtype, attention.dtype)
        # Not among the saved tensors: a host may write over its logits, which are not read again. Held until the first
        # backward pass.
        ctx.links = (masks, attention)
        outputs = parts[:-2]  # what is not derived here is no tensor
        ctx.mark_non_differentiable(*(value for value in outputs[2:] if value is not None))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        scaled: Iterable[Tensor | None]
        if not torch.is_grad_enabled():
            ctx.links = None
            scaled = map(_scale, ctx.saved_tensors, upstream, (None, None))
        elif ctx.links is not None:
            scaled = map(_Scaled.apply, ctx.saved_tensors, upstream, ctx.links)
        else:
            refuse_second_pass()
        by_masks, by_attention = (
            None if value is None else value.to(dtype) for value, dtype in zip(scaled, ctx.dtypes, strict=True)
        )
        return by_attention, by_masks, None, None


class _Scaled(torch.autograd.Function):
    """The gradient of one side, tied to its map, so that a derivative of it is refused and not taken for zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor | None, weight: Tensor | None, link: Tensor) -> Tensor | None:
        return _scale(gradient, weight, link)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        refuse_second_pass()


def _scale(gradient: Tensor | None, weight: Tensor | None, link: Tensor | None) -> Tensor | None:
    return None if gradient is None or weight is None else gradient * weight


def refuse_second_pass() -> NoReturn:
    """Say that the gradients of a fast path are constants.

    Raises:
        SSyncError: Always.

    Example:
        >>> refuse_second_pass()
        Traceback (most recent call last):
            ...
        ssync_pl.errors.SSyncError: Expected one backward pass through `ssync_loss`, but got a second one, through its \
gradients. Pass `path='plain'` for higher derivatives.
    """
    raise SSyncError(
        "Expected one backward pass through `ssync_loss`, but got a second one, through its gradients. "
        "Pass `path='plain'` for higher derivatives."
    )


def _forward(
    attention: Tensor,
    masks: Tensor,
    options: BlockOptions,
    stages: Stages,
    with_gradients: tuple[bool, bool],
) -> tuple[BlockParts, tuple[Tensor | None, Tensor | None]]:
    """Side 0 is the decoder's map, taught by the encoder at boundaries; side 1 is the encoder's."""
    grid, merge_threshold, regions, sync_counts = options
    batch, frames, slots, patches = attention.shape
    dtype = compute_dtype(attention.dtype)
    probs = torch.empty(2, *attention.shape, dtype=dtype, device=attention.device)
    # Views are taken all at once: on small maps a call costs as much as what it computes.
    for logits, out in zip((masks, attention), probs.unbind(), strict=True):
        torch.softmax(logits, 2, dtype=dtype, out=out)
    scratch = torch.empty_like(probs)
    spare = scratch.unbind()
    raw = stages.labels(probs, scratch)
    per_clip = raw.view(2, batch, frames * patches)
    one = torch.ones((), dtype=torch.int64, device=raw.device)
    areas = torch.zeros(2, batch, slots, dtype=torch.int64, device=raw.device)
    areas.scatter_add_(2, per_clip, one.expand_as(per_clip))
    decoder_areas, encoder_areas = areas.unbind()

    # In the teacher's order: the encoder's labels first, beside the decoder's probabilities.
    overlap = None
    teachers = per_clip.flip(0)
    if merge_threshold is None:
        winners = torch.arange(slots, device=raw.device).repeat(batch, 1)
    else:
        logits = attention.to(dtype)
        coverage = torch.gt(logits, logits.mean(dim=(1, 3), keepdim=True), out=spare[0])
        overlap = temporal_slot_iou(coverage, dtype)
        winners = component_winners(overlap, encoder_areas, merge_threshold)
        teachers = winners.expand(2, batch, slots).gather(2, teachers)
    teachers = teachers.view(raw.shape)

    flags, counts = _select(teachers, grid, slots, regions)
    entries = counts[:2].to(dtype) * slots
    if sync_counts:
        entries = mean_over_ranks(entries)
    share = torch.where(entries > 0, entries, 1.0).reciprocal()
    losses = stages.losses(probs, scratch, teachers, flags[:2].to(dtype), share, with_gradients)
    boundary_loss, interior_loss = losses.unbind()
    boundary, interior, _, _ = flags.view(torch.bool).unbind()
    raw_decoder, raw_encoder = raw.unbind()
    encoder, decoder = teachers.unbind()
    parts = BlockParts(
        boundary_loss.clone(),
        interior_loss.clone(),
        raw_encoder,
        raw_decoder,
        encoder,
        decoder,
        boundary,
        interior,
        winners,
        overlap,
        encoder_areas,
        decoder_areas,
        counts,
    )
    return parts, (spare[0] if with_gradients[0] else None, spare[1] if with_gradients[1] else None)


def _first_of_largest(probs: Tensor, scratch: Tensor) -> Tensor:
    """Labels ``(2, B, T, N)``: `hard_labels` in passes over whole maps, each of which is vectorised."""
    slots = probs.shape[3]
    torch.eq(probs, probs.amax(3, keepdim=True), out=scratch)
    # Each slot that is largest shows its index minus S, the others 0; where all is NaN, the last slot stands in.
    scratch.mul_(torch.arange(-slots, 0, dtype=probs.dtype, device=probs.device)[:, None])
    return scratch.amin(3).add_(slots).clamp_(max=slots - 1).long()


def _select(labels: Tensor, grid: tuple[int, int], slots: int, regions: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Flags ``(4, B, T, N)`` uint8, boundary, interior, both and agreement, and how many of each there are."""
    n_bd, n_nbd, n_noise = regions
    _, batch, frames, patches = labels.shape
    # Small integers: an eighth of the traffic of int64, many times over.
    small = labels.to(torch.uint8 if slots <= 256 else torch.int32)
    of_encoder, of_decoder = _differing(small.view(2 * batch, frames, *grid)).view(labels.shape).unbind()
    flags = torch.empty(4, batch, frames, patches, dtype=torch.uint8, device=labels.device)
    boundary, interior, both, agree = flags.unbind()
    torch.ge(of_encoder, n_bd, out=boundary)
    boundary.bitwise_and_(torch.le(of_encoder, NUM_NEIGHBOURS - n_noise, out=agree))
    torch.lt(of_decoder, n_nbd, out=interior)
    torch.bitwise_and(boundary, interior, out=both)
    torch.eq(*small.unbind(), out=agree)
    return flags, flags.flatten(1).sum(1)


def _differing(labels: Tensor) -> Tensor:
    """`count_differing_neighbours` of labels ``(V, T, H, W)``, as uint8.

    In a padded volume all neighbours in the frame lie at fixed distances in memory, so that they are one strided view.
    """
    clips, frames, height, width = labels.shape
    row, area = width + 2, (height + 2) * (width + 2)
    padded = labels.new_empty(clips, frames, height + 2, row)
    strides = padded.stride()
    padded.as_strided(labels.shape, strides, row + 1).copy_(labels)
    # Both borders at once: the first and the last row, then the first and the last column with the corners.
    ends = padded.as_strided((clips, frames, 2, width), (*strides[:2], (height + 1) * row, 1), 1)
    ends.copy_(padded.as_strided(ends.shape, (*strides[:2], (height - 1) * row, 1), row + 1))
    ends = padded.as_strided((clips, frames, height + 2, 2), (*strides[:3], width + 1))
    ends.copy_(padded.as_strided(ends.shape, (*strides[:3], width - 1), 1))
    # From the first inner patch to the last; what lies at the padding between them is dropped below.
    first, inner = row + 1, padded.numel() - 2 * (row + 1)
    around = padded.as_strided((3, 3, inner), (row, 1, 1))
    differs = torch.ne(around, padded.as_strided((inner,), (1,), first), out=labels.new_empty(3, 3, inner))
    count = torch.empty(padded.shape, dtype=torch.uint8, device=labels.device)
    torch.sum(differs, (0, 1), dtype=torch.uint8, out=count.as_strided((inner,), (1,), first))
    if frames > 1:
        shape, across = (clips, (frames - 1) * area), (frames * area, 1)
        before, after = padded.as_strided(shape, across), padded.as_strided(shape, across, area)
        step = torch.ne(before, after, out=labels.new_empty(shape)).to(torch.uint8)
        count.as_strided(shape, across).add_(step)
        count.as_strided(shape, across, area).add_(step)
    return count.as_strided(labels.shape, strides, row + 1).contiguous()


def _mean_scores(
    probs: Tensor,
    scratch: Tensor,
    teachers: Tensor,
    weight: Tensor,
    share: Tensor,
    with_gradients: tuple[bool, bool],
) -> Tensor:
    """Mean Brier scores ``(2,)`` over the selected patches; gradients by the logits are left in `scratch`.

    With p the probabilities, y the label and r = p - onehot(y), a patch's score is s = sum(r r). Since sum(p r) is
    s + r_y, its gradient is 2 p (r - s - r_y), which is -2 p_y s at y. Nothing large cancels in any of these.
    """
    index = teachers.unsqueeze(3)
    at_label = probs.gather(3, index)
    error = probs.scatter_(3, index, at_label - 1.0)
    score = torch.mul(error, error, out=scratch).sum(3, keepdim=True)
    losses = (score.squeeze(3) * weight).flatten(1).sum(1) * share
    if any(with_gradients):
        if not all(with_gradients):
            only = slice(0, 1) if with_gradients[0] else slice(1, 2)
            tensors = (index, at_label, error, score, weight, share, scratch)
            index, at_label, error, score, weight, share, scratch = (tensor[only] for tensor in tensors)
        scale = weight.mul_((2.0 * share).view(-1, 1, 1, 1)).unsqueeze(3)
        shift = (score + at_label).sub_(1.0).mul_(scale).neg_()
        torch.addcmul(shift, scale, error, out=scratch)
        scratch.mul_(error)
        scratch.scatter_(3, index, at_label.mul_(score).mul_(scale).neg_())
    return losses


EAGER = Stages(_first_of_largest, _mean_scores)
"""Without a compiler."""
