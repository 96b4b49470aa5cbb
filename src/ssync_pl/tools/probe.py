"""Linear probe: what can be read off a slot about the object that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.metrics.functional import contingency, read_scene

__all__ = ["ProbeSamples", "join_samples", "match_slots", "object_facts", "probe_slots", "sample_slots", "video_folds"]

# Of the ridge, for standardised features and a mean over samples. The last one predicts little but the mean.
_PENALTIES = (1e-6, 1e-4, 1e-2, 1.0, 100.0)


@dataclass(frozen=True, eq=False)
class ProbeSamples:
    """Slots with facts about the objects that they were matched to, M pairs of slot and object.

    Args:
        slots: `(M, D)`.
        videos: int64 `(M,)`, the video that each comes from.
        positions: `(M, 2)`, centre of the object's mask, x and y, in [0, 1].
        colors: `(M, 3)`, mean RGB of the object's pixels in [0, 1]; None where no frames are known.
        shapes: int64 `(M,)`, class of the object's shape, -1 where it is not known; None where none is.

    Raises:
        ShapeError: The parts differ in length.

    Example:
        >>> samples = ProbeSamples(torch.zeros(3, 8), torch.zeros(3, dtype=torch.long), torch.zeros(3, 2))
        >>> samples.colors is None
        True
    """

    slots: Tensor
    videos: Tensor
    positions: Tensor
    colors: Tensor | None = None
    shapes: Tensor | None = None

    def __post_init__(self) -> None:
        parts = (self.slots, self.videos, self.positions, self.colors, self.shapes)
        lengths = [len(part) for part in parts if part is not None]
        if len(set(lengths)) != 1:
            raise ShapeError(f"Expected as many facts as slots, but got {lengths}.")


def join_samples(parts: Sequence[ProbeSamples]) -> ProbeSamples:
    """Put the samples of several batches together.

    Args:
        parts: At least one. What one of them lacks, all lack.

    Returns:
        The samples in their order.

    Raises:
        ConfigError: There are none.

    Example:
        >>> one = ProbeSamples(torch.zeros(3, 8), torch.zeros(3, dtype=torch.long), torch.zeros(3, 2))
        >>> join_samples([one, one]).slots.shape
        torch.Size([6, 8])
    """
    if not parts:
        raise ConfigError("Expected samples of at least one batch, but got none.")
    columns = {entry.name: [getattr(part, entry.name) for part in parts] for entry in fields(ProbeSamples)}
    whole = {name: column for name, column in columns.items() if all(value is not None for value in column)}
    return ProbeSamples(**{name: torch.cat(column) for name, column in whole.items()})


def match_slots(
    masks: Tensor,
    true: Tensor,
    valid: Tensor | None = None,
    *,
    has_background: bool = True,
    ignore_overlaps: bool = False,
) -> Tensor:
    """Give each visible object of each frame a slot of its own, by the IoU of their masks (Hungarian matching).

    Args:
        masks: integer labels `(B, T, H, W)`, or float masks `(B, T, S, h, w)`.
        true: bool masks `(B, T, C, H, W)`.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.
        has_background: channel 0 of `true` is the background and no object.
        ignore_overlaps: leave out pixels with several true masks instead of refusing them.

    Returns:
        int64 `(M, 4)`: video, frame, object (channel of `true`) and slot. Pairs that share no pixel are left out.

    Raises:
        ShapeError: if the inputs do not fit.

    Example:
        >>> true = torch.tensor([[[[[1, 0, 0, 0]], [[0, 1, 1, 1]]]]], dtype=torch.bool)
        >>> match_slots(torch.tensor([[[[0, 4, 4, 0]]]]), true).tolist()
        [[0, 0, 1, 4]]
    """
    counts = contingency(read_scene(masks, true, valid), has_background, ignore_overlaps)
    first = int(has_background)
    iou = (counts.foreground() if has_background else counts).iou().cpu().numpy()
    found = [
        (video, frame, int(row) + first, int(column))
        for video in range(iou.shape[0])
        for frame in range(iou.shape[1])
        for row, column in zip(*linear_sum_assignment(-iou[video, frame]), strict=True)
        if iou[video, frame, row, column] > 0
    ]
    return torch.tensor(found, dtype=torch.int64).view(-1, 4)


def object_facts(true: Tensor, frames: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Where objects are and what colour they have, from their masks.

    Args:
        true: bool masks `(B, T, C, H, W)`.
        frames: RGB `(B, T, 3, H, W)` in [0, 1], of the same size; None for no colours.

    Returns:
        Centres `(B, T, C, 2)`, x and y in [0, 1], and mean colours `(B, T, C, 3)` or None; float64, 0 for objects that
        are not there.

    Raises:
        ShapeError: if frames and masks differ in size.

    Example:
        >>> true = torch.tensor([[[[[1, 1, 0, 0]]]]], dtype=torch.bool)
        >>> object_facts(true)[0].tolist()
        [[[[0.25, 0.5]]]]
    """
    height, width = true.shape[-2:]
    if frames is not None and (frames.shape[:2] != true.shape[:2] or frames.shape[-2:] != true.shape[-2:]):
        raise ShapeError(
            f"Expected argument `frames` to be (B, T, 3, H, W) as large as the masks {tuple(true.shape)}, but got "
            f"{tuple(frames.shape)}."
        )
    centres, colors = [], []
    x = (torch.arange(width, device=true.device, dtype=torch.float64) + 0.5) / width
    y = (torch.arange(height, device=true.device, dtype=torch.float64) + 0.5) / height
    for t in range(true.shape[1]):  # a frame at a time: masks as numbers are eight times as large
        masks = true[:, t].double()
        pixels = masks.sum(dim=(-2, -1)).clamp(min=1)
        across, down = (masks.sum(dim=-2) * x).sum(-1) / pixels, (masks.sum(dim=-1) * y).sum(-1) / pixels
        centres.append(torch.stack([across, down], dim=-1))
        if frames is not None:
            total = torch.einsum("bchw,bkhw->bck", masks, frames[:, t].double())
            colors.append(total / pixels.unsqueeze(-1))
    return torch.stack(centres, dim=1), torch.stack(colors, dim=1) if frames is not None else None


