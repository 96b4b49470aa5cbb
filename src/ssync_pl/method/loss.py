"""`ssync_loss`: from a pair of maps to both distillation losses."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ssync_pl.errors import ConfigError, ShapeError, require
from ssync_pl.method.labels import compute_dtype, hard_labels, slot_areas, slot_logits, slot_probabilities
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.method.merging import MergeResult, MergeRule, merge_by_soft_iou, merge_slots, relabel
from ssync_pl.method.regions import NUM_NEIGHBOURS, boundary_region, count_differing_neighbours, interior_region
from ssync_pl.method.triton import fused_block, why_unserved

LossKind = Literal["brier", "ce"]
Backend = Literal["auto", "torch", "triton"]
_LOSSES, _BACKENDS, _RULES = map(get_args, (LossKind, Backend, MergeRule))  # torch 2.4 compiles no `get_args`


@dataclass(frozen=True, eq=False)
class SSyncOutput:
    """Everything that `ssync_loss` computed; only the three losses carry gradient.

    Counts and fractions are 0-dim; fractions are shares of the valid patches, in [0, 1]. Slots in use are those that
    win a patch somewhere in the clip, before merging.

    Attributes:
        loss: 0-dim, ``boundary_weight * boundary_loss + interior_weight * interior_loss``.
        boundary_loss: 0-dim, encoder → decoder, gradient into the decoder's map only.
        interior_loss: 0-dim, decoder → encoder, gradient into the encoder's map only.
        encoder_labels: ``(B, T, H, W)`` int64, merged labels.
        decoder_labels: ``(B, T, H, W)`` int64, merged labels.
        raw_encoder_labels: ``(B, T, H, W)`` int64, before merging.
        raw_decoder_labels: ``(B, T, H, W)`` int64, before merging.
        boundary: ``(B, T, H, W)`` bool, patches at which the encoder teaches.
        interior: ``(B, T, H, W)`` bool, patches at which the decoder teaches.
        winners: ``(B, S)`` int64, the slot whose label each slot takes.
        merged_slots: ``(B,)`` int64, number of slots that take another slot's label.
        slot_iou: ``(B, S, S)`` overlaps of coverage, None when merging is off.
        boundary_count: Patches at which the encoder teaches.
        interior_count: Patches at which the decoder teaches.
        boundary_fraction: Share of the patches at which the encoder teaches.
        interior_fraction: Share of the patches at which the decoder teaches.
        overlap_fraction: Share of the patches that are in both regions.
        agreement: Share of the patches whose merged labels agree.
        used_encoder_slots: ``(B,)`` slots in use in the encoder's map.
        used_decoder_slots: ``(B,)`` slots in use in the decoder's map.
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
    """Refuses options of `ssync_loss` that are out of range, by `ConfigError`."""
    advice = "It is an overlap; published values are 0.6 to 0.9, and `merge=False` turns merging off."
    require(0.0 <= merge_threshold <= 1.0, "argument `merge_threshold` to be in [0, 1]", merge_threshold, advice=advice)
    advice = "It counts neighbours of a patch; published configurations use 1."
    for name, value, low in (("n_bd", n_bd, 0), ("n_nbd", n_nbd, 1), ("n_noise", n_noise, 0)):
        high = NUM_NEIGHBOURS + low
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        got = value if fits else repr(value)
        require(fits, f"argument `{name}` to be an integer in [{low}, {high}]", got, advice=advice)
    require(0.0 < temperature < math.inf, "argument `temperature` to be above 0 and finite", temperature)
    require(loss in _LOSSES, "argument `loss` to be 'brier' or 'ce'", loss)


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
    merge_by: MergeRule = "coverage",
    boundary_weight: float = 1.0,
    interior_weight: float = 1.0,
    sync_counts: bool = False,
    check_finite: bool = True,
    backend: Backend = "auto",
) -> SSyncOutput:
    """Computes both losses of SSync, and everything that a log or a picture needs.

    The encoder's map teaches the decoder's at boundaries, the decoder's map teaches the encoder's in interiors; labels
    are merged over redundant slots first. Shapes never depend on data, the device is never waited for (but for the
    kernels' one trial, see `describe_backend`), and everything is computed in float32 (float64 for float64 maps), also
    under autocast.

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
        merge_by: ``"coverage"`` (published) or ``"soft_iou"``: overlaps of probabilities, with an inferred threshold.
        boundary_weight: Of the encoder → decoder loss in the total, at least 0.
        interior_weight: Of the decoder → encoder loss in the total, at least 0.
        sync_counts: Divide by the selected patches of all ranks instead of each rank's own, so that averaged gradients
            equal those of one process on the joined batch.
        check_finite: Refuse NaN where looking is free: on the CPU, outside of compiled graphs.
        backend: ``"torch"`` serves everything; ``"triton"``, GPU kernels, the published loss on logits; ``"auto"``
            takes the kernels where they serve and agree with torch. The results are the same.

    Returns:
        Losses, merged labels, regions, winners and statistics. An empty selection gives a loss of 0 with zero gradient.

    Raises:
        ConfigError: An option is out of range, or the kernels cannot serve these maps and options.
        ShapeError: A map on the CPU holds NaN.

    Examples:
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
    require(merge_by in _RULES, "argument `merge_by` to be 'coverage' or 'soft_iou'", merge_by)
    for name, weight in (("boundary_weight", boundary_weight), ("interior_weight", interior_weight)):
        require(0.0 <= weight < math.inf, f"argument `{name}` to be finite and at least 0", weight)
    options: dict[str, Any] = {
        "merge_threshold": merge_threshold if _merges(maps, merge, merge_by) else None,
        "regions": (n_bd, n_nbd, n_noise),
        "weights": (boundary_weight, interior_weight),
        "average": mean_over_ranks if sync_counts else None,
    }
    with torch.autocast(device_type=maps.attention.device.type, enabled=False):
        if describe_backend(maps, temperature, loss, backend, merge_by).name == "triton":
            fields = fused_block(maps.attention_logits, maps.mask_logits, maps.grid, **options)  # type: ignore[arg-type]
            output = SSyncOutput(*fields)  # type: ignore[arg-type]
        else:
            output = _torch_block(maps, temperature=temperature, loss=loss, merge_by=merge_by, **options)
    if check_finite:
        _refuse_nan(maps, output)
    return output


class BackendChoice(NamedTuple):
    """Which backend of `ssync_loss` runs, and why, as a clause for a log."""

    name: Literal["torch", "triton"]
    reason: str


def describe_backend(
    maps: SSyncMaps,
    temperature: float = 1.0,
    loss: LossKind = "brier",
    backend: Backend = "auto",
    merge_by: MergeRule = "coverage",
) -> BackendChoice:
    """Says which backend `ssync_loss` takes for such maps and options, and why; made for the log of the first step.

    ``"auto"`` trusts the kernels only after they have given, once on each device for each number of slots and dtype,
    what torch gives on a small clip. This trial takes as long as compiling them, and waits for the device. Values of
    the maps are not read; the other arguments are those of `ssync_loss`.

    Raises:
        ConfigError: The backend is unknown, or it is ``"triton"``, which cannot serve these maps and options.

    Examples:
        >>> d = torch.zeros(1, 1, 2, 4)
        >>> choice = describe_backend(SSyncMaps(attention_logits=d, mask_logits=d, grid=(2, 2)), loss="ce")
        >>> print(f"SSync runs on {choice.name}: {choice.reason}")
        SSync runs on torch: the kernels compute the loss 'brier' at temperature 1, merged by coverage, only
    """
    require(backend in _BACKENDS, "argument `backend` to be 'auto', 'torch' or 'triton'", backend)
    if backend == "torch":
        return BackendChoice("torch", "it was asked for")
    d, a = maps.attention_logits, maps.mask_logits
    others = (maps.attention_probs, maps.mask_probs, maps.slot_valid, maps.patch_valid, maps.frame_index)
    if torch.compiler.is_compiling():
        obstacle = "torch.compile fuses it by itself"
    elif loss != "brier" or temperature != 1.0 or merge_by != "coverage":
        obstacle = "the kernels compute the loss 'brier' at temperature 1, merged by coverage, only"
    elif d is None or a is None or any(other is not None for other in others):
        obstacle = "the kernels need logits of both maps, with every slot and patch valid"
    else:
        obstacle = why_unserved(d, a)
    if backend == "triton":
        if obstacle:
            raise ConfigError(f"Expected maps and options that the kernels serve, but {obstacle}. Use backend='auto'.")
        return BackendChoice("triton", "it was asked for")
    obstacle = obstacle or _why_untrusted(d, a)  # type: ignore[arg-type]
    return BackendChoice("torch", obstacle) if obstacle else BackendChoice("triton", "the kernels agree with torch")


_TRIALS: dict[tuple[torch.device, int, torch.dtype, torch.dtype], str] = {}


def _why_untrusted(d: Tensor, a: Tensor) -> str:
    """Empty where the kernels give what torch gives; tried once, on a small clip, for each device, S and dtypes."""
    key = (d.device, d.shape[2], d.dtype, a.dtype)
    if key not in _TRIALS:
        if d.is_cuda and torch.cuda.is_current_stream_capturing():
            return "the kernels were not tried before this CUDA graph"
        try:
            _TRIALS[key] = "" if _kernels_agree(*key) else "the kernels differ from torch on this device"
        except Exception as error:  # no C compiler, a device that is too old, another Triton
            _TRIALS[key] = f"the kernels cannot run here ({type(error).__name__}: {str(error)[:200]})"
        if _TRIALS[key]:
            warnings.warn(f"SSync takes the slower torch backend: {_TRIALS[key]}.", stacklevel=3)
    return _TRIALS[key]


def _kernels_agree(device: torch.device, slots: int, *dtypes: torch.dtype) -> bool:
    # Multiples of 1/16, which bfloat16 holds exactly, so that no order of summation moves a threshold.
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-40, 41, (2, 2, 2, slots, 32), generator=generator, device="cpu") / 16
    found = []
    with torch.inference_mode(False), torch.enable_grad():
        for backend in ("torch", "triton"):
            d, a = (x.to(device, dtype).requires_grad_() for x, dtype in zip(values, dtypes, strict=True))
            out = ssync_loss(SSyncMaps(d, a, grid=(4, 8)), check_finite=False, backend=backend)
            found.append((out, torch.autograd.grad(out.loss, (d, a))))
    (one, expected), (two, got) = found
    exact = ("raw_encoder_labels", "raw_decoder_labels", "winners", "boundary", "interior")
    close = [(one.boundary_loss, two.boundary_loss, 1e-4), (one.interior_loss, two.interior_loss, 1e-4)]
    close += [(x, y, 4 * torch.finfo(x.dtype).eps) for x, y in zip(expected, got, strict=True)]
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in exact) and all(
        torch.allclose(x.float(), y.float(), rtol=rtol, atol=1e-6) for x, y, rtol in close
    )


def _merges(maps: SSyncMaps, merge: bool | None, merge_by: MergeRule) -> bool:
    if merge_by == "soft_iou":
        return merge is not False
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


def _refuse_nan(maps: SSyncMaps, output: SSyncOutput) -> None:
    """A NaN anywhere in a map reaches its loss; only on the CPU can that be looked at for free."""
    losses = {"attention": output.interior_loss.detach(), "mask": output.boundary_loss.detach()}
    if maps.attention.device.type != "cpu" or torch.compiler.is_compiling() or type(losses["mask"]) is not Tensor:
        return
    names = [
        f"{side}_logits" if getattr(maps, f"{side}_probs") is None else f"{side}_probs"
        for side, value in losses.items()
        if math.isnan(value.item())
    ]
    if maps.attention_logits is not None and maps.attention_probs is not None:  # here merging alone reads the logits
        logits = slot_logits(maps.attention_logits, None, 1.0, maps.slot_valid, maps.patch_valid)
        names += ["attention_logits"] if bool(logits.detach().isnan().any()) else []
    if names:
        raise ShapeError(
            f"Expected argument `{names[0]}` to be finite, but got NaN. The host has diverged, or a patch has no slot "
            "with a finite logit: mark such patches with `patch_valid`."
        )


def _torch_block(
    maps: SSyncMaps,
    *,
    merge_threshold: float | None,
    regions: tuple[int, int, int],
    weights: tuple[float, float],
    average: Callable[[Tensor], Tensor] | None,
    temperature: float,
    loss: LossKind,
    merge_by: MergeRule,
) -> SSyncOutput:
    """The definition of the method; encoder first in every pair."""
    batch, _, slots, _ = maps.shape
    grid: tuple[int, int] = maps.grid  # type: ignore[assignment]
    slot_valid, patch_valid, (n_bd, n_nbd, n_noise) = maps.slot_valid, maps.patch_valid, regions
    given = (maps.attention_logits, maps.attention_probs), (maps.mask_logits, maps.mask_probs)
    sides = [(_widened(logits), _widened(probs)) for logits, probs in given]
    probs = [slot_probabilities(*side, 1.0, slot_valid, patch_valid) for side in sides]
    dtype = probs[0].dtype
    with torch.no_grad():
        raw = [hard_labels(p) for p in probs]
        areas = [slot_areas(labels, slots, patch_valid) for labels in raw]
        if merge_threshold is None:
            identity = torch.arange(slots, device=probs[0].device).expand(batch, slots)
            merged = MergeResult(identity, torch.zeros_like(areas[0][:, 0]), None)
        elif merge_by == "soft_iou":
            merged = merge_by_soft_iou(probs[0], areas[0], patch_valid)
        else:
            logits = sides[0][0]
            if logits is None:
                logits = slot_logits(*sides[0], 1.0, slot_valid, patch_valid).log_softmax(2)
            merged = merge_slots(logits, areas[0], merge_threshold, slot_valid, patch_valid)
        labels = raw if merge_threshold is None else [relabel(x, merged.winners) for x in raw]
        volumes = [x.unflatten(2, grid) for x in (*labels, *raw)]
        valid = None if patch_valid is None else patch_valid.unflatten(2, grid)
        differing = [count_differing_neighbours(x, valid, maps.frame_index) for x in volumes[:2]]
        boundary, interior = boundary_region(differing[0], n_bd, n_noise), interior_region(differing[1], n_nbd)
        flags = torch.stack([boundary, interior, boundary & interior, volumes[0] == volumes[1]])
        flags = flags if valid is None else flags & valid
        counts = flags.flatten(1).sum(1).to(dtype)
        shares = counts / (float(labels[0].numel()) if valid is None else valid.sum().clamp_min(1))
        # Terms of each mean: one per patch in cross-entropy, one per valid slot of a patch in the Brier score.
        entries = counts[:2]
        if loss == "brier" and slot_valid is not None:
            entries = (flags[:2].flatten(2).sum(2) * slot_valid.sum(1)).sum(1).to(dtype)
        elif loss == "brier":
            entries = entries * slots
        # Gradients are averaged over ranks afterwards, hence the mean of counts and not their sum.
        entries = entries if average is None else average(entries)

    losses = []
    for term, (student, teacher) in enumerate(((1, 0), (0, 1))):
        if loss == "ce":
            log_probs = slot_logits(*sides[student], temperature, slot_valid, patch_valid).log_softmax(2)
            per_patch = cross_entropy_per_patch(log_probs, labels[teacher])
        else:
            if temperature != 1.0:
                probs[student] = slot_probabilities(*sides[student], temperature, slot_valid, patch_valid)
            per_patch = brier_per_patch(probs[student], labels[teacher])
        losses.append(selected_mean(per_patch, flags[term].flatten(2), entries[term]))
    return SSyncOutput(
        loss=weights[0] * losses[0] + weights[1] * losses[1],
        boundary_loss=losses[0],
        interior_loss=losses[1],
        encoder_labels=volumes[0],
        decoder_labels=volumes[1],
        raw_encoder_labels=volumes[2],
        raw_decoder_labels=volumes[3],
        boundary=flags[0],
        interior=flags[1],
        winners=merged.winners,
        merged_slots=merged.merged_slots,
        slot_iou=merged.slot_iou,
        boundary_count=counts[0],
        interior_count=counts[1],
        boundary_fraction=shares[0],
        interior_fraction=shares[1],
        overlap_fraction=shares[2],
        agreement=shares[3],
        used_encoder_slots=(areas[0] > 0).sum(1).to(dtype),
        used_decoder_slots=(areas[1] > 0).sum(1).to(dtype),
    )


def _widened(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(compute_dtype(x.dtype))


def brier_per_patch(probs: Tensor, labels: Tensor) -> Tensor:
    """Computes the squared distance between probabilities and a one-hot label, summed over slots.

    Args:
        probs: ``(B, T, S, N)`` probabilities of the student. Gradient flows.
        labels: ``(B, T, N)`` int64 labels of the teacher.

    Returns:
        ``(B, T, N)`` in [0, 2].

    Source: SSync (arXiv 2606.15527), the distillation losses; "MSE on probabilities" in the reference.
    """
    slots = torch.arange(probs.shape[2], device=probs.device)[:, None]
    return (probs - (labels.unsqueeze(2) == slots).to(probs.dtype)).square().sum(dim=2)


def cross_entropy_per_patch(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Computes the negative log-probability of the label, as `brier_per_patch`; in no published configuration."""
    # Bounded, so that a slot that a host rules out in one patch cannot make the mean infinite.
    return -log_probs.gather(2, labels.unsqueeze(2)).squeeze(2).clamp_min(-1e4)


def selected_mean(per_patch: Tensor, selected: Tensor, entries: Tensor) -> Tensor:
    """Sums (B, T, N) over the selected patches and divides by a count; 0 with zero gradient where that is 0."""
    # A product and not a choice: NaN in a host's map has to surface in the loss, never to be hidden by the selection.
    # Counts averaged over ranks can lie between 0 and 1, so that clamping them to 1 would shrink the loss.
    return (per_patch * selected).sum() / torch.where(entries > 0, entries, 1.0)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Averages a tensor, without gradient, over the processes of a distributed training; alone, it stays as it is."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
