"""A few frames of a few videos with everything that is drawn of them, as arrays on the CPU."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ssync_pl.errors import ShapeError
from ssync_pl.hosts.evaluation import resize_masks
from ssync_pl.method.loss import SSyncOutput
from ssync_pl.tools.viz import label_masks, resize_nearest, to_uint8

__all__ = ["PictureBox", "spread_frames"]


def spread_frames(real: Sequence[int], count: int) -> list[int]:
    """Choose frames that are evenly spaced, from the first to the last.

    Args:
        real: Frames there are, at least one.
        count: Frames wanted; where there are fewer, some come twice.

    Returns:
        `count` frames.

    Example:
        >>> spread_frames(range(12), 4), spread_frames([0, 1], 4)
        ([0, 4, 7, 11], [0, 0, 1, 1])
    """
    return [real[round(k * (len(real) - 1) / max(count - 1, 1))] for k in range(count)]


class PictureBox:
    """Keeps the first videos of a validation set, in its order: the same ones in each run on the set.

    Args:
        videos: Number K of videos.
        frames: Number F of frames of each.
        has_background: Channel 0 of the true masks is the background.
        mean: What normalisation subtracted from frames, or None where nobody knows.
        std: What it divided by.

    Example:
        >>> PictureBox(2, 3).full
        False
    """

    def __init__(
        self,
        videos: int,
        frames: int,
        has_background: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.videos = videos
        self.frames = frames
        self.has_background = has_background
        self.mean, self.std = mean, std
        self._rows: list[dict[str, NDArray[Any]]] = []
        self._keys: list[str] = []

    @property
    def full(self) -> bool:
        """Whether there are as many videos as wanted.

        Returns:
            True when no more are kept.

        Example:
            >>> PictureBox(0, 1).full
            True
        """
        return len(self._rows) >= self.videos

    def add(
        self, batch: Mapping[str, Any], keys: Sequence[str], masks: Tensor, valid: Tensor, output: SSyncOutput
    ) -> None:
        """Keep videos of a batch until the box is full.

        Args:
            batch: Holds `video` `(B, T, 3, H, W)` and `segmentations` `(B, T, C, H, W)`.
            keys: Names of its videos.
            masks: The host's object masks `(B, T, S, h, w)`.
            valid: bool `(B, T)`, frames that are no padding.
            output: Of `ssync_loss` on the host's maps of these videos, with their frames apart or in a row.

        Raises:
            ShapeError: There are no frames, or the maps are of others.

        Example:
            >>> add = PictureBox(2, 3).add  # called by `RunRecorder` on validation batches
        """
        video, true = batch.get("video"), batch["segmentations"]
        if not isinstance(video, Tensor) or video.ndim != 5 or video.shape[2] != 3:
            raise ShapeError(
                f"Expected key `video` (B, T, 3, H, W) in a validation batch, but got the keys {sorted(batch)}. "
                "Pictures need the frames: let the data module give them in validation."
            )
        maps = {
            "encoder": _by_clip(output.raw_encoder_labels, video),
            "boundary": _by_clip(output.boundary, video),
            "interior": _by_clip(output.interior, video),
        }
        size = (int(video.shape[-2]), int(video.shape[-1]))
        for index, key in enumerate(keys):
            real = valid[index].nonzero().flatten().tolist()
            if not real or self.full:
                continue
            chosen = spread_frames(real, self.frames)
            labels = resize_masks(masks[index : index + 1, chosen].float(), size)[0].max(dim=1).indices
            row = {
                "frames": to_uint8(video[index, chosen].float().cpu().numpy(), self.mean, self.std),
                "truth": self._truth(true[index, chosen].cpu().numpy(), size),
                "decoder": labels.cpu().numpy().astype(np.uint8),
                "encoder": maps["encoder"][index, chosen].cpu().numpy().astype(np.uint8),
                "boundary": maps["boundary"][index, chosen].cpu().numpy(),
                "interior": maps["interior"][index, chosen].cpu().numpy(),
            }
            # videos of other sizes do not fit into one array
            if not self._rows or all(row[name].shape == kept.shape for name, kept in self._rows[0].items()):
                self._rows.append(row)
                self._keys.append(key)

    def content(self) -> bytes | None:
        """What was kept, as an NPZ file.

        Returns:
            Its bytes: `keys` `(K,)`, `frames` uint8 `(K, F, H, W, 3)`, `truth` (0 = background) and `decoder` uint8
            `(K, F, H, W)`, `encoder` uint8 and `boundary`, `interior` bool `(K, F, h, w)`. None when nothing was kept.

        Example:
            >>> PictureBox(2, 3).content() is None
            True
        """
        if not self._rows:
            return None
        arrays: dict[str, Any] = {name: np.stack([row[name] for row in self._rows]) for name in self._rows[0]}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, keys=np.array(self._keys, dtype=np.str_), **arrays)
        return buffer.getvalue()

    def _truth(self, masks: NDArray[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
        labels = label_masks(masks)  # -1 without a mask
        labels = np.maximum(labels, 0) if self.has_background else labels + 1
        return resize_nearest(labels, size, channels_last=False).astype(np.uint8)


def _by_clip(labels: Tensor, video: Tensor) -> Tensor:
    batch, frames = video.shape[:2]
    if labels.shape[:2] == (batch * frames, 1):  # hosts of images see each frame as a clip of its own
        labels = labels.flatten(0, 1).unflatten(0, (batch, frames))
    if labels.shape[:2] != (batch, frames):
        raise ShapeError(f"Expected maps of {batch} videos of {frames} frames, but got {tuple(labels.shape[:2])}.")
    return labels