def sample_slots(
    slots: Tensor,
    masks: Tensor,
    true: Tensor,
    valid: Tensor | None = None,
    *,
    frames: Tensor | None = None,
    shapes: Tensor | None = None,
    first_video: int = 0,
    has_background: bool = True,
    ignore_overlaps: bool = False,
) -> ProbeSamples:
    """Match the slots of a batch to objects, and keep both.

    Args:
        slots: `(B, T, S, D)`.
        masks: of these slots: integer labels `(B, T, H, W)`, or float masks `(B, T, S, h, w)`.
        true: bool masks `(B, T, C, H, W)`.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.
        frames: RGB `(B, T, 3, H, W)` in [0, 1]; None for no colours.
        shapes: int64 `(B, C)`, class of each object's shape, -1 where it is not known; None where none is.
        first_video: number of the first video of the batch.
        has_background: channel 0 of `true` is the background and no object.
        ignore_overlaps: leave out pixels with several true masks instead of refusing them.

    Returns:
        Samples on the CPU.

    Raises:
        ShapeError: if the inputs do not fit.

    Example:
        >>> true = torch.tensor([[[[[1, 1, 0, 0]], [[0, 0, 1, 1]]]]], dtype=torch.bool)
        >>> samples = sample_slots(torch.randn(1, 1, 2, 8), torch.tensor([[[[0, 0, 1, 1]]]]), true)
        >>> samples.slots.shape, samples.positions.tolist()
        (torch.Size([1, 8]), [[0.75, 0.5]])
    """
    if slots.ndim != 4 or slots.shape[:2] != true.shape[:2] or (masks.ndim == 5 and slots.shape[2] != masks.shape[2]):
        raise ShapeError(
            f"Expected argument `slots` to be (B, T, S, D), one a mask, but got {tuple(slots.shape)} with masks "
            f"{tuple(masks.shape)} and true masks {tuple(true.shape)}."
        )
    pairs = match_slots(masks, true, valid, has_background=has_background, ignore_overlaps=ignore_overlaps)
    video, frame, channel, slot = pairs.unbind(1)
    centres, colors = object_facts(true, frames)
    return ProbeSamples(
        slots.detach().cpu().float()[video, frame, slot],
        video + first_video,
        centres.cpu()[video, frame, channel],
        None if colors is None else colors.cpu()[video, frame, channel],
        None if shapes is None else shapes.cpu()[video, channel],
    )


