"""An adapter by a short spec: where attention and decoder are in a family of hosts, and how their logits come about."""

import math
import operator
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ssync_pl.adapters import grids
from ssync_pl.adapters.base import HostAdapter
from ssync_pl.adapters.calls import MapCall
from ssync_pl.adapters.capture import NAME_THEM, Capture, describe, has_modules, submodule
from ssync_pl.adapters.grids import Grid, SlotMap, frame_size, stack_frames
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps


class SlotModelAdapter(HostAdapter):
    """Adapter by a short spec: which modules a family has, and in `listen` how their logits come about.

    The attention runs once per frame and gives a `MapCall` of ``(B, S, N)`` or ``(B, heads, S, N)``; the decoder gives
    one of ``(..., S, N)`` or ``(..., S, h, w)``, in which any axes may be folded into the batch. Collecting and the
    self-check are the same for all.
    """

    modules: ClassVar[str] = ""
    """Dotted paths by which a host of the family is recognised, with spaces between them."""
    attributes: ClassVar[str] = ""
    """The same for what else it has, such as ``"corrector.scale"``."""
    attention: ClassVar[str] = "attention"
    """Key of the slot attention's calls; where the family has one path, that path."""
    decoder: ClassVar[str] = "decoder"
    """Key of the decoder's calls."""
    features: ClassVar[str | None] = None
    """Path of the module whose output tells the grid of the patches; None takes it from the size of the frames."""
    decoder_calls: ClassVar[Literal["one", "frames", "first"]] = "one"
    """One call per step; or also one per frame; or the first counts, where others draw other slots."""
    frames_are_clips: ClassVar[bool] = False
    """Whether slots have no identity in time, so that each frame is a clip of its own."""
    grid: Grid | None = None

    def match(self, host: nn.Module) -> bool:
        if not has_modules(host, *self.modules.split()):
            return False
        try:
            return all(operator.attrgetter(path)(host) is not None for path in self.attributes.split())
        except AttributeError:
            return False

    def needs(self) -> str:
        """What a host needs to match, in words."""
        return ", ".join(f"{self.modules} {self.attributes}".split())

    @abstractmethod
    def listen(self, host: Any, capture: Capture) -> None:
        """Puts the hooks of the spec on a host: they record `MapCall` under the keys ``attention`` and ``decoder``.

        What is recorded under ``exist`` in each call of the attention are the slots that exist, ``(B, S)``, or None.
        """

    def attach(self, host: nn.Module) -> Capture:
        if not self.match(host):
            raise HostError(f"Expected {type(host).__name__} to have {self.needs()}, but it does not. {NAME_THEM}")
        capture = Capture()
        if self.features is not None:
            capture.watch(self.features, submodule(host, self.features), self.feature_grid)
        self.listen(host, capture)
        return capture

    @staticmethod
    def feature_grid(module: nn.Module, args: tuple[Any, ...], output: Any) -> Grid:
        """A `take` that reads the grid off what the ``features`` module gives: height and width of ``(B, C, h, w)``."""
        if not isinstance(output, Tensor) or output.ndim != 4:
            kind = type(module).__name__
            raise HostError(f"Expected {kind} to return a feature map (B * T, C, H, W), but got {describe(output)}.")
        return int(output.shape[-2]), int(output.shape[-1])

    def calls(self, capture: Capture) -> tuple[list[MapCall], list[MapCall]]:
        """Calls of the slot attention, with the slots that exist where `listen` recorded these, and of the decoder."""
        calls: list[MapCall] = capture[self.attention]
        if "exist" in capture:
            calls = [call._replace(valid=exist) for call, exist in zip(calls, capture["exist"], strict=True)]
        return calls, capture[self.decoder]

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        calls, drawn = self.calls(capture)
        logits = stack_frames([call.logits for call in calls if call.logits is not None], self.attention)
        shape = (*logits.shape[:2], *logits.shape[-2:])
        masks, probs = self._masks(drawn, shape), drawn[0].logits is None
        present = [call.valid for call in calls if call.valid is not None]
        valid = torch.stack(present, 1) if present else None
        if self.frames_are_clips:
            logits, masks = (value.flatten(0, 1).unsqueeze(1) for value in (logits, masks))
            valid = None if valid is None else valid.flatten(0, 1).unsqueeze(1)
        grid = self._grid(capture, batch, shape[3], masks)
        size = _rows_and_columns(masks) or (
            grid if masks.shape[3] == shape[3] else grids.finer_grid(grid, masks.shape[3])
        )
        masks, some = masks.flatten(3), None
        if valid is not None:
            valid = valid.all(1)
            # Where no slot is left there is nothing to learn from, and a softmax over nothing is NaN.
            some = valid.any(1, keepdim=True).expand(logits.shape[:2])
            if size != grid or logits.ndim == 5:
                # Blocks and heads are averaged as probabilities: absent slots must have none, unless no slot is left.
                absent = (valid.any(1, keepdim=True) & ~valid)[:, None, :, None]
                logits = logits.masked_fill(absent[:, None] if logits.ndim == 5 else absent, float("-inf"))
                masks = masks.masked_fill(absent, 0.0 if probs else float("-inf"))
                masks = masks / masks.sum(2, keepdim=True).clamp_min(torch.finfo(masks.dtype).tiny) if probs else masks
        attention = grids.separate_heads(logits, 2, 3) if logits.ndim == 5 else SlotMap(logits)
        return grids.join_sides(attention, grid, SlotMap(None, masks) if probs else SlotMap(masks), size, valid, some)

    def _masks(self, calls: list[MapCall], shape: tuple[int, ...]) -> Tensor:
        """The decoder's map as ``(B, T, S, N)`` or ``(B, T, S, h, w)``."""
        if self.decoder_calls == "one" and len(calls) != 1:
            times = f"it ran {len(calls)} times"
            raise HostError(f"Expected '{self.decoder}' to run once inside the training step, but {times}.")
        values = [call.own if call.logits is None else call.logits for call in calls]
        stacked = self.decoder_calls == "frames" and len(values) > 1
        value: Any = stack_frames(values, self.decoder) if stacked else values[0]  # type: ignore[arg-type]
        axis = calls[0].axis + stacked
        rows = math.prod(value.shape[: axis + 1])
        if rows != math.prod(shape[:3]) or (axis and value.shape[axis] != shape[2]):
            raise HostError(
                f"Expected '{self.decoder}' to draw the {' x '.join(map(str, shape[:3]))} slots (B, T, S) that the "
                f"slot attention saw, but it ran on {' x '.join(map(str, value.shape[: axis + 1]))}, so either may run "
                "more than once per frame. Write a HostAdapter that picks the calls."
            )
        return value.reshape(*shape[:3], *value.shape[axis + 1 :])

    def _grid(self, capture: Capture, batch: Any, patches: int, masks: Tensor) -> Grid:
        if self.features is not None:
            return capture[self.features][0]
        drawn = _rows_and_columns(masks)
        fits = (size for size in (capture.facts.get("grid"), drawn) if size is not None and math.prod(size) == patches)
        frame = frame_size(batch) or drawn
        return grids.resolve_grid(patches, self.grid or next(fits, None), capture.facts.get("patch_size"), frame)


class GridAdapter(SlotModelAdapter):
    """A spec of hosts whose grid cannot always be found.

    Args:
        grid: ``(H, W)`` patches of the slot attention. None takes the host's own ``grid`` where it states one, or it
            follows from the size of the batch's frames and the patch size of the encoder, or is a square.
    """

    def __init__(self, grid: Grid | None = None) -> None:
        self.grid = grids.check_grid(grid)


def _rows_and_columns(masks: Tensor) -> Grid | None:
    return (int(masks.shape[-2]), int(masks.shape[-1])) if masks.ndim == 5 else None
