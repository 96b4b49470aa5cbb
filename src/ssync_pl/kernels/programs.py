"""Triton programs of the fused path. Shapes: B videos, T frames, S slots, N = H * W patches, row by row.

One program serves a block of patches of one frame, all of its slots at once, so that a map is read once a pass. Slots
are padded to `SLOTS`, a power of two of at least 16, which is what the matrix units take.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["count_regions", "link_slots", "read_maps", "sum_losses", "write_gradients"]


@triton.jit
def _tile(maps, frame_offset, slot, patch, stride_slot, stride_patch, num_slots, num_patches):
    """Logits (SLOTS, PATCHES) in float32: minus infinity where there is no slot, 0 where there is no patch."""
    places = maps + frame_offset + slot[:, None] * stride_slot + patch[None, :] * stride_patch
    there = (slot[:, None] < num_slots) & (patch[None, :] < num_patches)
    logits = tl.load(places, mask=there, other=0.0).to(tl.float32)
    return tl.where(slot[:, None] < num_slots, logits, float("-inf"))


@triton.jit
def _softmax(logits):
    weights = tl.exp(logits - tl.max(logits, axis=0)[None, :])
    return weights / tl.sum(weights, axis=0)[None, :]


@triton.jit
def _label(probs):
    """The first of the largest. A NaN wins nothing here, and reaches the loss all the same."""
    return tl.argmax(tl.where(probs == probs, probs, -1.0), axis=0, tie_break_left=True)


@triton.jit
def read_maps(
    attention,
    masks,
    mean,
    encoder_labels,
    decoder_labels,
    shared,
    encoder_areas,
    decoder_areas,
    num_frames,
    num_slots,
    num_patches,
    a_video,
    a_frame,
    a_slot,
    a_patch,
    m_video,
    m_frame,
    m_slot,
    m_patch,
    MERGE: tl.constexpr,
    SLOTS: tl.constexpr,
    PATCHES: tl.constexpr,
):
    """First pass: labels and areas of both maps, and the patches that each pair of slots covers together."""
    frame = tl.program_id(1).to(tl.int64)
    video, time = frame // num_frames, frame % num_frames
    slot = tl.arange(0, SLOTS)
    patch = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    inside = patch < num_patches
    logits = _tile(attention, video * a_video + time * a_frame, slot, patch, a_slot, a_patch, num_slots, num_patches)
    # Labels are those of the probabilities, where rounding may tie what differs as logits.
    label = _label(_softmax(logits))
    tl.store(encoder_labels + frame * num_patches + patch, label.to(tl.uint8), mask=inside)
    won = (label[None, :] == slot[:, None]) & inside[None, :]
    tl.atomic_add(encoder_areas + video * num_slots + slot, tl.sum(won.to(tl.int32), axis=1), mask=slot < num_slots)
    if MERGE:
        threshold = tl.load(mean + video * num_slots + slot, mask=slot < num_slots, other=0.0)
        covered = ((logits > threshold[:, None]) & inside[None, :]).to(tl.float16)
        # Sums of zeros and ones are exact, in whatever order the programs add them.
        together = tl.dot(covered, tl.trans(covered), out_dtype=tl.float32)
        places = shared + (frame * num_slots + slot[:, None]) * num_slots + slot[None, :]
        tl.atomic_add(places, together, mask=(slot[:, None] < num_slots) & (slot[None, :] < num_slots))
    logits = _tile(masks, video * m_video + time * m_frame, slot, patch, m_slot, m_patch, num_slots, num_patches)
    label = _label(_softmax(logits))
    tl.store(decoder_labels + frame * num_patches + patch, label.to(tl.uint8), mask=inside)
    won = (label[None, :] == slot[:, None]) & inside[None, :]
    tl.atomic_add(decoder_areas + video * num_slots + slot, tl.sum(won.to(tl.int32), axis=1), mask=slot < num_slots)


@triton.jit
def link_slots(
    shared,
    areas,
    overlap,
    winners,
    num_frames,
    num_slots,
    merge_threshold,
    SLOTS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
):
    """Graph step, one program a video: overlaps over time, connected components, the largest slot of each."""
    video = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    there = (slot[:, None] < num_slots) & (slot[None, :] < num_slots)
    total = tl.zeros((SLOTS, SLOTS), dtype=tl.float32)
    for time in range(num_frames):
        base = shared + (video * num_frames + time) * num_slots * num_slots
        together = tl.load(base + slot[:, None] * num_slots + slot[None, :], mask=there, other=0.0)
        # As the reference: two slots that cover nothing have an overlap of 0.
        area = tl.load(base + slot * num_slots + slot, mask=slot < num_slots, other=0.0) + 1e-6
        total += together / (area[:, None] + area[None, :] - together)
    mean = total / num_frames
    tl.store(overlap + (video * num_slots + slot[:, None]) * num_slots + slot[None, :], mean, mask=there)
    reach = ((mean > merge_threshold) & there) | (slot[:, None] == slot[None, :])
    for _ in range(DOUBLINGS):
        step = reach.to(tl.float16)
        reach = tl.dot(step, step, out_dtype=tl.float32) > 0.5
    area = tl.load(areas + video * num_slots + slot, mask=slot < num_slots, other=0)
    score = tl.where(reach & there, area[None, :], -1)
    winner = tl.argmax(score, axis=1, tie_break_left=True)
    tl.store(winners + video * num_slots + slot, winner.to(tl.int32), mask=slot < num_slots)


@triton.jit
def _merged(labels, winners, frame, place, video, num_slots, num_patches, inside):
    label = tl.load(labels + frame * num_patches + place, mask=inside, other=0).to(tl.int32)
    return tl.load(winners + video * num_slots + label, mask=inside, other=0)


@triton.jit
def _differing(
    labels, winners, own, frame, time, patch, video, num_frames, num_slots, num_patches, height, width, inside
):
    """Of the ten neighbours, those with another label; outside the clip, the patch at the clamped place stands in."""
    row, column = patch // width, patch % width
    count = tl.zeros_like(own)
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            if dy != 0 or dx != 0:
                y = tl.minimum(tl.maximum(row + dy, 0), height - 1)
                x = tl.minimum(tl.maximum(column + dx, 0), width - 1)
                other = _merged(labels, winners, frame, y * width + x, video, num_slots, num_patches, inside)
                count += (other != own).to(tl.int32)
    before = inside & (time > 0)
    other = _merged(labels, winners, frame - 1, patch, video, num_slots, num_patches, before)
    count += (before & (other != own)).to(tl.int32)
    after = inside & (time + 1 < num_frames)
    other = _merged(labels, winners, frame + 1, patch, video, num_slots, num_patches, after)
    return count + (after & (other != own)).to(tl.int32)


@triton.jit
def count_regions(
    encoder_labels,
    decoder_labels,
    winners,
    merged_encoder,
    merged_decoder,
    regions,
    counts,
    num_frames,
    num_slots,
    num_patches,
    height,
    width,
    n_bd,
    n_nbd,
    n_noise,
    PATCHES: tl.constexpr,
):
    """Second pass, over labels only: merged labels, boundary (bit 0) and interior (bit 1), and how many there are."""
    frame = tl.program_id(1).to(tl.int64)
    video, time = frame // num_frames, frame % num_frames
    patch = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    inside = patch < num_patches
    e = _merged(encoder_labels, winners, frame, patch, video, num_slots, num_patches, inside)
    d = _merged(decoder_labels, winners, frame, patch, video, num_slots, num_patches, inside)
    differ_e = _differing(
        encoder_labels, winners, e, frame, time, patch, video, num_frames, num_slots, num_patches, height, width, inside
    )
    differ_d = _differing(
        decoder_labels, winners, d, frame, time, patch, video, num_frames, num_slots, num_patches, height, width, inside
    )
    boundary = inside & (differ_e >= n_bd) & (10 - differ_e >= n_noise)
    interior = inside & (differ_d < n_nbd)
    place = frame * num_patches + patch
    tl.store(merged_encoder + place, e.to(tl.uint8), mask=inside)
    tl.store(merged_decoder + place, d.to(tl.uint8), mask=inside)
    tl.store(regions + place, boundary.to(tl.uint8) + 2 * interior.to(tl.uint8), mask=inside)
    tl.atomic_add(counts, tl.sum(boundary.to(tl.int32), axis=0))
    tl.atomic_add(counts + 1, tl.sum(interior.to(tl.int32), axis=0))
    tl.atomic_add(counts + 2, tl.sum((boundary & interior).to(tl.int32), axis=0))
    tl.atomic_add(counts + 3, tl.sum((inside & (e == d)).to(tl.int32), axis=0))


@triton.jit
def _brier(probs, hit):
    """Squared error to the one-hot label, summed over slots."""
    error = tl.where(hit, probs - 1.0, probs)
    return tl.sum(error * error, axis=0)


@triton.jit
def sum_losses(
    attention,
    masks,
    merged_encoder,
    merged_decoder,
    regions,
    partial,
    num_frames,
    num_slots,
    num_patches,
    a_video,
    a_frame,
    a_slot,
    a_patch,
    m_video,
    m_frame,
    m_slot,
    m_patch,
    SLOTS: tl.constexpr,
    PATCHES: tl.constexpr,
):
    """Third pass: sums of both losses, one pair a program, so that the total does not depend on who is first."""
    frame = tl.program_id(1).to(tl.int64)
    video, time = frame // num_frames, frame % num_frames
    slot = tl.arange(0, SLOTS)
    patch = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    inside = patch < num_patches
    place = frame * num_patches + patch
    region = tl.load(regions + place, mask=inside, other=0)
    label = tl.load(merged_encoder + place, mask=inside, other=0).to(tl.int32)
    q = _softmax(_tile(masks, video * m_video + time * m_frame, slot, patch, m_slot, m_patch, num_slots, num_patches))
    boundary = tl.sum(_brier(q, slot[:, None] == label[None, :]) * (region & 1).to(tl.float32), axis=0)
    label = tl.load(merged_decoder + place, mask=inside, other=0).to(tl.int32)
    p = _softmax(
        _tile(attention, video * a_video + time * a_frame, slot, patch, a_slot, a_patch, num_slots, num_patches)
    )
    interior = tl.sum(_brier(p, slot[:, None] == label[None, :]) * (region >> 1).to(tl.float32), axis=0)
    program = frame * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial + program * 2, boundary)
    tl.store(partial + program * 2 + 1, interior)


@triton.jit
def _gradient(probs, hit, factor):
    """Of the Brier score by the logits: with e = p - onehot, 2 p (e - sum(p e)), times a factor a patch."""
    error = tl.where(hit, probs - 1.0, probs)
    return 2.0 * factor[None, :] * probs * (error - tl.sum(probs * error, axis=0)[None, :])


@triton.jit
def write_gradients(
    attention,
    masks,
    merged_encoder,
    merged_decoder,
    regions,
    boundary_scale,
    interior_scale,
    attention_gradient,
    mask_gradient,
    num_frames,
    num_slots,
    num_patches,
    a_video,
    a_frame,
    a_slot,
    a_patch,
    m_video,
    m_frame,
    m_slot,
    m_patch,
    SLOTS: tl.constexpr,
    PATCHES: tl.constexpr,
):
    """Backward pass: gradients of both maps (contiguous), scaled by what came from above over the number of terms."""
    frame = tl.program_id(1).to(tl.int64)
    video, time = frame // num_frames, frame % num_frames
    slot = tl.arange(0, SLOTS)
    patch = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    inside = patch < num_patches
    there = (slot[:, None] < num_slots) & inside[None, :]
    place = frame * num_patches + patch
    out = (frame * num_slots + slot[:, None]) * num_patches + patch[None, :]
    region = tl.load(regions + place, mask=inside, other=0)
    label = tl.load(merged_encoder + place, mask=inside, other=0).to(tl.int32)
    q = _softmax(_tile(masks, video * m_video + time * m_frame, slot, patch, m_slot, m_patch, num_slots, num_patches))
    factor = (region & 1).to(tl.float32) * tl.load(boundary_scale)
    gradient = _gradient(q, slot[:, None] == label[None, :], factor)
    tl.store(mask_gradient + out, gradient.to(mask_gradient.dtype.element_ty), mask=there)
    label = tl.load(merged_decoder + place, mask=inside, other=0).to(tl.int32)
    p = _softmax(
        _tile(attention, video * a_video + time * a_frame, slot, patch, a_slot, a_patch, num_slots, num_patches)
    )
    factor = (region >> 1).to(tl.float32) * tl.load(interior_scale)
    gradient = _gradient(p, slot[:, None] == label[None, :], factor)
    tl.store(attention_gradient + out, gradient.to(attention_gradient.dtype.element_ty), mask=there)