def video_folds(videos: Tensor, folds: int = 5) -> Tensor:
    """Deal videos out to folds, in turns, so that all samples of a video are in one.

    Args:
        videos: int64 `(M,)`.
        folds: number of folds; fewer where there are fewer videos.

    Returns:
        int64 `(M,)`, from 0 on.

    Example:
        >>> video_folds(torch.tensor([7, 7, 9, 4]), 2).tolist()
        [1, 1, 0, 0]
    """
    names, rank = torch.unique(videos, return_inverse=True)
    return rank % min(folds, max(len(names), 1))


def probe_slots(samples: ProbeSamples) -> dict[str, float]:
    """How well facts about objects follow linearly from their slots, on videos that the fit has not seen.

    Ridge regression in closed form (float64) on standardised slots, cross-validated over five folds of videos: frames
    of one video are alike, so no fold shares one. The ridge is chosen for each fold on another one, which is then
    fitted to as well. Scores are of all predictions together: R² = 1 - squared error / squared deviation from the
    mean, averaged over the coordinates or channels; for shapes, the share of right answers of one ridge a class.

    Args:
        samples: Of at least three videos.

    Returns:
        `position_r2`, `color_r2` where there are colours and `shape_accuracy` where there are at least two shapes. At
        most 1; near 0 or below where slots say nothing. Empty with fewer than three videos.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> slots = torch.randn(200, 4, generator=generator)
        >>> scores = probe_slots(ProbeSamples(slots, torch.arange(200) // 10, slots[:, :2] * 0.1 + 0.5))
        >>> round(scores["position_r2"], 3)
        1.0
    """
    samples = _finite(samples)  # a host that has diverged
    scores: dict[str, float] = {}
    for name, facts in (("position_r2", samples.positions), ("color_r2", samples.colors)):
        if facts is not None:
            predicted = _cross_predict(samples.slots, facts.double(), samples.videos)
            if predicted is not None:
                scores[name] = float(_r2(predicted, facts.double()))
    if samples.shapes is not None:
        known = samples.shapes >= 0
        kinds, classes = torch.unique(samples.shapes[known], return_inverse=True)
        if len(kinds) > 1:
            wanted = torch.nn.functional.one_hot(classes, len(kinds)).double()
            predicted = _cross_predict(samples.slots[known], wanted, samples.videos[known])
            if predicted is not None:
                scores["shape_accuracy"] = float((predicted.argmax(1) == classes).double().mean())
    return scores


def _finite(samples: ProbeSamples) -> ProbeSamples:
    kept = samples.slots.isfinite().all(dim=1)
    columns = {entry.name: getattr(samples, entry.name) for entry in fields(samples)}
    return ProbeSamples(**{name: value[kept] for name, value in columns.items() if value is not None})


def _cross_predict(slots: Tensor, facts: Tensor, videos: Tensor) -> Tensor | None:
    """Prediction of each sample from the other folds; None with fewer than three videos."""
    folds = video_folds(videos)
    count = int(folds.max()) + 1 if len(folds) else 0
    if count < 3:  # one to predict, one to choose the ridge on, one to fit
        return None
    slots = slots.double()
    result = torch.zeros_like(facts)
    for fold in range(count):
        test, inner = folds == fold, folds == (fold + 1) % count
        fit = ~test & ~inner
        tried = _ridge(slots[fit], facts[fit], slots[inner], _PENALTIES)
        errors = [float((guess - facts[inner]).square().sum()) for guess in tried]
        best = _PENALTIES[min(range(len(errors)), key=errors.__getitem__)]
        result[test] = _ridge(slots[~test], facts[~test], slots[test], (best,))[0]
    return result


def _ridge(slots: Tensor, facts: Tensor, unseen: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """Predictions for unseen slots, one for each ridge."""
    centre, spread = slots.mean(0), slots.std(0, unbiased=False)
    spread = torch.where(spread > 1e-12, spread, 1.0)
    known, unseen = (slots - centre) / spread, (unseen - centre) / spread
    level = facts.mean(0)
    gram, target = known.T @ known / len(known), known.T @ (facts - level) / len(known)
    ridges = [gram + penalty * torch.eye(len(gram), dtype=gram.dtype) for penalty in penalties]
    return [unseen @ torch.linalg.solve(ridge, target) + level for ridge in ridges]


def _r2(predicted: Tensor, facts: Tensor) -> Tensor:
    deviation = (facts - facts.mean(0)).square().sum(0)
    moving = deviation > 1e-12  # a coordinate that never changes has nothing to explain
    error = (predicted - facts).square().sum(0)
    return (1 - error[moving] / deviation[moving]).mean()
