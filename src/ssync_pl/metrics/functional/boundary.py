"""F-measure of the borders between slots against the borders between true masks."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssync_pl.errors import require
from ssync_pl.metrics.functional.scene import Scene

# Borders are widened for a group of frames at a time: 2**24 floats are 64 MiB.
_GROUP_ELEMENTS = 2**24


def boundary_f(scene: Scene, tolerance: float = 0.0075) -> Tensor:
    """Computes how near the borders between slots lie to the borders between true masks, and these to them.

    All borders of a frame count, whichever slots or masks they separate, so that cutting the background into parts
    costs precision. A border pixel is found if one of the other map lies in a square of `2 r + 1` pixels around it,
    r being the tolerance. F = 2 P R / (P + R), 0 where slots have no border.

    Args:
        scene: what `read_scene` returns; the first of overlapping masks wins, and pixels without any are a region too.
        tolerance: distance that counts as found, as a share of the image's diagonal in [0, 1]; at least one pixel.

    Returns:
        Float64 `(B, T)` in [0, 1]; NaN for frames without a true border.

    Raises:
        ConfigError: `tolerance` is out of range.

    Examples:
        >>> from ssync_pl.metrics.functional import read_scene
        >>> true = torch.tensor([[[[[1, 1, 1, 1, 0, 0, 0, 0]], [[0, 0, 0, 0, 1, 1, 1, 1]]]]], dtype=torch.bool)
        >>> boundary_f(read_scene(torch.tensor([[[[0, 0, 0, 0, 0, 1, 1, 1]]]]), true)).item()  # one pixel off
        1.0

    Source: F and tolerance of DAVIS (Perazzi et al., CVPR 2016), which matches borders object by object.
    """
    require(0.0 <= tolerance <= 1.0, "`tolerance` to be a share in [0, 1]", tolerance)
    size = scene.slots.shape[-2:]
    radius = max(1, math.ceil(tolerance * math.hypot(*size)))
    group = max(1, _GROUP_ELEMENTS // (2 * size[0] * size[1]))
    parts = zip(scene.slots.split(group), scene.objects.split(group), strict=True)
    values = [_f_measure(_borders(slots), _borders(objects), radius) for slots, objects in parts]
    return scene.spread(torch.cat(values), torch.nan)


def _borders(labels: Tensor) -> Tensor:
    """Pixels `(F, H, W)` whose neighbour to the right, below or diagonally below has another label."""
    border = torch.zeros_like(labels, dtype=torch.bool)
    border[..., :, :-1] |= labels[..., :, :-1] != labels[..., :, 1:]
    border[..., :-1, :] |= labels[..., :-1, :] != labels[..., 1:, :]
    border[..., :-1, :-1] |= labels[..., :-1, :-1] != labels[..., 1:, 1:]
    return border


def _f_measure(found: Tensor, wanted: Tensor, radius: int) -> Tensor:
    """F of borders `(F, H, W)`, float64 `(F,)`; NaN without a true border."""
    borders = torch.stack([found, wanted], dim=1)
    # A square is a row of columns: two passes of 2r + 1 comparisons instead of (2r + 1)².
    near = F.max_pool2d(borders.float(), (2 * radius + 1, 1), stride=1, padding=(radius, 0))
    near = F.max_pool2d(near, (1, 2 * radius + 1), stride=1, padding=(0, radius)) > 0
    hits = (borders & near.flip(1)).flatten(2).sum(dim=2).double()
    totals = borders.flatten(2).sum(dim=2).double()
    precision, recall = (hits / totals.clamp(min=1)).unbind(dim=1)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return score.masked_fill(totals[:, 1] == 0, torch.nan)
