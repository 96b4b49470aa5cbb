"""Slots of a window's last frame, handed on as the first slots of the next window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
from torch import Tensor, nn

from ssync_pl.tools.predict.joined import WINDOW_KEY

__all__ = ["CarrySlots", "carries_slots"]


def carries_slots(host: nn.Module) -> bool:
    """Say whether a host can start a clip from given slots.

    Args:
        host: Any model. It can when its attribute `carries_slots` is true: then `host.initializer(...)` gives the first
            slots (B, S, D) of a clip, and `host(...).slots` (B, T, S, D) are those of each frame.

    Returns:
        Whether it can.

    Example:
        >>> from ssync_pl.hosts import SAVi
        >>> carries_slots(SAVi(num_slots=2, slot_dim=8)), carries_slots(nn.Linear(1, 1))
        (True, False)
    """
    return bool(getattr(host, "carries_slots", False)) and isinstance(getattr(host, "initializer", None), nn.Module)


class CarrySlots(L.Callback):
    """Let each window of a video begin with the slots that the window before ended with.

    The shared frame is corrected once more from its own slots, so that slots keep their objects. Hosts that cannot
    start from given slots are left alone: their windows are only matched (`match_slots`).

    Example:
        >>> CarrySlots().slots is None
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.slots: Tensor | None = None
        self._handles: list[Any] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to the host."""
        self.slots = None
        if carries_slots(pl_module):
            initializer: Any = pl_module.initializer
            self._handles = [
                initializer.register_forward_hook(self._begin),
                pl_module.register_forward_hook(self._end),
            ]

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Forget the slots where another video begins."""
        window = batch.get(WINDOW_KEY) if isinstance(batch, Mapping) else None
        if window is None or window["start"] == 0:
            self.slots = None

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the host as it was."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the host as it was."""
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self.slots = [], None

    def _begin(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if self.slots is None else self.slots.to(output.dtype)

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.slots = output.slots[:, -1].detach()
