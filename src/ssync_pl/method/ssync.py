"""`ssync_loss`: from a pair of maps to both distillation losses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.method.compiled import compiled_block
from ssync_pl.method.direct import direct_block
from ssync_pl.method.distill import (
    LossKind,
    brier_per_patch,
    cross_entropy_per_patch,
    mean_over_ranks,
    selected_mean,
)
from ssync_pl.method.labels import (
    compute_dtype,
    hard_labels,
    slot_areas,
    slot_log_probabilities,
    slot_probabilities,
)
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.method.merging import MergeResult, merge_slots, relabel
from ssync_pl.method.parts import BlockParts, BlockStatistics
from ssync_pl.method.regions import (
    NUM_NEIGHBOURS,
    boundary_region,
    count_differing_neighbours,
    interior_region,
)
from ssync_pl.method.triton import fused_available, fused_block, kernels_hold

__all__ = ["BlockPath", "SSyncOutput", "check_options", "mean_over_ranks", "ssync_loss"]

# Private in every release so far; without it transforms raise an error of PyTorch's, and the plain path still serves.
_are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)

BlockPath = Literal["auto", "plain", "direct", "compiled", "fused"]


@dataclass(frozen=True, eq=False)
class SSyncOutput:
    """Everything that `ssync_loss` computed; only the three losses carry gradient.

    Args:
        loss: 0-dim, ``boundary_weight * boundary_loss + interior_weight * interior_loss``.
        boundary_loss: 0-dim, encoder → decoder, gradient into the decoder's map only.
        interior_loss: 0-dim, decoder → encoder, gradient into the encoder's map only.
        encoder_labels: ``(B, T, H, W)`` int64, merged labels of the encoder.
        decoder_labels: ``(B, T, H, W)`` int64, merged labels of the decoder.
        raw_encoder_labels: ``(B, T, H, W)`` int64, before merging.
        raw_decoder_labels: ``(B, T, H, W)`` int64, before merging.
        boundary: ``(B, T, H, W)`` bool, patches at which the encoder teaches.
        interior: ``(B, T, H, W)`` bool, patches at which the decoder teaches.
        winners: ``(B, S)`` int64, the slot whose label each slot takes.
        merged_slots: ``(B,)`` int64, number of slots that take another slot's label.
        slot_iou: ``(B, S, S)`` overlaps of coverage, None when merging is off.
        boundary_count: 0-dim, number of selected boundary patches.
        interior_count: 0-dim, number of selected interior patches.
        boundary_fraction: 0-dim, in [0, 1], of the valid patches.
        interior_fraction: 0-dim, in [0, 1], of the valid patches.
        overlap_fraction: 0-dim, in [0, 1], valid patches that are in both regions.
        agreement: 0-dim, in [0, 1], valid patches whose merged labels agree.
        used_encoder_slots: ``(B,)`` slots that win a patch of the encoder's map somewhere in the clip, unmerged.
        used_decoder_slots: ``(B,)`` the same for the decoder's map.

    Example:
        >>> d = torch.zeros(1, 1, 2, 4)
        >>> ssync_loss(SSyncMaps(attention_logits=d, mask_logits=d, grid=(2, 2))).boundary_count
        tensor(0.)
    """

    loss: Tensor
    boundary_loss: Tensor
    interior_loss: Tensor
    encoder_labels: Tensor
    decoder_labels: Tensor
    raw_encoder_labels: Tensor
    raw_decoder_labels: Tensor
    boundary: Tensor
    interior: Tensor
    winners: Tensor
    merged_slots: Tensor
    slot_iou: Tensor | None
    boundary_count: Tensor
    interior_count: Tensor
    boundary_fraction: Tensor
    interior_fraction: Tensor
    overlap_fraction: Tensor
    agreement: Tensor
    used_encoder_slots: Tensor
    used_decoder_slots: Tensor


def check_options(
    *, merge_threshold: float, n_bd: int, n_nbd: int, n_noise: int, temperature: float, loss: str
) -> None:
    """Refuse options of the method that are out of range.

    Args:
        merge_threshold: In [0, 1].
        n_bd: In [0, 10].
        n_nbd: In [1, 11].
        n_noise: In [0, 10].
        temperature: Above 0 and finite.
        loss: ``"brier"`` or ``"ce"``.

    Raises:
        ConfigError: An option is out of range; the message names it.

    Example:
        >>> check_options(merge_threshold=0.7, n_bd=1, n_nbd=1, n_noise=1, temperature=1.0, loss="brier")
    """
    if not 0.0 <= merge_threshold <= 1.0:
        raise ConfigError(
            f"Expected argument `merge_threshold` to be in [0, 1], but got {merge_threshold}. "
            "It is an overlap; published values are 0.6 to 0.9, and `merge=False` turns merging off."
        )
    for name, value, low in (("n_bd", n_bd, 0), ("n_nbd", n_nbd, 1), ("n_noise", n_noise, 0)):
        high = NUM_NEIGHBOURS + low
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(
                f"Expected argument `{name}` to be an integer in [{low}, {high}], but got {value!r}. "
                "It counts neighbours of a patch; published configurations use 1."
            )
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(
            f"Expected argument `temperature` to be above 0 and finite, but got {temperature}. Published runs use 1."
        )
    if loss not in ("brier", "ce"):
        raise ConfigError(
            f"Expected argument `loss` to be 'brier' or 'ce', but got {loss!r}. Published runs use 'brier'."
        )


def ssync_loss(
    maps: SSyncMaps,
    *,
    merge_threshold: float = 0.7,
    n_bd: int = 1,
    n_nbd: int = 1,
    n_noise: int = 1,
    temperature: float = 1.0,
    loss: LossKind = "brier",
    merge: bool | None = None,
    boundary_weight: float = 1.0,
    interior_weight: float = 1.0,
    sync_counts: bool = False,
    check_finite: bool = True,
    path: BlockPath = "auto",
) -> SSyncOutput:
    """Both losses of SSync, with everything that a log or a picture needs.

    The encoder's map teaches the decoder's at boundaries, the decoder's map teaches the encoder's in interiors; labels
    are merged over redundant slots first. Shapes never depend on data, the device is never waited for, and everything
    is computed in float32 (float64 for float64 maps), also under autocast.

    Args:
        maps: The host's two maps, ``(B, T, S, N)``.
        merge_threshold: Overlap above which slots are redundant, in [0, 1], strict.
        n_bd: A boundary patch has at least this many differing neighbours, in [0, 10].
        n_nbd: An interior patch has fewer differing neighbours than this, in [1, 11].
        n_noise: A boundary patch has at least this many agreeing neighbours, in [0, 10].
        temperature: Of the student's softmax, above 0.
        loss: ``"brier"`` (published: squared error on probabilities) or ``"ce"`` (cross-entropy).
        merge: Merge redundant slots' labels. None: when the encoder's logits are there. True without logits falls back
            on log-probabilities, with a warning.
        boundary_weight: Of the encoder → decoder loss in the total, at least 0.
        interior_weight: Of the decoder → encoder loss in the total, at least 0.
        sync_counts: Divide by the selected patches of all ranks instead of each rank's own, so that averaged gradients
            equal those of one process on the joined batch.
        check_finite: Refuse NaN maps where that costs no synchronisation: on CPU, outside of compiled graphs. Elsewhere
            NaN reaches the losses.
        path: How it is computed; the results are the same. ``"fused"``: GPU kernels. ``"direct"``: gradients formed
            beside the losses. ``"compiled"``: the same with steps fused by `torch.compile`, which takes up to a minute
            for each new shape; never taken by itself. ``"plain"``: autograd over the steps, for every option and higher
            derivatives. ``"auto"`` takes the first of fused, direct and plain that serves these maps and options. The
            fused path reads the logits again in the backward pass: do not write over them before.

    Returns:
        Losses, merged labels, regions, winners and statistics. An empty selection gives a loss of 0 with zero gradient.

    Raises:
        ConfigError: An option is out of range, or the path cannot serve these maps and options.
        ShapeError: A map on CPU holds NaN.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> d = torch.randn(1, 2, 3, 16, requires_grad=True)
        >>> a = torch.randn(1, 2, 3, 16, requires_grad=True)
        >>> out = ssync_loss(SSyncMaps(attention_logits=d, mask_logits=a, grid=(4, 4)))
        >>> out.loss.backward()
        >>> out.boundary.shape, bool(a.grad.any())
        (torch.Size([1, 2, 4, 4]), True)

    Source: SSync (arXiv 2606.15527), Sec. 3.
    """
    check_options(
        merge_threshold=merge_threshold, n_bd=n_bd, n_nbd=n_nbd, n_noise=n_noise, temperature=temperature, loss=loss
    )
    for name, weight in (("boundary_weight", boundary_weight), ("interior_weight", interior_weight)):
        if not 0.0 <= weight < float("inf"):
            raise ConfigError(f"Expected argument `{name}` to be finite and at least 0, but got {weight}.")
    with torch.autocast(device_type=maps.attention.device.type, enabled=False):
        merge = _resolve_merge(maps, merge)
        fast = _fast_path(maps, path, temperature, loss)
        if fast is not None:
            weights = (boundary_weight, interior_weight)
            parts = fast(
                maps.attention_logits,
                maps.mask_logits,
                maps.grid,
                merge_threshold=merge_threshold if merge else None,
                n_bd=n_bd,
                n_nbd=n_nbd,
                n_noise=n_noise,
                sync_counts=sync_counts,
                **({"weights": weights} if fast is fused_block else {}),
            )
            if not (check_finite and _is_nan(parts)):
                return _output_of(parts, maps, weights)
        return _ssync(
            maps,
            merge_threshold=merge_threshold,
            regions=(n_bd, n_nbd, n_noise),
            temperature=temperature,
            loss=loss,
            merge=merge,
            weights=(boundary_weight, interior_weight),
            sync_counts=sync_counts,
            check_finite=check_finite,
        )


def _fast_path(maps: SSyncMaps, path: str, temperature: float, loss: str) -> Callable[..., BlockParts] | None:
    """The function that serves these maps, or None for the plain path."""
    if path not in get_args(BlockPath):
        raise ConfigError(
            f"Expected argument `path` to be one of {get_args(BlockPath)}, but got {path!r}. Leave it out."
        )
    if path == "plain":
        return None
    d, a = maps.attention_logits, maps.mask_logits
    extras = (maps.attention_probs, maps.mask_probs, maps.slot_valid, maps.patch_valid, maps.frame_index)
    served = (
        d is not None
        and a is not None
        and all(extra is None for extra in extras)
        and temperature == 1.0
        and loss == "brier"
        and _is_ordinary(d, a)
    )
    fused = served and path in ("auto", "fused") and fused_available(d, a)  # type: ignore[arg-type]
    # What is asked for by name is not doubted.
    if fused and (path == "fused" or kernels_hold(d, a)):  # type: ignore[arg-type]
        return fused_block
    if served and path != "fused":
        return compiled_block if path == "compiled" else direct_block
    if path == "auto":
        return None
    raise ConfigError(
        f"Expected maps and options that the path '{path}' serves (logits on both sides, every slot and patch valid, "
        "loss 'brier', temperature 1; for 'fused' also a CUDA device with Triton and at most 64 slots), but they are "
        "others. Use path='auto'."
    )


def _is_ordinary(d: Tensor, a: Tensor) -> bool:
    """Whether these are values to compute with now, one backward pass at most behind them."""
    return (
        # Compiled graphs fuse the plain path by themselves; subclasses stand for traced or sharded values.
        not torch.compiler.is_compiling()
        and type(d.detach()) is Tensor
        and type(a.detach()) is Tensor
        and d.device.type in ("cpu", "cuda")
        and d.device == a.device
        and compute_dtype(d.dtype) == compute_dtype(a.dtype)
        # Transforms of functions and forward derivatives look through every step.
        and not _are_transforms_active()
        and forward_ad._current_level < 0
    )


def _is_nan(parts: BlockParts) -> bool:
    """Whether a map holds NaN, where it costs nothing to ask: a NaN anywhere reaches a loss."""
    if parts.boundary_loss.device.type != "cpu":
        return False
    return math.isnan(parts.boundary_loss.item() + parts.interior_loss.item())


def _output_of(parts: BlockParts, maps: SSyncMaps, weights: tuple[float, float]) -> SSyncOutput:
    batch, frames, _, patches = maps.shape
    height, width = maps.grid  # type: ignore[misc]
    volume = (batch, frames, height, width)
    total = float(batch * frames * patches)
    dtype = parts.boundary_loss.dtype
    boundary, interior = parts.boundary_loss, parts.interior_loss
    loss = parts.loss
    if loss is None:
        loss = boundary + interior if weights == (1.0, 1.0) else weights[0] * boundary + weights[1] * interior
    with torch.no_grad():
        statistics = parts.statistics or _statistics_of(parts, total, dtype)
        boundary_count, interior_count, _, _ = statistics.shares[0].unbind()
        boundary_share, interior_share, both_share, agreement = statistics.shares[1].unbind()
        winners = parts.winners.long()
        return SSyncOutput(
            loss=loss,
            boundary_loss=parts.boundary_loss,
            interior_loss=parts.interior_loss,
            encoder_labels=parts.encoder_labels.long().view(volume),
            decoder_labels=parts.decoder_labels.long().view(volume),
            raw_encoder_labels=parts.raw_encoder_labels.long().view(volume),
            raw_decoder_labels=parts.raw_decoder_labels.long().view(volume),
            boundary=parts.boundary.view(volume),
            interior=parts.interior.view(volume),
            winners=winners,
            merged_slots=statistics.merged_slots,
            slot_iou=parts.slot_iou,
            boundary_count=boundary_count,
            interior_count=interior_count,
            boundary_fraction=boundary_share,
            interior_fraction=interior_share,
            overlap_fraction=both_share,
            agreement=agreement,
            used_encoder_slots=statistics.used_slots[0],
            used_decoder_slots=statistics.used_slots[1],
        )


def _statistics_of(parts: BlockParts, total: float, dtype: torch.dtype) -> BlockStatistics:
    counts = parts.counts.to(dtype)
    slots = torch.arange(parts.winners.shape[1], device=parts.winners.device)
    used = [(areas > 0).sum(1).to(dtype) for areas in (parts.encoder_areas, parts.decoder_areas)]
    return BlockStatistics(torch.stack([counts, counts / total]), (parts.winners != slots).sum(1), torch.stack(used))


def _resolve_merge(maps: SSyncMaps, merge: bool | None) -> bool:
    if merge is None:
        return maps.attention_logits is not None
    if merge and maps.attention_logits is None and not torch.compiler.is_compiling():
        warnings.warn(
            "Merging was asked for, but only attention probabilities are there: coverage compares a slot's raw logit "
            "with its mean, and log-probabilities agree with that on about two thirds of the patches only. "
            "Pass `attention_logits`, or leave `merge` unset.",
            stacklevel=3,
        )
    return merge


def _ssync(
    maps: SSyncMaps,
    *,
    merge_threshold: float,
    regions: tuple[int, int, int],
    temperature: float,
    loss: LossKind,
    merge: bool,
    weights: tuple[float, float],
    sync_counts: bool,
    check_finite: bool,
) -> SSyncOutput:
    batch, frames, slots, _ = maps.shape
    height, width = maps.grid  # type: ignore[misc]
    volume = (batch, frames, height, width)
    attention = _Side(maps.attention_logits, maps.attention_probs, maps.slot_valid, maps.patch_valid)
    masks = _Side(maps.mask_logits, maps.mask_probs, maps.slot_valid, maps.patch_valid)
    p, q = attention.probabilities(), masks.probabilities()
    if check_finite:
        _refuse_nan(maps, p, q)

    with torch.no_grad():
        raw_e, raw_d = hard_labels(p), hard_labels(q)
        areas = slot_areas(raw_e, slots, maps.patch_valid)
        if merge:
            merged = merge_slots(attention.merging_logits(), areas, merge_threshold, maps.slot_valid, maps.patch_valid)
            e, d = relabel(raw_e, merged.winners), relabel(raw_d, merged.winners)
        else:
            identity = torch.arange(slots, device=p.device).expand(batch, slots)
            merged = MergeResult(identity, torch.zeros(batch, dtype=torch.int64, device=p.device), p.new_empty(0))
            e, d = raw_e, raw_d
        valid = None if maps.patch_valid is None else maps.patch_valid.view(volume)
        n_bd, n_nbd, n_noise = regions
        boundary = boundary_region(count_differing_neighbours(e.view(volume), valid, maps.frame_index), n_bd, n_noise)
        interior = interior_region(count_differing_neighbours(d.view(volume), valid, maps.frame_index), n_nbd)
        if valid is not None:
            boundary, interior = boundary & valid, interior & valid

        entries = torch.stack([_entries(region.flatten(2), maps, loss, p.dtype) for region in (boundary, interior)])
        if sync_counts:
            # Gradients are averaged over ranks afterwards, hence the mean and not the sum.
            entries = mean_over_ranks(entries)

    boundary_loss = _direction(masks, q, e, boundary.flatten(2), temperature, loss, entries[0])
    interior_loss = _direction(attention, p, d, interior.flatten(2), temperature, loss, entries[1])

    with torch.no_grad():
        total = float(e.numel()) if valid is None else valid.sum().clamp_min(1).to(p.dtype)
        agree = e == d
        if maps.patch_valid is not None:
            agree = agree & maps.patch_valid
        boundary_count, interior_count = boundary.sum().to(p.dtype), interior.sum().to(p.dtype)
    return SSyncOutput(
        loss=weights[0] * boundary_loss + weights[1] * interior_loss,
        boundary_loss=boundary_loss,
        interior_loss=interior_loss,
        encoder_labels=e.view(volume),
        decoder_labels=d.view(volume),
        raw_encoder_labels=raw_e.view(volume),
        raw_decoder_labels=raw_d.view(volume),
        boundary=boundary,
        interior=interior,
        winners=merged.winners,
        merged_slots=merged.merged_slots,
        slot_iou=merged.slot_iou if merge else None,
        boundary_count=boundary_count,
        interior_count=interior_count,
        boundary_fraction=boundary_count / total,
        interior_fraction=interior_count / total,
        overlap_fraction=(boundary & interior).sum().to(p.dtype) / total,
        agreement=agree.sum().to(p.dtype) / total,
        used_encoder_slots=(areas > 0).sum(1).to(p.dtype),
        used_decoder_slots=(slot_areas(raw_d, slots, maps.patch_valid) > 0).sum(1).to(p.dtype),
    )


class _Side:
    """One of the two maps in the precision of the computation."""

    def __init__(
        self, logits: Tensor | None, probs: Tensor | None, slot_valid: Tensor | None, patch_valid: Tensor | None
    ) -> None:
        self.logits = None if logits is None else logits.to(compute_dtype(logits.dtype))
        self.probs = None if probs is None else probs.to(compute_dtype(probs.dtype))
        self.slot_valid = slot_valid
        self.patch_valid = patch_valid

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        return slot_probabilities(self.logits, self.probs, temperature, self.slot_valid, self.patch_valid)

    def log_probabilities(self, temperature: float) -> Tensor:
        return slot_log_probabilities(self.logits, self.probs, temperature, self.slot_valid, self.patch_valid)

    def merging_logits(self) -> Tensor:
        if self.logits is not None:
            return self.logits
        return slot_log_probabilities(None, self.probs, 1.0, self.slot_valid, self.patch_valid)


def _entries(selected: Tensor, maps: SSyncMaps, loss: LossKind, dtype: torch.dtype) -> Tensor:
    """Number of terms of a mean: one a patch in cross-entropy, one for each slot of a patch in the Brier score."""
    if loss == "ce":
        return selected.sum().to(dtype)
    if maps.slot_valid is None:
        return selected.sum().to(dtype) * maps.shape[2]
    return (selected.sum((1, 2)) * maps.slot_valid.sum(1)).sum().to(dtype)


def _direction(
    student: _Side,
    probs: Tensor,
    teacher: Tensor,
    selected: Tensor,
    temperature: float,
    loss: LossKind,
    entries: Tensor,
) -> Tensor:
    if loss == "ce":
        per_patch = cross_entropy_per_patch(student.log_probabilities(temperature), teacher)
    else:
        per_patch = brier_per_patch(probs if temperature == 1.0 else student.probabilities(temperature), teacher)
    return selected_mean(per_patch, selected, entries)


def _refuse_nan(maps: SSyncMaps, p: Tensor, q: Tensor) -> None:
    # Only a plain tensor on CPU can be looked at for free; subclasses stand for traced or fake values.
    if p.device.type != "cpu" or torch.compiler.is_compiling() or type(p.detach()) is not Tensor:
        return
    for side, probs in (("attention", p), ("mask", q)):
        logits, given = getattr(maps, f"{side}_logits"), getattr(maps, f"{side}_probs")
        # A softmax carries a NaN of its input into the sum, so one cheap reduction stands for the whole map.
        bad = bool(probs.detach().sum().isnan())
        name = f"{side}_logits" if given is None else f"{side}_probs"
        if not bad and given is not None and logits is not None:
            seen = logits if maps.patch_valid is None else logits.masked_fill(~maps.patch_valid[:, :, None, :], 0.0)
            bad, name = bool(seen.detach().isnan().any()), f"{side}_logits"
        if bad:
            raise ShapeError(
                f"Expected argument `{name}` to be finite, but got NaN. The host has diverged, or a patch has no slot "
                "with a finite logit: mark such patches with `patch_valid`."
            )
