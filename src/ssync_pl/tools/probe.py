"""Linear probe: what a linear map reads off a slot about the object that the slot stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.metrics.functional import contingency, read_scene

__all__ = ["ProbeSamples", "join_samples", "match_slots", "object_facts", "probe_slots", "sample_slots"]

# Of the ridge, for standardised features and a mean over samples. The last one predicts little but the mean.
_PENALTIES = (1e-6, 1e-4, 1e-2, 1.0, 100.0)
_FOLDS = 5


@dataclass(frozen=True, eq=False)
class ProbeSamples:
    """M pairs of a slot and the object that it was matched to.

    Args:
        slots: `(M, D)`.
        videos: int64 `(M,)`, the video that each comes from.
        positions: `(M, 2)`, centre of the object's mask, x and y, in [0, 1].
        colors: `(M, 3)`, mean RGB of the object's pixels; None where no frames are known.
        shapes: int64 `(M,)`, class of the object's shape, -1 where it is not known; None where none is.

    Raises:
        ShapeError: the parts differ in length.
    """

    slots: Tensor
    videos: Tensor
    positions: Tensor
    colors: Tensor | None = None
    shapes: Tensor | None = None

    def __post_init__(self) -> None:
        lengths = [len(part) for part in self.columns().values()]
        if len(set(lengths)) != 1:
            raise ShapeError(f"Expected as many facts as slots, but got {lengths}.")

    def columns(self) -> dict[str, Tensor]:
        """Returns the parts that are there, by name."""
        parts = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}

    def only(self, kept: Tensor) -> ProbeSamples:
        """Returns the samples that a bool mask `(M,)` keeps."""
        return ProbeSamples(**{name: part[kept] for name, part in self.columns().items()})


def join_samples(parts: Sequence[ProbeSamples]) -> ProbeSamples:
    """Puts the samples of several batches together; what one of them lacks, all lack.

    Raises:
        ConfigError: there are none.
    """
    if not parts:
        raise ConfigError("Expected samples of at least one batch, but got none.")
    shared = set.intersection(*(set(part.columns()) for part in parts))
    return ProbeSamples(**{name: torch.cat([getattr(part, name) for part in parts]) for name in shared})


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
    """Matches the slots of a batch to objects, and keeps both.

    Args:
        slots: `(B, T, S, D)`.
        masks: of these slots: integer labels `(B, T, H, W)`, or float masks `(B, T, S, h, w)`.
        true: bool masks `(B, T, C, H, W)`.
        valid: bool `(B,)` or `(B, T)`, False for padding; None counts all.
        frames: RGB `(B, T, 3, H, W)`; None for no colours.
        shapes: int64 `(B, C)`, class of each object's shape, -1 where it is not known; None where none is.
        first_video: number of the first video of the batch.
        has_background: channel 0 of `true` is the background and no object.
        ignore_overlaps: leave out pixels with several true masks instead of refusing them.

    Returns:
        Samples on the CPU.

    Raises:
        ShapeError: the inputs do not fit.
    """
    if slots.ndim != 4 or slots.shape[:2] != true.shape[:2] or (masks.ndim == 5 and slots.shape[2] != masks.shape[2]):
        raise ShapeError(
            f"Expected `slots` to be (B, T, S, D), one per mask, but got {tuple(slots.shape)} with masks "
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


def match_slots(
    masks: Tensor,
    true: Tensor,
    valid: Tensor | None = None,
    *,
    has_background: bool = True,
    ignore_overlaps: bool = False,
) -> Tensor:
    """Returns int64 `(M, 4)`: video, frame, object and slot, matched one to one in each frame by IoU above 0."""
    counts = contingency(read_scene(masks, true, valid), has_background, ignore_overlaps)
    first = int(has_background)
    iou = (counts.foreground() if has_background else counts).iou().cpu().numpy()
    found = [
        (video, frame, int(row) + first, int(column))
        for video in range(iou.shape[0])
        for frame in range(iou.shape[1])
        for row, column in zip(*linear_sum_assignment(iou[video, frame], maximize=True), strict=True)
        if iou[video, frame, row, column] > 0
    ]
    return torch.tensor(found, dtype=torch.int64).view(-1, 4)


def object_facts(true: Tensor, frames: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Returns the centres `(B, T, C, 2)`, x and y in [0, 1], and mean colours `(B, T, C, 3)` of masks; 0 for none."""
    height, width = true.shape[-2:]
    if frames is not None and (frames.shape[:2] != true.shape[:2] or frames.shape[-2:] != true.shape[-2:]):
        raise ShapeError(
            f"Expected `frames` to be as large as the masks {tuple(true.shape)}, but got {tuple(frames.shape)}."
        )
    centres, colors = [], []
    x = (torch.arange(width, device=true.device, dtype=torch.float64) + 0.5) / width
    y = (torch.arange(height, device=true.device, dtype=torch.float64) + 0.5) / height
    for t in range(true.shape[1]):  # a frame at a time: masks as numbers are eight times as large
        masks = true[:, t].double()
        pixels = masks.sum(dim=(-2, -1)).clamp(min=1).unsqueeze(-1)
        total = torch.stack([(masks.sum(dim=-2) * x).sum(-1), (masks.sum(dim=-1) * y).sum(-1)], dim=-1)
        centres.append(total / pixels)
        if frames is not None:
            colors.append(torch.einsum("bchw,bkhw->bck", masks, frames[:, t].double()) / pixels)
    return torch.stack(centres, dim=1), torch.stack(colors, dim=1) if frames is not None else None


