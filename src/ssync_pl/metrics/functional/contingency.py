"""The contingency table: everything that ARI, mBO, mIoU and the slot metrics need, in one small table per frame."""

from typing import NamedTuple

import torch
from torch import Tensor

from ssync_pl.errors import ShapeError
from ssync_pl.metrics.functional.scene import Scene


class Contingency(NamedTuple):
    """Pixel counts of true masks against slots."""

    table: Tensor  # float64 (..., C, S), pixels that true mask c and slot s share
    slot_sizes: Tensor  # float64 (..., S), pixels of slot s, those without a true mask included
    labelled: Tensor  # bool (...), True where the item has any true mask

    def videos(self) -> "Contingency":
        """Sums the frames of each video: `(B, T, ...)` to `(B, ...)`."""
        return Contingency(self.table.sum(dim=1), self.slot_sizes.sum(dim=1), self.labelled.any(dim=1))

    def foreground(self) -> "Contingency":
        """Drops true channel 0, the background; slots keep their background pixels."""
        return self._replace(table=self.table[..., 1:, :])

    def iou(self) -> Tensor:
        """Returns the IoU `(..., C, S)` of each true mask with each slot; 0 where both are empty."""
        union = self.table.sum(dim=-1, keepdim=True) + self.slot_sizes.unsqueeze(-2) - self.table
        return self.table / union.clamp(min=1)


def contingency(scene: Scene, has_background: bool = False, ignore_overlaps: bool = False) -> Contingency:
    """Counts the pixels that each true mask shares with each slot, frame by frame.

    Args:
        scene: what `read_scene` returns.
        has_background: channel 0 is the background, so that every pixel must have a true mask.
        ignore_overlaps: leave out pixels with several true masks, in true masks and slots, instead of refusing them.

    Returns:
        Counts with the leading dimensions `(B, T)`; frames that are not valid count nothing.

    Raises:
        ShapeError: true masks overlap, or pixels lack a true mask.

    Examples:
        >>> from ssync_pl.metrics.functional import read_scene
        >>> true = torch.tensor([[[[[1, 1, 0, 0]], [[0, 0, 1, 1]]]]], dtype=torch.bool)
        >>> contingency(read_scene(torch.tensor([[[[0, 0, 0, 1]]]]), true)).table.tolist()
        [[[[2.0, 0.0], [1.0, 1.0]]]]
    """
    overlapping = int(scene.overlaps.sum())
    if overlapping and not ignore_overlaps:
        got = f"{overlapping} pixels with several masks. Do `ignore_overlaps=True` to leave these pixels out."
        raise ShapeError(f"Expected true masks that do not overlap, but got {got}")
    covered = scene.objects >= 0
    labelled = covered.flatten(1).any(dim=1)
    if has_background and bool((labelled[:, None, None] & ~covered).any()):
        advice = "Do `ignore_background=False` (`has_background=False`) for sets without a background channel."
        raise ShapeError(f"Expected every pixel to have a true mask, channel 0 being the background. {advice}")
    rows = scene.num_objects + 1  # the first row: pixels without a true mask
    frames = torch.arange(len(scene.places), device=scene.slots.device)[:, None, None]
    cells = (frames * rows + scene.objects + 1) * scene.num_slots + scene.slots
    cells = cells[~scene.overlaps] if overlapping else cells.flatten()
    counts = torch.bincount(cells, minlength=len(scene.places) * rows * scene.num_slots)
    table = scene.spread(counts.view(-1, rows, scene.num_slots))
    return Contingency(table[..., 1:, :], table.sum(dim=-2), scene.spread(labelled) > 0)
