"""What one thread makes of the logits of all slots of its patches, in loops over slots."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["brier", "error_of", "label_of", "largest_logit", "total_weight"]

# Up to so many slots, loops over them are unrolled; beyond, that would take minutes to compile.
_UNROLLED = tl.constexpr(16)


@triton.jit
def _logit(places, slot, stride_slot, inside):
    return tl.load(places + slot * stride_slot, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _weight(places, slot, stride_slot, inside, largest):
    """Numerator of a slot's probability."""
    return tl.exp(_logit(places, slot, stride_slot, inside) - largest)


@triton.jit
def largest_logit(places, stride_slot, inside, NUM_SLOTS: tl.constexpr):
    """The largest logit of a patch, without which exponentials would overflow."""
    largest = _logit(places, 0, stride_slot, inside)
    if NUM_SLOTS <= _UNROLLED:
        for slot in tl.static_range(1, NUM_SLOTS):
            largest = tl.maximum(largest, _logit(places, slot, stride_slot, inside))
    else:
        for slot in range(1, NUM_SLOTS):
            largest = tl.maximum(largest, _logit(places, slot, stride_slot, inside))
    return largest


@triton.jit
def total_weight(places, stride_slot, inside, largest, NUM_SLOTS: tl.constexpr):
    """Denominator of a patch's probabilities."""
    total = _weight(places, 0, stride_slot, inside, largest)
    if NUM_SLOTS <= _UNROLLED:
        for slot in tl.static_range(1, NUM_SLOTS):
            total += _weight(places, slot, stride_slot, inside, largest)
    else:
        for slot in range(1, NUM_SLOTS):
            total += _weight(places, slot, stride_slot, inside, largest)
    return total


@triton.jit
def _better(best, label, slot, probability):
    higher = probability > best
    return tl.where(higher, probability, best), tl.where(higher, slot, label)


@triton.jit
def label_of(places, stride_slot, inside, NUM_SLOTS: tl.constexpr):
    """The first of the largest probabilities, where rounding may tie what differs as logits, and where none is."""
    largest = largest_logit(places, stride_slot, inside, NUM_SLOTS)
    total = total_weight(places, stride_slot, inside, largest, NUM_SLOTS)
    best = _weight(places, 0, stride_slot, inside, largest) / total
    best = tl.where(best == best, best, -1.0)
    label = tl.zeros_like(best).to(tl.int32)
    if NUM_SLOTS <= _UNROLLED:
        for slot in tl.static_range(1, NUM_SLOTS):
            best, label = _better(best, label, slot, _weight(places, slot, stride_slot, inside, largest) / total)
    else:
        for slot in range(1, NUM_SLOTS):
            best, label = _better(best, label, slot, _weight(places, slot, stride_slot, inside, largest) / total)
    return label, total != total


@triton.jit
def error_of(places, slot, stride_slot, inside, largest, factor, label):
    """Probability of a slot, and what it lacks to the one-hot label."""
    probability = _weight(places, slot, stride_slot, inside, largest) * factor
    return probability, probability - (label == slot).to(tl.float32)


@triton.jit
def brier(places, stride_slot, label, selected, NUM_SLOTS: tl.constexpr):
    """Squared error of a patch's probabilities to the one-hot label, summed over slots; 0 where it does not count."""
    largest = largest_logit(places, stride_slot, selected, NUM_SLOTS)
    factor = 1.0 / total_weight(places, stride_slot, selected, largest, NUM_SLOTS)
    score = tl.zeros_like(factor)
    if NUM_SLOTS <= _UNROLLED:
        for slot in tl.static_range(NUM_SLOTS):
            _, error = error_of(places, slot, stride_slot, selected, largest, factor, label)
            score += error * error
    else:
        for slot in range(NUM_SLOTS):
            _, error = error_of(places, slot, stride_slot, selected, largest, factor, label)
            score += error * error
    return tl.where(selected, score, 0.0)
