"""Triton programs of the method. Shapes: B videos, T frames, S slots, N = H * W patches, row by row.

A program takes a tile of all slots and some patches of one frame (an image). A tile has about as many values for any S
and is laid out patches first, so that a thread holds all or most slots of its patches and reductions over slots stay
within it. Programs leave partial sums for PyTorch to add up, so that no result depends on their order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logits(maps, slot, patch, s_slot, s_patch, there):
    places = maps + slot[:, None] * s_slot + patch[None, :] * s_patch
    return tl.load(places, mask=there, other=float("-inf")).to(tl.float32)


@triton.jit
def _softmax(logits):
    """Probabilities over slots; NaN in a patch with a NaN, or with no finite logit."""
    weight = tl.exp(logits - tl.max(logits, axis=0)[None, :])
    return weight / tl.sum(weight, axis=0)[None, :]


@triton.jit
def _frame(image, num_frames, s_video, s_frame):
    return (image // num_frames) * s_video + (image % num_frames) * s_frame


@triton.jit
def label_map(
    maps, labels, sums, areas, num_frames, num_patches, s_video, s_frame, s_slot, s_patch,
    SUM: tl.constexpr, SLOTS: tl.constexpr, NUM_SLOTS: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    """Labels of a map; a program's share of the patches that each slot wins, and of its sum of logits."""
    image = tl.program_id(1).to(tl.int64)
    slot, patch = tl.arange(0, SLOTS), tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    inside = patch < num_patches
    there = (slot < NUM_SLOTS)[:, None] & inside[None, :]
    logits = _logits(maps + _frame(image, num_frames, s_video, s_frame), slot, patch, s_slot, s_patch, there)
    probability = _softmax(logits)
    # The first of the largest probabilities, where rounding may tie what differs as logits; slot 0 where all are NaN.
    probability = tl.where(probability == probability, probability, 0.0)
    label = tl.argmax(probability, axis=0, tie_break_left=True)
    tl.store(labels + image * num_patches + patch, label.to(tl.int64), mask=inside)
    place = (image * tl.num_programs(0) + tl.program_id(0)) * NUM_SLOTS + slot
    won = (label[None, :] == slot[:, None]) & inside[None, :]
    tl.store(areas + place, tl.sum(won.to(tl.int32), axis=1), mask=slot < NUM_SLOTS)
    if SUM:
        tl.store(sums + place, tl.sum(tl.where(there, logits, 0.0), axis=1), mask=slot < NUM_SLOTS)


