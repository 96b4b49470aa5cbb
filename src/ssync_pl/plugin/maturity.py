"""Whether a host's two maps have come so far that SSync can hold them together."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from ssync_pl.method.labels import compute_dtype, hard_labels, mask_slots, slot_areas
from ssync_pl.method.loss import mean_over_ranks
from ssync_pl.method.maps import SSyncMaps

__all__ = ["Maturity", "watched"]

# Windows that have to be alike before a host counts as settled.
_SETTLED_WINDOWS = 4
# Largest spread of their agreement: a share of the patches, a little above the noise of a window's mean.
_AGREEMENT_SPREAD = 0.02
# Largest spread of their slots in use, in slots on average.
_SLOTS_SPREAD = 0.25
# Everything in one slot agrees perfectly, and is not mature.
_LEAST_SLOTS = 2.0
# A host that has not begun to learn is settled too, at the agreement of chance.
_TIMES_CHANCE = 2.0


def watched(maps: SSyncMaps) -> Tensor:
    """Agreement of the two maps' winners, and mean number of slots that win a patch somewhere in the clip, unmerged.

    Args:
        maps: The host's maps, ``(B, T, S, N)``.

    Returns:
        ``(3,)``: share of the valid patches that the same slot wins in both maps; slots in use of the encoder and of
        the decoder.

    Example:
        >>> d = torch.tensor([[[[9.0, 0.0], [0.0, 9.0], [0.0, 0.0]]]])
        >>> watched(SSyncMaps(attention_logits=d, mask_logits=d.flip(3), grid=(1, 2)))
        tensor([0., 2., 2.])
    """
    with torch.no_grad():
        winners, counts = [], []
        for value in (maps.attention, maps.masks):
            scores = mask_slots(value.to(compute_dtype(value.dtype)), maps.slot_valid)
            labels = hard_labels(scores)
            areas = slot_areas(labels, scores.shape[2], maps.patch_valid)
            winners.append(labels)
            counts.append((areas > 0).sum(1).float().mean())
        same = winners[0] == winners[1]
        if maps.patch_valid is None:
            agreement = same.float().mean()
        else:
            agreement = (same & maps.patch_valid).sum().float() / maps.patch_valid.sum().clamp_min(1)
        return torch.stack([agreement, *counts])


class Maturity:
    """Says when SSync may start: the maps agree, or agreement and slots in use have stopped changing.

    A host is mature at the end of a window of steps in which the agreement reached the threshold, or when that of the
    last four windows, and their slots in use, have hardly differed while the agreement was at least twice that of
    chance. Either way two slots at least are in use. Sums stay on the device; they are read once a window.

    Args:
        threshold: Share of the patches, in (0, 1].
        window: Steps that are averaged, at least 1.

    Attributes:
        opened: First optimizer step at which SSync may be on; None while the host is not mature.

    Example:
        >>> maturity = Maturity(threshold=0.5, window=2)
        >>> [maturity.add(torch.tensor([share, 7.0, 7.0]), step) for step, share in enumerate([0.3, 0.5, 0.6, 0.6])]
        [None, False, None, True]
        >>> maturity.opened
        4
    """

    def __init__(self, threshold: float, window: int) -> None:
        self.threshold = threshold
        self.window = window
        self.opened: int | None = None
        self._windows: deque[tuple[float, ...]] = deque(maxlen=_SETTLED_WINDOWS)
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, values: Tensor, step: int) -> bool | None:
        """Count a training step.

        Args:
            values: ``(3,)``, of `watched`.
            step: Optimizer steps taken so far.

        Returns:
            Whether the host is mature at the end of a window, None in between.

        Example:
            >>> Maturity(0.5, window=50).add(torch.tensor([0.9, 7.0, 7.0]), step=0) is None
            True
        """
        values = values.detach().float()
        self._sum = values if self._sum is None else self._sum.to(values.device) + values
        self._count += 1
        if self._count < self.window:
            return None
        # All ranks have to come to the same verdict.
        self._windows.append(tuple(mean_over_ranks(self._sum / self._count).tolist()))
        self._sum, self._count = None, 0
        if not self._agrees() and not self._settled():
            return False
        # Batches that are accumulated into one optimizer step share its phase.
        self.opened = step + 1
        return True

    @property
    def latest(self) -> tuple[float, ...] | None:
        """What the last window gave.

        Returns:
            Agreement, slots in use of the encoder and of the decoder; None before the first window has ended.

        Example:
            >>> Maturity(0.5, 50).latest is None
            True
        """
        return self._windows[-1] if self._windows else None

    def _agrees(self) -> bool:
        agreement, *used = self._windows[-1]
        return agreement >= self.threshold and min(used) >= _LEAST_SLOTS

    def _settled(self) -> bool:
        if len(self._windows) < _SETTLED_WINDOWS:
            return False
        agreement, *used = self._windows[-1]
        shares, *slots = zip(*self._windows, strict=True)
        return (
            min(used) >= _LEAST_SLOTS
            and agreement >= _TIMES_CHANCE / min(used)
            and max(shares) - min(shares) <= _AGREEMENT_SPREAD
            and all(max(counts) - min(counts) <= _SLOTS_SPREAD for counts in slots)
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs.

        Returns:
            Plain numbers.

        Example:
            >>> Maturity(0.5, 50).state_dict()
            {'opened': None, 'windows': [], 'sum': None, 'count': 0}
        """
        return {
            "opened": self.opened,
            "windows": [list(window) for window in self._windows],
            "sum": None if self._sum is None else self._sum.tolist(),
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state: What `state_dict` returned.

        Example:
            >>> maturity = Maturity(0.5, 50)
            >>> maturity.load_state_dict({**maturity.state_dict(), "opened": 7})
            >>> maturity.opened
            7
        """
        self.opened = None if state["opened"] is None else int(state["opened"])
        self._windows = deque((tuple(map(float, window)) for window in state["windows"]), maxlen=_SETTLED_WINDOWS)
        self._sum = None if state["sum"] is None else torch.tensor(state["sum"])
        self._count = int(state["count"])