def probe_slots(samples: ProbeSamples) -> dict[str, float]:
    """Measures how well facts about objects follow linearly from their slots, on videos that the fit has not seen.

    Ridge regression in closed form (float64) on standardised slots, cross-validated over five folds of videos: frames
    of one video are alike, so no two folds share one. The penalty is chosen for each fold on another one, which is
    then fitted to as well. Scores are of all predictions together: R², averaged over the coordinates or channels that
    change; for shapes, the share of right answers of one ridge per class.

    Args:
        samples: of at least three videos; slots that are not finite are left out.

    Returns:
        `position_r2`, `color_r2` where there are colours and `shape_accuracy` where there are at least two shapes. At
        most 1; near 0 or below where slots say nothing. Empty with fewer than three videos.
    """
    samples = samples.only(samples.slots.isfinite().all(dim=1))
    scores: dict[str, float] = {}
    for name, facts in (("position_r2", samples.positions), ("color_r2", samples.colors)):
        if facts is None:
            continue
        predicted = _cross_predict(samples.slots, facts.double(), samples.videos)
        if predicted is not None:
            scores[name] = _r2(predicted, facts.double())
    if samples.shapes is not None:
        known = samples.only(samples.shapes >= 0)
        kinds, classes = torch.unique(known.shapes, return_inverse=True)
        wanted = torch.nn.functional.one_hot(classes, max(len(kinds), 1)).double()
        predicted = _cross_predict(known.slots, wanted, known.videos) if len(kinds) > 1 else None
        if predicted is not None:
            scores["shape_accuracy"] = float((predicted.argmax(1) == classes).double().mean())
    return scores


def _cross_predict(slots: Tensor, facts: Tensor, videos: Tensor) -> Tensor | None:
    """Prediction of each sample from the other folds; None with fewer than three videos."""
    names, rank = torch.unique(videos, return_inverse=True)
    count = min(_FOLDS, len(names))
    if count < 3:  # one to predict, one to choose the penalty on, one to fit
        return None
    folds, slots, result = rank % count, slots.double(), torch.zeros_like(facts)
    for fold in range(count):
        test, inner = folds == fold, folds == (fold + 1) % count
        fit = ~test & ~inner
        tried = _ridge(slots[fit], facts[fit], slots[inner], _PENALTIES)
        errors = torch.stack([(guess - facts[inner]).square().sum() for guess in tried])
        result[test] = _ridge(slots[~test], facts[~test], slots[test], (_PENALTIES[int(errors.argmin())],))[0]
    return result


def _ridge(slots: Tensor, facts: Tensor, unseen: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """Predictions for unseen slots, one per penalty."""
    centre, spread = slots.mean(0), slots.std(0, unbiased=False)
    spread = torch.where(spread > 1e-12, spread, 1.0)
    known, unseen = (slots - centre) / spread, (unseen - centre) / spread
    level = facts.mean(0)
    gram, target = known.T @ known / len(known), known.T @ (facts - level) / len(known)
    identity = torch.eye(len(gram), dtype=gram.dtype)
    return [unseen @ torch.linalg.solve(gram + penalty * identity, target) + level for penalty in penalties]


def _r2(predicted: Tensor, facts: Tensor) -> float:
    deviation = (facts - facts.mean(0)).square().sum(0)
    moving = deviation > 1e-12  # a coordinate that never changes has nothing to explain
    error = (predicted - facts).square().sum(0)
    return float((1 - error[moving] / deviation[moving]).mean())
