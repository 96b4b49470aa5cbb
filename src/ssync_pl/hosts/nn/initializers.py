"""Initial slots of a clip: random, learned, from the first frame's features, or from hints about it."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ssync_pl.errors import require_shape
from ssync_pl.method.labels import compute_dtype

_HINT_DIMS = {"boxes": 4, "centres": 2}


class GaussianSlots(nn.Module):
    """Draws every slot from one learned Gaussian, in training and in evaluation (Locatello et al. 2020)."""

    def __init__(self, num_slots: int, slot_dim: int, initial_std: float = 1.0) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.mean = nn.Parameter(torch.zeros(1, 1, slot_dim))
        self.log_std = nn.Parameter(torch.full((1, 1, slot_dim), math.log(initial_std)))

    def forward(self, features: Tensor, looks: Tensor | None = None) -> Tensor:
        """Draw slots `(B, S, D)` for as many clips as `features` has."""
        mean = self.mean.expand(len(features), self.num_slots, -1)
        return mean + self.log_std.exp() * torch.randn_like(mean)


class LearnedSlots(nn.Module):
    """One learned vector per slot, the same for every clip."""

    def __init__(self, num_slots: int, slot_dim: int, initial_std: float = 1.0) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(1, num_slots, slot_dim) * initial_std)

    def forward(self, features: Tensor, looks: Tensor | None = None) -> Tensor:
        """Repeat the slots, to `(B, S, D)`, for as many clips as `features` has."""
        return self.slots.expand(len(features), -1, -1)


class FeatureSlots(nn.Module):
    """Means of the features of alike patches in the first frame, turned into slots by a linear map."""

    def __init__(self, num_slots: int, slot_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.to_slots = nn.Linear(feature_dim, slot_dim, bias=False)
        if feature_dim == slot_dim:  # slots start out where patches lie
            nn.init.eye_(self.to_slots.weight)

    def forward(self, features: Tensor, looks: Tensor | None = None) -> Tensor:
        """Turn features `(B, N, C)` into slots `(B, S, D)`; patches are alike in `looks` `(B, N, K)`, if given."""
        groups = group_patches(features if looks is None else looks, self.num_slots)
        return torch.as_tensor(self.to_slots(groups.to(features.dtype) @ features))


@torch.no_grad()
def group_patches(features: Tensor, num_groups: int, rounds: int = 3) -> Tensor:
    """Group the patches of frames `(B, N, C)` by k-means from the farthest points, without random numbers.

    The first centre is the patch farthest from the mean, each further one the patch farthest from all before it.
    Returns weights `(B, S, N)`, equal within a group, that sum to 1 over the patches; 0 where fewer patches differ.
    """
    require_shape(features.shape[1] >= num_groups, f"a frame of at least {num_groups} patches (`num_slots`)", features)
    with torch.autocast(features.device.type, enabled=False):
        points = features.detach().to(compute_dtype(features.dtype))
        distance = (points - points.mean(dim=1, keepdim=True)).square().sum(dim=-1)
        chosen: list[Tensor] = []
        for number in range(num_groups):
            chosen.append(distance.argmax(dim=1))
            centre = points.gather(1, chosen[-1].view(-1, 1, 1).expand(-1, 1, points.shape[-1]))
            near = (points - centre).square().sum(dim=-1)
            distance = near if number == 0 else torch.minimum(distance, near)
        patches = torch.arange(points.shape[1], device=points.device)
        weights = (torch.stack(chosen, dim=1).unsqueeze(-1) == patches).to(points.dtype)
        for _ in range(rounds + 1):
            nearest = torch.cdist(weights @ points, points).argmin(dim=1, keepdim=True)
            members = (nearest == patches[:num_groups].view(1, -1, 1)).to(points.dtype)
            weights = members / members.sum(dim=-1, keepdim=True).clamp(min=1.0)
    return weights


def build_initializer(kind: str, num_slots: int, slot_dim: int, feature_dim: int, spread: float = 1.0) -> nn.Module:
    """Build what gives a clip its first slots."""
    if kind in _HINT_DIMS:
        return ConditionedSlots(num_slots, slot_dim, _HINT_DIMS[kind])
    if kind == "features":
        return FeatureSlots(num_slots, slot_dim, feature_dim)
    return (GaussianSlots if kind == "gaussian" else LearnedSlots)(num_slots, slot_dim, spread)


class ConditionedSlots(nn.Module):
    """An MLP turns one hint per slot (box or centre in the first frame) into the slot (SAVi, section 2.2).

    Slots without a hint start from a learned vector of their own: equal starts would stay equal for ever.
    """

    def __init__(self, num_slots: int, slot_dim: int, hint_dim: int, hidden: int = 256) -> None:
        super().__init__()
        self.hint_dim = hint_dim
        self.num_slots = num_slots
        self.empty = nn.Parameter(torch.randn(1, num_slots, slot_dim))
        self.mlp = nn.Sequential(nn.Linear(hint_dim, hidden), nn.ReLU(), nn.Linear(hidden, slot_dim))

    def forward(self, hints: Tensor) -> Tensor:
        """Turn hints `(B, S, hint_dim)` in [0, 1] into slots; a row with a negative entry is a slot without a hint."""
        fits = hints.ndim == 3 and hints.shape[1:] == (self.num_slots, self.hint_dim)
        expected = f"argument `conditioning` to be (B, {self.num_slots}, {self.hint_dim})"
        require_shape(fits, expected, hints, advice="Fill rows of slots without an object with -1.")
        known = (hints >= 0).all(dim=-1, keepdim=True)
        return torch.where(known, self.mlp(hints.to(self.empty.dtype)), self.empty)


def first_frame_hints(
    segmentations: Tensor, num_slots: int, kind: Literal["boxes", "centres"] = "boxes", *, has_background: bool = True
) -> Tensor:
    """Boxes or centres of the objects in the first frame, at most one per slot.

    Objects that are not in the first frame are skipped; the others keep their order, and those beyond `num_slots`
    are dropped.
    """
    require_shape(segmentations.ndim == 5, "argument `segmentations` to be (B, T, C, H, W)", segmentations)
    masks = segmentations[:, 0, int(has_background) :].bool()
    top, bottom = _extent(masks.any(dim=-1))
    left, right = _extent(masks.any(dim=-2))
    if kind == "boxes":
        hints = torch.stack([top, left, bottom, right], dim=-1)
    else:
        hints = torch.stack([(top + bottom) / 2, (left + right) / 2], dim=-1)
    absent = ~masks.flatten(2).any(dim=-1)
    hints = hints.masked_fill(absent.unsqueeze(-1), -1.0)
    # Rows of -1 at the end make the gather possible when there are fewer channels than slots.
    padding = max(0, num_slots - masks.shape[1])
    hints = nn.functional.pad(hints, (0, 0, 0, padding), value=-1.0)
    absent = nn.functional.pad(absent, (0, padding), value=True)
    order = absent.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_slots]
    return hints.gather(1, order.unsqueeze(-1).expand(-1, -1, hints.shape[-1]))


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True along the last axis, as fractions of its length."""
    length = occupied.shape[-1]
    first = occupied.float().argmax(dim=-1)
    last = length - occupied.flip(-1).float().argmax(dim=-1)
    return first / length, last / length
