"""Triton programs of the fused path. Shapes: B videos, T frames, S slots, N = H * W patches, row by row.

Where a map is reduced over slots, one thread has all slots of its patches and goes through them in a loop
(`reductions`): no exchange between threads, and a map is fetched once, since further passes over the same few values
find them in the nearest cache. Where only some patches count, only these are fetched. Programs leave partial sums for
others to add up, so that no result depends on their order; on an H100 that is faster than adding to one place, too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssync_pl.method.triton.reductions import _UNROLLED, brier, error_of, label_of, largest_logit, total_weight

__all__ = ["finish", "label_maps", "link_slots", "share_coverage", "teach", "write_gradients"]

# What stands in the bytes of labels where a logit was NaN; there are at most 64 slots.
_NONE = tl.constexpr(255)


@triton.jit
def _label_side(
    maps,
    places,
    small,
    raw,
    sums,
    areas,
    frame,
    num_patches,
    stride_slot,
    stride_patch,
    SUM: tl.constexpr,
    SLOTS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    PATCHES: tl.constexpr,
    STEPS: tl.constexpr,
):
    slot = tl.arange(0, SLOTS)
    first = tl.program_id(0) * PATCHES * STEPS
    won = tl.zeros((SLOTS, PATCHES), dtype=tl.int32)
    seen = tl.zeros((SLOTS, PATCHES), dtype=tl.float32)
    for step in tl.static_range(STEPS):
        patch = first + step * PATCHES + tl.arange(0, PATCHES)
        inside = patch < num_patches
        label, none = label_of(maps + places + patch * stride_patch, stride_slot, inside, NUM_SLOTS)
        tl.store(small + frame * num_patches + patch, tl.where(none, _NONE, label).to(tl.uint8), mask=inside)
        tl.store(raw + frame * num_patches + patch, label.to(tl.int64), mask=inside)
        won += ((label[None, :] == slot[:, None]) & inside[None, :]).to(tl.int32)
        if SUM:
            tile = maps + places + slot[:, None] * stride_slot + patch[None, :] * stride_patch
            there = (slot[:, None] < NUM_SLOTS) & inside[None, :]
            seen += tl.load(tile, mask=there, other=0.0).to(tl.float32)
    part = (frame * tl.num_programs(0) + tl.program_id(0)) * NUM_SLOTS + slot
    tl.store(areas + part, tl.sum(won, axis=1), mask=slot < NUM_SLOTS)
    if SUM:
        tl.store(sums + part, tl.sum(seen, axis=1), mask=slot < NUM_SLOTS)


@triton.jit
def label_maps(
    attention,
    masks,
    small,
    raw,
    sums,
    areas,
    num_frames,
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
    NUM_SLOTS: tl.constexpr,
    PATCHES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Labels of both maps, as bytes and as long integers; patches that each slot wins; sums of the attention."""
    frame = tl.program_id(1).to(tl.int64)
    video, time = frame // num_frames, frame % num_frames
    if tl.program_id(2) == 0:
        _label_side(
            attention, video * a_video + time * a_frame, small, raw, sums, areas, frame, num_patches, a_slot, a_patch,
            MERGE, SLOTS, NUM_SLOTS, PATCHES, STEPS,
        )  # fmt: skip
    else:
        volume = tl.num_programs(1).to(tl.int64) * num_patches
        parts = tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * NUM_SLOTS
        _label_side(
            masks, video * m_video + time * m_frame, small + volume, raw + volume, sums, areas + parts, frame,
            num_patches, m_slot, m_patch, False, SLOTS, NUM_SLOTS, PATCHES, STEPS,
        )  # fmt: skip