@triton.jit
def share_coverage(
    maps, threshold, iou, num_frames, num_patches, s_video, s_frame, s_slot, s_patch,
    SLOTS: tl.constexpr, NUM_SLOTS: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    """Intersection over union of what each pair of slots covers in one frame."""
    image = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    is_slot = slot < NUM_SLOTS
    maps += _frame(image, num_frames, s_video, s_frame)
    least = tl.load(threshold + (image // num_frames) * NUM_SLOTS + slot, mask=is_slot, other=0.0)
    together = tl.zeros((SLOTS, SLOTS), dtype=tl.float32)
    for start in range(0, num_patches, PATCHES):
        patch = start + tl.arange(0, PATCHES)
        there = is_slot[:, None] & (patch < num_patches)[None, :]
        covered = (_logits(maps, slot, patch, s_slot, s_patch, there) > least[:, None]).to(tl.float16)
        # Sums of zeros and ones are exact.
        together += tl.dot(covered, tl.trans(covered), out_dtype=tl.float32)
    same = slot[:, None] == slot[None, :]
    # As the reference: two slots that cover nothing have an overlap of 0.
    area = tl.sum(tl.where(same, together, 0.0), axis=0) + 1e-6
    area_of_row = tl.sum(tl.where(same, together, 0.0), axis=1) + 1e-6
    union = area_of_row[:, None] + area[None, :] - together
    places = iou + (image * NUM_SLOTS + slot[:, None]) * NUM_SLOTS + slot[None, :]
    tl.store(places, together / union, mask=is_slot[:, None] & is_slot[None, :])


@triton.jit
def link_slots(
    overlap, areas, winners, merged, merge_threshold,
    SLOTS: tl.constexpr, NUM_SLOTS: tl.constexpr, DOUBLINGS: tl.constexpr,
):  # fmt: skip
    """Graph step, one program per video: connected components, and the largest slot of each."""
    video = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    is_slot = slot < NUM_SLOTS
    there = is_slot[:, None] & is_slot[None, :]
    places = overlap + (video * NUM_SLOTS + slot[:, None]) * NUM_SLOTS + slot[None, :]
    linked = tl.load(places, mask=there, other=0.0) > merge_threshold
    reach = (linked & there) | (slot[:, None] == slot[None, :])
    for _ in tl.static_range(DOUBLINGS):
        step = reach.to(tl.float16)
        reach = tl.dot(step, step, out_dtype=tl.float32) > 0.5
    area = tl.load(areas + video * NUM_SLOTS + slot, mask=is_slot, other=0)
    winner = tl.argmax(tl.where(reach & there, area[None, :], -1), axis=1, tie_break_left=True)
    tl.store(winners + video * NUM_SLOTS + slot, winner.to(tl.int64), mask=is_slot)
    tl.store(merged + video, tl.sum((is_slot & (winner != slot)).to(tl.int64), axis=0))


@triton.jit
def _merged(labels, winners, place, inside):
    return tl.load(winners + tl.load(labels + place, mask=inside, other=0), mask=inside, other=0).to(tl.int32)


@triton.jit
def _differing(labels, winners, own, time, patch, num_frames, num_patches, height, width, inside):
    """Of the ten neighbours, those with another label; outside the clip, the patch at the clamped place stands in."""
    row, column = patch // width, patch % width
    count = tl.zeros_like(own)
    for dy in tl.static_range(-1, 2):
        for dx in tl.static_range(-1, 2):
            if dy != 0 or dx != 0:
                y = tl.minimum(tl.maximum(row + dy, 0), height - 1)
                x = tl.minimum(tl.maximum(column + dx, 0), width - 1)
                count += (_merged(labels, winners, y * width + x, inside) != own).to(tl.int32)
    before = inside & (time > 0)
    count += (before & (_merged(labels, winners, patch - num_patches, before) != own)).to(tl.int32)
    after = inside & (time + 1 < num_frames)
    return count + (after & (_merged(labels, winners, patch + num_patches, after) != own)).to(tl.int32)


@triton.jit
def _score(maps, slot, patch, s_slot, s_patch, there, label, selected):
    """Sum of squared errors over the selected patches of a tile; a product, so that a NaN anywhere reaches it."""
    probability = _softmax(_logits(maps, slot, patch, s_slot, s_patch, there))
    error = tl.where(there, probability - (label[None, :] == slot[:, None]).to(tl.float32), 0.0)
    return tl.sum(tl.sum(error * error, axis=0) * selected.to(tl.float32), axis=0)


@triton.jit
def teach(
    attention, masks, raw, winners, merged, regions, scores, counts, num_frames, num_patches, height, width,
    n_bd, n_nbd, n_noise, a_video, a_frame, a_slot, a_patch, m_video, m_frame, m_slot, m_patch,
    SLOTS: tl.constexpr, NUM_SLOTS: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    """Merged labels, regions, and a program's share of both losses and of the counts; the encoder's half is first."""
    image = tl.program_id(1).to(tl.int64)
    volume = tl.num_programs(1).to(tl.int64) * num_patches
    time = image % num_frames
    slot, patch = tl.arange(0, SLOTS), tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    inside = patch < num_patches
    there = (slot < NUM_SLOTS)[:, None] & inside[None, :]
    winners += (image // num_frames) * NUM_SLOTS
    raw += image * num_patches
    e = _merged(raw, winners, patch, inside)
    differ = _differing(raw, winners, e, time, patch, num_frames, num_patches, height, width, inside)
    boundary = inside & (differ >= n_bd) & (10 - differ >= n_noise)
    d = _merged(raw + volume, winners, patch, inside)
    differ = _differing(raw + volume, winners, d, time, patch, num_frames, num_patches, height, width, inside)
    interior = inside & (differ < n_nbd)
    place = image * num_patches + patch
    tl.store(merged + place, e.to(tl.int64), mask=inside)
    tl.store(merged + volume + place, d.to(tl.int64), mask=inside)
    tl.store(regions + place, boundary.to(tl.int8), mask=inside)
    tl.store(regions + volume + place, interior.to(tl.int8), mask=inside)
    program = image * tl.num_programs(0) + tl.program_id(0)
    masks += _frame(image, num_frames, m_video, m_frame)
    attention += _frame(image, num_frames, a_video, a_frame)
    tl.store(scores + program * 2, _score(masks, slot, patch, m_slot, m_patch, there, e, boundary))
    tl.store(scores + program * 2 + 1, _score(attention, slot, patch, a_slot, a_patch, there, d, interior))
    tl.store(counts + program * 4, tl.sum(boundary.to(tl.int32), axis=0))
    tl.store(counts + program * 4 + 1, tl.sum(interior.to(tl.int32), axis=0))
    tl.store(counts + program * 4 + 2, tl.sum((boundary & interior).to(tl.int32), axis=0))
    tl.store(counts + program * 4 + 3, tl.sum((inside & (e == d)).to(tl.int32), axis=0))


@triton.jit
def write_gradient(
    maps, labels, regions, scale, gradient, num_frames, num_patches, s_video, s_frame, s_slot, s_patch,
    SLOTS: tl.constexpr, NUM_SLOTS: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    """Of the Brier score by the logits: with e = p - onehot, p (e - sum(p e)), times a scale; contiguous."""
    image = tl.program_id(1).to(tl.int64)
    slot, patch = tl.arange(0, SLOTS), tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    inside = patch < num_patches
    there = (slot < NUM_SLOTS)[:, None] & inside[None, :]
    logits = _logits(maps + _frame(image, num_frames, s_video, s_frame), slot, patch, s_slot, s_patch, there)
    label = tl.load(labels + image * num_patches + patch, mask=inside, other=0).to(tl.int32)
    region = tl.load(regions + image * num_patches + patch, mask=inside, other=0).to(tl.float32)
    probability = _softmax(logits)
    error = probability - (label[None, :] == slot[:, None]).to(tl.float32)
    pull = tl.sum(probability * error, axis=0)
    value = probability * (error - pull[None, :]) * (tl.load(scale).to(tl.float32) * region)[None, :]
    places = gradient + (image * NUM_SLOTS + slot[:, None]) * num_patches + patch[None, :]
    tl.store(places, value.to(gradient.dtype.element_ty), mask=there)
