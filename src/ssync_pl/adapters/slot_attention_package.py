"""Adapter of models that are built around the `slot-attention` package from PyPI."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.adapters.agreement import check_close
from ssync_pl.adapters.base import HostAdapter, frame_size, register_adapter
from ssync_pl.adapters.capture import submodule
from ssync_pl.adapters.pairing import MapKind, Pair, Seen, find_pair, join_maps
from ssync_pl.adapters.paths import Pick, Place, parse_place
from ssync_pl.adapters.projections import Projection, StartOfCall, require_projections, take_projection
from ssync_pl.adapters.tap import Softmaxes, TapCapture
from ssync_pl.errors import ConfigError, HostError
from ssync_pl.method.maps import SSyncMaps

__all__ = ["SlotAttentionPackageAdapter"]

_WHOLE_STEP = "softmax:."


@register_adapter
class SlotAttentionPackageAdapter(HostAdapter):
    """Models around one ``SlotAttention`` or ``MultiHeadSlotAttention`` of the package, with any decoder.

    The package returns slots and no map. Logits are computed again from its last query and its keys; several heads,
    which have a softmax over slots each, count as their mean. The decoder is the user's own: by default, the last
    softmax over these slots in the training step gives its masks; a decoder that runs once a frame has to be named. In
    an ``AdaptiveSlotWrapper``, slots that are not kept do not exist, and an image that keeps none is left out.

    Note:
        The package samples new slots in every call: slot 3 of one frame is not slot 3 of the next. Every frame is
        therefore a clip of its own (T = 1), also where frames of a video are folded into the batch or come one after
        another; labels are compared and merged inside a frame.

    Args:
        attention: Dotted path of the module; None finds it, where there is exactly one.
        masks: Where the decoder's masks are: ``"path"`` or ``"path:key"`` for a module's output, ``"softmax:path"`` for
            what a module feeds to a softmax over slots; ``"softmax:."`` listens to the whole training step. The map is
            ``(B, S, N)``, ``(B, S, H, W)`` or ``(B, S, 1, H, W)``, with B or B · T in front.
        masks_kind: What a module's output is: ``"probs"`` or ``"logits"``.
        alpha_axis: Axis of a module's output on which the last entry is the logit of the mask, beside the colours: 1
            for ``(B * S, 4, H, W)``, -1 for ``(B * S, H, W, 4)``. None: the output is the map itself.
        grid: ``(H, W)`` patches of the attention; None takes it from the masks or the size of the batch's frames, or a
            square.

    Raises:
        ConfigError: An argument is not understood, or they contradict each other.

    Example:
        >>> adapter = SlotAttentionPackageAdapter(masks="decoder", alpha_axis=1, grid=(16, 16))
        >>> adapter.match(nn.Identity())
        False

    Source: Object-Centric Learning with Slot Attention (arXiv 2006.15055); adaptive slots: AdaSlot (arXiv 2406.09196).
    """

    name: ClassVar[str] = "slot-attention"

    def __init__(
        self,
        attention: str | None = None,
        masks: str = _WHOLE_STEP,
        masks_kind: MapKind = "probs",
        alpha_axis: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        if masks_kind not in ("logits", "probs"):
            raise ConfigError(f"Expected argument `masks_kind` to be 'logits' or 'probs', but got {masks_kind!r}.")
        if grid is not None and (len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid)):
            raise ConfigError(f"Expected argument `grid` to be (H, W), two positive integers, but got {grid!r}.")
        self.masks = parse_place(masks)
        if alpha_axis is not None and self.masks.softmax:
            raise ConfigError(
                f"Expected `alpha_axis` only with the output of a module, but got masks={masks!r}, whose softmax is "
                "over the map itself. Name the decoder: masks='path'."
            )
        self.attention = attention
        self.masks_kind: MapKind = masks_kind if alpha_axis is None else "logits"
        self.alpha_axis = alpha_axis
        self.grid = grid

    def match(self, host: nn.Module) -> bool:
        """Whether there is the one module of the package inside the host, and the decoder that was named.

        Args:
            host: The model that is trained.

        Returns:
            True by structure; names of classes do not matter.

        Example:
            >>> SlotAttentionPackageAdapter().match(nn.Linear(1, 1))
            False
        """
        try:
            self._attention(host)
            self.masks.module(host)
        except HostError:
            return False
        return True

    def attach(self, host: nn.Module) -> TapCapture:
        """Listen to the slot attention, its projections and update, and to the decoder.

        Args:
            host: The model that is trained.

        Returns:
            A closed capture.

        Raises:
            HostError: The module of the package is not there, or there are several; the decoder is not there; or a
                ``MetaSlotAttention`` puts the slots in another order.

        Example:
            >>> SlotAttentionPackageAdapter().attach(nn.Identity())  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected one module of the `slot-attention` package inside Identity, but got ...
        """
        module = self._attention(host)
        _refuse_reordered(host, module)
        capture = TapCapture()
        keys = ("to_k", "to_v", "to_q", "update")
        capture.watch("to_k", submodule(module, "to_k"), StartOfCall(capture, keys))
        capture.watch("to_v", submodule(module, "to_v"), take_projection)
        capture.watch("to_q", submodule(module, "to_q"), take_projection)
        # With several heads, the update passes through a projection before it reaches the cell.
        end = "combine_heads" if _heads(module) else "gru"
        capture.watch_input("update", submodule(module, end), _first_input)
        capture.watch("attention", module, _Attention(capture))
        wrapper = _wrapper(host, module)
        if wrapper is not None:
            capture.watch("kept", wrapper, _kept)
        if self.masks.softmax:
            tap = capture.tap_window if self.masks.path == "." else capture.tap
            tap("masks", self.masks.module(host), axis=self.masks.axis)
            capture.tap("own softmax", module)
        else:
            capture.watch("masks", self.masks.module(host), Pick(self.masks))
        return capture

    def collect(self, capture: Any, batch: Any = None) -> SSyncMaps:
        """Bring both maps to one grid, with each frame as a clip.

        Args:
            capture: Filled by one training step.
            batch: The batch of that step.

        Returns:
            Maps ``(B, 1, S, N)``, attached to the graph; B counts frames.

        Raises:
            HostError: The number of slots changes inside the step, no masks over these slots were seen, their order is
                not known, or there is no one grid.

        Example:
            >>> capture = SlotAttentionPackageAdapter().collect  # called once a training step
        """
        calls: list[_Call] = capture["attention"]
        shapes = sorted({tuple(call.logits.shape) for call in calls})
        if len(shapes) != 1:
            raise HostError(
                f"Expected one number of frames and slots in all calls of a step, but got maps of {shapes}."
            )
        heads = calls[0].logits.ndim == 4
        attention = Seen([call.logits for call in calls], 2 if heads else 1, "logits", "attention", heads=heads)
        pair = find_pair([attention], self._masks(capture, attention))
        if pair is None:
            raise HostError(
                f"Expected '{self.masks.text}' to give masks over the slots of attention maps {shapes[0]} in "
                f"{len(calls)} call(s), but it gave {self._seen(capture)}. Name the decoder, which has to run as often "
                "as the slot attention: SlotAttentionPackageAdapter(masks='path:key')."
            )
        _refuse_unknown_order(pair)
        maps = join_maps(pair, self.grid, frame_size(batch))
        slot_valid, patch_valid = _existing(capture, maps)
        return SSyncMaps(
            attention_logits=_frames(maps.attention_logits),
            attention_probs=_among(_frames(maps.attention_probs), slot_valid),
            mask_logits=_frames(maps.mask_logits),
            mask_probs=_among(_frames(maps.mask_probs), slot_valid),
            grid=maps.grid,
            slot_valid=slot_valid,
            patch_valid=patch_valid,
        )

    def verify(self, capture: Any, maps: SSyncMaps) -> None:
        """Compare with the update of the slots, which is all that the package makes of its attention.

        Args:
            capture: Filled by one training step.
            maps: What `collect` made of it; not needed.

        Raises:
            HostError: The mean of the values, weighted by the softmax of the logits, is not what went on to the slots.

        Example:
            >>> verify = SlotAttentionPackageAdapter().verify  # called in the first step
        """
        calls: list[_Call] = capture["attention"]
        for call in calls:
            with torch.no_grad(), call.values.precision():
                weights = call.logits.softmax(-2) + call.eps
                weights = weights / weights.sum(-1, keepdim=True)
                mine = weights.to(call.values.value.dtype) @ call.values.value
                mine = mine.movedim(1, 2).flatten(2) if mine.ndim == 4 else mine
            check_close(
                mine.reshape(call.update.shape),
                call.update,
                "update of the slots in the slot attention",
                "the mean of its values weighted by the softmax over slots",
                scale=float(call.values.value.detach().abs().max()),
            )

    def _attention(self, host: nn.Module) -> nn.Module:
        if self.attention is not None:
            module = submodule(host, self.attention)
            if not _is_package(module):
                raise HostError(
                    f"Expected a SlotAttention or MultiHeadSlotAttention of the `slot-attention` package at "
                    f"'{self.attention}', but got {type(module).__name__}. Use "
                    "SSyncCallback(attention=..., masks=...) for modules of your own."
                )
            return module
        found = [(path, module) for path, module in host.named_modules() if path and _is_package(module)]
        if len(found) == 1:
            return found[0][1]
        places = ", ".join(f"'{path}'" for path, _ in found) or "none"
        raise HostError(
            f"Expected one module of the `slot-attention` package inside {type(host).__name__}, but got {places}. "
            "Name it: SlotAttentionPackageAdapter(attention='path')."
        )

    def _masks(self, capture: Any, attention: Seen) -> list[Seen]:
        first, count = attention.values[0], len(attention.values)
        frames, slots = first.shape[0], first.shape[attention.axis]
        if self.masks.softmax:
            calls: list[Softmaxes] = capture["masks"]
            own = {id(value) for call in capture["own softmax"] for value in call.values()}
            # The package's own softmax is heard as well; the same tensor cannot be both maps.
            found = [
                {key: value for key, value in call.items() if key[0][key[1]] == slots and id(value) not in own}
                for call in calls
            ]
            found = [call for call in found if call]
            common = [key for key in found[-1] if all(key in call for call in found)] if found else []
            return [Seen([c[key] for c in found], key[1], "logits", self.masks.text, heads=False) for key in common]
        values: list[Tensor] = capture["masks"]
        if self.alpha_axis is not None:
            values = [_last_entry(value, self.alpha_axis, self.masks) for value in values]
        for folded in (frames * slots, frames * slots * count):
            if all(value.shape[0] == folded for value in values):
                values = [value.unflatten(0, (-1, slots)) for value in values]
                break
        if len({value.shape for value in values}) != 1:
            return []
        axes = [axis for axis in (1, 2) if axis < values[0].ndim - 1 and values[0].shape[axis] == slots]
        return [Seen(values, axis, self.masks_kind, self.masks.text, heads=False) for axis in axes]

    def _seen(self, capture: Any) -> str:
        if self.masks.softmax:
            shapes = [f"{shape} over axis {axis}" for call in capture["masks"] for shape, axis in call]
            return f"softmaxes of {', '.join(sorted(set(shapes)))}" if shapes else "no softmax"
        return f"{sorted({tuple(value.shape) for value in capture['masks']})}"


class _Call(NamedTuple):
    """One call of the slot attention: logits (B, S, N) or (B, heads, S, N), values, and the update it made of them."""

    logits: Tensor
    values: Projection
    update: Tensor
    eps: float


class _Attention:
    """Logits of one call: the last query with the keys, times the scale, in the order and precision of the package."""

    def __init__(self, capture: TapCapture) -> None:
        self.capture = capture

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> _Call:
        require_projections(self.capture, module, "to_q", "to_v", "update")
        query, key, values = (self.capture[name][-1] for name in ("to_q", "to_k", "to_v"))
        split = module.split_heads if _heads(module) else nn.Identity()
        with query.precision():
            logits = torch.einsum("...sd,...nd->...sn", split(query.value), split(key.value)) * module.scale
        values = values._replace(value=split(values.value))
        return _Call(logits, values, self.capture["update"][-1], float(module.eps))


def _existing(capture: Any, maps: SSyncMaps) -> tuple[Tensor | None, Tensor | None]:
    """Slots that a wrapper keeps, and patches of images that keep any."""
    try:
        kept: list[Tensor] = capture["kept"]
    except KeyError:
        return None, None
    batch, frames, slots, patches = maps.shape
    valid = torch.stack(kept, dim=1).reshape(batch * frames, slots) > 0.5
    return valid, valid.any(1)[:, None, None].expand(-1, 1, patches)


def _frames(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.flatten(0, 1).unsqueeze(1)


def _among(probs: Tensor | None, slot_valid: Tensor | None) -> Tensor | None:
    if probs is None or slot_valid is None:
        return probs
    probs = probs.masked_fill(~slot_valid[:, None, :, None], 0.0)
    return probs / probs.sum(2, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)


def _refuse_unknown_order(pair: Pair) -> None:
    calls = len(pair.attention.values)
    if calls > 1 and len(pair.masks.values) == 1 and pair.masks_layout.frames is None:
        raise HostError(
            f"Expected to know which frame is which, but the slot attention ran {calls} times and the decoder once, on "
            "frames folded into its batch, videos first or frames first. Call the slot attention once on the folded "
            "frames, or the decoder once a frame."
        )


def _last_entry(value: Tensor, axis: int, place: Place) -> Tensor:
    if not -value.ndim <= axis < value.ndim:
        raise HostError(f"Expected '{place.text}' to have an axis {axis}, but got {tuple(value.shape)}.")
    return value.select(axis, -1)


def _wrapper(host: nn.Module, module: nn.Module) -> nn.Module | None:
    return _parent(host, module, "slot_attn", "pred_keep_slot")


def _refuse_reordered(host: nn.Module, module: nn.Module) -> None:
    if _parent(host, module, "slot_attention", "vq") is not None:
        raise HostError(
            "Expected the decoder's slots to be those of the slot attention, but a MetaSlotAttention averages slots of "
            "one code and packs the rest to the front, so that no slot keeps its place. Leave it out, or give the "
            "attention of its own slots out of your model: SSyncCallback(attention=..., masks=...)."
        )


def _parent(host: nn.Module, module: nn.Module, place: str, other: str) -> nn.Module | None:
    for parent in host.modules():
        if getattr(parent, place, None) is module and isinstance(getattr(parent, other, None), nn.Module):
            return parent
    return None


def _kept(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    return output[1].detach()


def _first_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0]


def _heads(module: nn.Module) -> bool:
    return isinstance(getattr(module, "split_heads", None), nn.Module)


def _is_package(module: nn.Module) -> bool:
    children = ("to_q", "to_k", "to_v", "gru", "norm_input", "norm_slots", *(("combine_heads",) * _heads(module)))
    return all(isinstance(getattr(module, name, None), nn.Module) for name in children) and all(
        hasattr(module, name) for name in ("slots_mu", "slots_logsigma", "scale", "eps")
    )