@triton.jit
def share_coverage(
    attention,
    sums,
    shared,
    num_frames,
    num_parts,
    num_patches,
    a_video,
    a_frame,
    a_slot,
    a_patch,
    SLOTS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    PATCHES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Patches that each pair of slots covers together, of a part of a frame; `num_parts` of `sums` make a frame."""
    frame = tl.program_id(1).to(tl.int64)
    video, time = frame // num_frames, frame % num_frames
    slot, row = tl.arange(0, SLOTS), tl.arange(0, 16)
    num_rows = num_frames * num_parts
    sums += video * num_rows * NUM_SLOTS
    total = tl.zeros((SLOTS,), dtype=tl.float32)
    for start in range(0, num_rows, 16):
        there = (start + row[:, None] < num_rows) & (slot[None, :] < NUM_SLOTS)
        part = tl.load(sums + (start + row[:, None]) * NUM_SLOTS + slot[None, :], mask=there, other=0.0)
        total += tl.sum(part, axis=0)
    threshold = total / (num_frames * num_patches)
    first = tl.program_id(0) * PATCHES * STEPS
    together = tl.zeros((SLOTS, SLOTS), dtype=tl.float32)
    for step in tl.static_range(STEPS):
        patch = first + step * PATCHES + tl.arange(0, PATCHES)
        there = (slot[:, None] < NUM_SLOTS) & (patch[None, :] < num_patches)
        tile = attention + video * a_video + time * a_frame + slot[:, None] * a_slot + patch[None, :] * a_patch
        covered = ((tl.load(tile, mask=there, other=0.0).to(tl.float32) > threshold[:, None]) & there).to(tl.float16)
        # Sums of zeros and ones are exact.
        together += tl.dot(covered, tl.trans(covered), out_dtype=tl.float32)
    places = (frame * tl.num_programs(0) + tl.program_id(0)) * NUM_SLOTS * NUM_SLOTS
    there = (slot[:, None] < NUM_SLOTS) & (slot[None, :] < NUM_SLOTS)
    tl.store(shared + places + slot[:, None] * NUM_SLOTS + slot[None, :], together, mask=there)


@triton.jit
def _area(areas, num_rows, SLOTS: tl.constexpr, NUM_SLOTS: tl.constexpr):
    slot, row = tl.arange(0, SLOTS), tl.arange(0, 16)
    total = tl.zeros((SLOTS,), dtype=tl.int32)
    for start in range(0, num_rows, 16):
        there = (start + row[:, None] < num_rows) & (slot[None, :] < NUM_SLOTS)
        total += tl.sum(
            tl.load(areas + (start + row[:, None]) * NUM_SLOTS + slot[None, :], mask=there, other=0), axis=0
        )
    return total


@triton.jit
def _overlap(shared, num_frames, SLOTS: tl.constexpr, NUM_SLOTS: tl.constexpr, FRAMES: tl.constexpr, num_parts):
    """Mean over frames of the overlap of coverage; several frames at a time."""
    slot, time = tl.arange(0, SLOTS), tl.arange(0, FRAMES)
    is_slot = slot < NUM_SLOTS
    total = tl.zeros((SLOTS, SLOTS), dtype=tl.float32)
    for start in range(0, num_frames, FRAMES):
        now = start + time < num_frames
        there = now[:, None, None] & is_slot[None, :, None] & is_slot[None, None, :]
        pair = slot[None, :, None] * NUM_SLOTS + slot[None, None, :]
        base = shared + (start + time) * num_parts * NUM_SLOTS * NUM_SLOTS
        together = tl.zeros((FRAMES, SLOTS, SLOTS), dtype=tl.float32)
        alone = tl.zeros((FRAMES, SLOTS), dtype=tl.float32)
        for _ in range(num_parts):
            together += tl.load(base[:, None, None] + pair, mask=there, other=0.0)
            diagonal = base[:, None] + (slot * (NUM_SLOTS + 1))[None, :]
            alone += tl.load(diagonal, mask=now[:, None] & is_slot[None, :], other=0.0)
            base += NUM_SLOTS * NUM_SLOTS
        # As the reference: two slots that cover nothing have an overlap of 0.
        alone += 1e-6
        total += tl.sum(together / (alone[:, :, None] + alone[:, None, :] - together), axis=0)
    return total / num_frames


@triton.jit
def link_slots(
    shared,
    areas,
    overlap,
    winners,
    merged,
    used,
    total_areas,
    num_frames,
    shared_parts,
    area_parts,
    merge_threshold,
    MERGE: tl.constexpr,
    SLOTS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    FRAMES: tl.constexpr,
    DOUBLINGS: tl.constexpr,
):
    """Graph step, one program a video: overlaps over time, connected components, the largest slot of each."""
    video, num_videos = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    slot = tl.arange(0, SLOTS)
    is_slot = slot < NUM_SLOTS
    num_rows = num_frames * area_parts
    area = _area(areas + video * num_rows * NUM_SLOTS, num_rows, SLOTS, NUM_SLOTS)
    decoder_area = _area(areas + (num_videos + video) * num_rows * NUM_SLOTS, num_rows, SLOTS, NUM_SLOTS)
    tl.store(total_areas + video * NUM_SLOTS + slot, area, mask=is_slot)
    tl.store(total_areas + (num_videos + video) * NUM_SLOTS + slot, decoder_area, mask=is_slot)
    tl.store(used + video, tl.sum((area > 0).to(tl.float32), axis=0))
    tl.store(used + num_videos + video, tl.sum((decoder_area > 0).to(tl.float32), axis=0))
    winner = slot
    if MERGE:
        there = is_slot[:, None] & is_slot[None, :]
        base = shared + video * num_frames * shared_parts * NUM_SLOTS * NUM_SLOTS
        mean = _overlap(base, num_frames, SLOTS, NUM_SLOTS, FRAMES, shared_parts)
        tl.store(overlap + (video * NUM_SLOTS + slot[:, None]) * NUM_SLOTS + slot[None, :], mean, mask=there)
        reach = ((mean > merge_threshold) & there) | (slot[:, None] == slot[None, :])
        for _ in tl.static_range(DOUBLINGS):
            step = reach.to(tl.float16)
            reach = tl.dot(step, step, out_dtype=tl.float32) > 0.5
        winner = tl.argmax(tl.where(reach & there, area[None, :], -1), axis=1, tie_break_left=True)
    tl.store(winners + video * NUM_SLOTS + slot, winner.to(tl.int64), mask=is_slot)
    tl.store(merged + video, tl.sum((is_slot & (winner != slot)).to(tl.int64), axis=0))


@triton.jit
def _merged(labels, winners, place, inside):
    label = tl.load(labels + place, mask=inside, other=0).to(tl.int32)
    return tl.load(winners + tl.where(label == _NONE, 0, label), mask=inside, other=0).to(tl.int32)


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
def _total_score(score, labels, inside):
    """Sum over patches. A NaN reaches the loss from wherever it is in the map, as in the plain path."""
    none = tl.load(labels, mask=inside, other=0).to(tl.int32) == _NONE
    return tl.sum(tl.where(none, float("nan"), score), axis=0)


@triton.jit
def teach(
    attention,
    masks,
    small,
    winners,
    merged,
    targets,
    regions,
    sums,
    counts,
    num_frames,
    num_patches,
    height,
    width,
    n_bd,
    n_nbd,
    n_noise,
    a_video,
    a_frame,
    a_slot,
    a_patch,
    m_video,
    m_frame,
    m_slot,
    m_patch,
    NUM_SLOTS: tl.constexpr,
    PATCHES: tl.constexpr,
):
    """Merged labels (as long integers, and as bytes in `targets`), regions, a program's share of losses and counts."""
    frame = tl.program_id(1).to(tl.int64)
    volume = tl.num_programs(1).to(tl.int64) * num_patches
    video, time = frame // num_frames, frame % num_frames
    patch = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    inside = patch < num_patches
    of_frame = frame * num_patches
    winners += video * NUM_SLOTS
    encoder, decoder = small + of_frame, small + volume + of_frame
    e = _merged(encoder, winners, patch, inside)
    d = _merged(decoder, winners, patch, inside)
    differ = _differing(encoder, winners, e, time, patch, num_frames, num_patches, height, width, inside)
    boundary = inside & (differ >= n_bd) & (10 - differ >= n_noise)
    differ = _differing(decoder, winners, d, time, patch, num_frames, num_patches, height, width, inside)
    interior = inside & (differ < n_nbd)
    tl.store(merged + of_frame + patch, e.to(tl.int64), mask=inside)
    tl.store(merged + volume + of_frame + patch, d.to(tl.int64), mask=inside)
    tl.store(targets + of_frame + patch, e.to(tl.uint8), mask=inside)
    tl.store(targets + volume + of_frame + patch, d.to(tl.uint8), mask=inside)
    tl.store(regions + of_frame + patch, boundary.to(tl.int8), mask=inside)
    tl.store(regions + volume + of_frame + patch, interior.to(tl.int8), mask=inside)
    program = frame * tl.num_programs(0) + tl.program_id(0)
    places = masks + video * m_video + time * m_frame + patch * m_patch
    score = brier(places, m_slot, e, boundary, NUM_SLOTS)
    tl.store(sums + program * 2, _total_score(score, decoder + patch, inside))
    places = attention + video * a_video + time * a_frame + patch * a_patch
    score = brier(places, a_slot, d, interior, NUM_SLOTS)
    tl.store(sums + program * 2 + 1, _total_score(score, encoder + patch, inside))
    tl.store(counts + program * 4, tl.sum(boundary.to(tl.int32), axis=0))
    tl.store(counts + program * 4 + 1, tl.sum(interior.to(tl.int32), axis=0))
    tl.store(counts + program * 4 + 2, tl.sum((boundary & interior).to(tl.int32), axis=0))
    tl.store(counts + program * 4 + 3, tl.sum((inside & (e == d)).to(tl.int32), axis=0))


@triton.jit
def finish(
    sums,
    counts,
    total,
    boundary,
    interior,
    found,
    entries,
    totals,
    shares,
    boundary_weight,
    interior_weight,
    num_programs,
    num_slots,
    size,
    PROGRAMS: tl.constexpr,
):
    """One program adds up what those of `teach` found.

    `total`, `boundary`, `interior`: the losses; `found`: both sums. `shares`: counts, and counts over all patches.
    """
    program, which = tl.arange(0, PROGRAMS), tl.arange(0, 4)
    at_boundary, inside = tl.zeros((PROGRAMS,), dtype=tl.float32), tl.zeros((PROGRAMS,), dtype=tl.float32)
    number = tl.zeros((PROGRAMS, 4), dtype=tl.int32)
    for start in range(0, num_programs, PROGRAMS):
        row = start + program
        there = row < num_programs
        row = row.to(tl.int64)
        at_boundary += tl.load(sums + row * 2, mask=there, other=0.0)
        inside += tl.load(sums + row * 2 + 1, mask=there, other=0.0)
        number += tl.load(counts + row[:, None] * 4 + which[None, :], mask=there[:, None], other=0)
    boundary_sum, interior_sum, number = tl.sum(at_boundary, axis=0), tl.sum(inside, axis=0), tl.sum(number, axis=0)
    share = number.to(tl.float32)
    tl.store(totals + which, number)
    tl.store(shares + which, share)
    tl.store(shares + 4 + which, share / size)
    boundary_terms = tl.sum(tl.where(which == 0, share, 0.0), axis=0) * num_slots
    interior_terms = tl.sum(tl.where(which == 1, share, 0.0), axis=0) * num_slots
    boundary_terms = tl.where(boundary_terms > 0, boundary_terms, 1.0)
    interior_terms = tl.where(interior_terms > 0, interior_terms, 1.0)
    tl.store(entries, boundary_terms)
    tl.store(entries + 1, interior_terms)
    boundary_loss, interior_loss = boundary_sum / boundary_terms, interior_sum / interior_terms
    tl.store(total, boundary_weight * boundary_loss + interior_weight * interior_loss)
    tl.store(boundary, boundary_loss)
    tl.store(interior, interior_loss)
    tl.store(found, boundary_sum)
    tl.store(found + 1, interior_sum)


@triton.jit
def _gradient_side(
    places, out, label, region, scale, stride_slot, num_patches, inside, NUM_SLOTS: tl.constexpr
):  # fmt: skip
    """Of the Brier score by the logits: with e = p - onehot, 2 p (e - sum(p e)), times a scale; 0 outside a region."""
    selected = inside & (region != 0)
    largest = largest_logit(places, stride_slot, selected, NUM_SLOTS)
    factor = 1.0 / total_weight(places, stride_slot, selected, largest, NUM_SLOTS)
    pull = tl.zeros_like(factor)
    scale = tl.where(selected, 2.0 * scale, 0.0)
    if NUM_SLOTS <= _UNROLLED:
        for slot in tl.static_range(NUM_SLOTS):
            probability, error = error_of(places, slot, stride_slot, selected, largest, factor, label)
            pull += probability * error
        for slot in tl.static_range(NUM_SLOTS):
            probability, error = error_of(places, slot, stride_slot, selected, largest, factor, label)
            gradient = scale * probability * (error - pull)
            tl.store(out + slot * num_patches, gradient.to(out.dtype.element_ty), mask=inside)
    else:
        for slot in range(NUM_SLOTS):
            probability, error = error_of(places, slot, stride_slot, selected, largest, factor, label)
            pull += probability * error
        for slot in range(NUM_SLOTS):
            probability, error = error_of(places, slot, stride_slot, selected, largest, factor, label)
            gradient = scale * probability * (error - pull)
            tl.store(out + slot * num_patches, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit
def write_gradients(
    attention,
    masks,
    targets,
    regions,
    by_total,
    by_boundary,
    by_interior,
    entries,
    attention_gradient,
    mask_gradient,
    total_to_boundary,
    total_to_interior,
    has_boundary,
    has_interior,
    num_frames,
    num_patches,
    a_video,
    a_frame,
    a_slot,
    a_patch,
    m_video,
    m_frame,
    m_slot,
    m_patch,
    FIRST: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    PATCHES: tl.constexpr,
):
    """Backward pass: a side's gradient (contiguous), scaled by what came from above over the number of terms."""
    frame = tl.program_id(1).to(tl.int64)
    volume = tl.num_programs(1).to(tl.int64) * num_patches
    video, time = frame // num_frames, frame % num_frames
    patch = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    inside = patch < num_patches
    place = frame * num_patches + patch
    out = frame * NUM_SLOTS * num_patches + patch
    total = tl.load(by_total).to(tl.float32)
    if tl.program_id(2) + FIRST == 0:
        # The decoder's map learns from the encoder's labels at boundaries.
        scale = total_to_boundary * total + has_boundary * tl.load(by_boundary).to(tl.float32)
        label = tl.load(targets + place, mask=inside, other=0).to(tl.int32)
        region = tl.load(regions + place, mask=inside, other=0)
        places = masks + video * m_video + time * m_frame + patch * m_patch
        _gradient_side(
            places, mask_gradient + out, label, region, scale / tl.load(entries), m_slot, num_patches, inside, NUM_SLOTS
        )
    else:
        scale = total_to_interior * total + has_interior * tl.load(by_interior).to(tl.float32)
        label = tl.load(targets + volume + place, mask=inside, other=0).to(tl.int32)
        region = tl.load(regions + volume + place, mask=inside, other=0)
        places = attention + video * a_video + time * a_frame + patch * a_patch
        _gradient_side(
            places, attention_gradient + out, label, region, scale / tl.load(entries + 1), a_slot, num_patches, inside,
            NUM_SLOTS,
        )  # fmt: skip
