"""Any host whose two maps go through a softmax over the slots, whatever its modules return."""

from __future__ import annotations

from typing import ClassVar

from ssync_pl.adapters.paths import PathAdapter
from ssync_pl.errors import ConfigError

__all__ = ["SoftmaxTapAdapter"]


class SoftmaxTapAdapter(PathAdapter):
    """Reads both maps from the softmaxes inside named modules: ``PathAdapter("softmax:a", "softmax:b")``, and more.

    Args:
        attention: Path of the slot attention, a module that runs once a frame, around the iterations; ``"."`` is the
            whole training step.
        masks: Path of the decoder.
        slots: S. None finds it: the axis that both sides share. Naming it keeps the host's other softmaxes, such as
            those of a transformer, from being held until the end of the step.
        attention_axis: Axis of the slots in the input of the attention's softmax; None finds it.
        masks_axis: The same for the masks.
        grid: ``(H, W)`` patches; None reads it off the maps or the size of the batch's frames, or takes a square.

    Raises:
        ConfigError: ``slots`` is not a positive integer, or a path or ``grid`` is not understood.

    Example:
        >>> SoftmaxTapAdapter("slot_attention", "decoder", slots=7, masks_axis=1).places[1].text
        'softmax:decoder:1'
    """

    name: ClassVar[str] = "softmax_tap"

    def __init__(
        self,
        attention: str,
        masks: str,
        slots: int | None = None,
        attention_axis: int | None = None,
        masks_axis: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        if slots is not None and (not isinstance(slots, int) or slots < 1):
            raise ConfigError(f"Expected argument `slots` to be None or a positive integer, but got {slots!r}.")
        super().__init__(_place(attention, attention_axis), _place(masks, masks_axis), "logits", "logits", grid)
        self.slots = slots


def _place(path: str, axis: int | None) -> str:
    return f"softmax:{path}" if axis is None else f"softmax:{path}:{axis}"
