"""Spec of SOLV: the public code's model and this package's host."""

import functools
import random
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.adapters.base import HostAdapter, register_adapter
from ssync_pl.adapters.calls import check_close, watch_softmax
from ssync_pl.adapters.capture import NAME_THEM, Capture, has_modules, output_entry
from ssync_pl.errors import HostError
from ssync_pl.method.labels import compute_dtype
from ssync_pl.method.maps import SSyncMaps


class _Bound(NamedTuple):
    """The binder's logits ``(B, T, S, N')`` and the tokens' places ``(B, T, N')``."""

    logits: Tensor
    indices: Tensor | None = None


@register_adapter
class SolvAdapter(HostAdapter):
    """SOLV looks at a window of frames, and decodes the frame in its centre: T = 1.

    * Slots are merged. The logits of a merged slot are the logsumexp of its members': its softmax over slots is the
      members' summed attention. Slots that are left over count as invalid (``slot_valid``).
    * A part of the tokens is dropped: patches without attention count as invalid (``patch_valid``).

    The public model's merger keeps the assignment to itself, which is read off the gradient of its result; where there
    is none (validation), the merger is run once more on the same slots with the same random numbers. When this
    package's host is evaluated, all frames come, as probabilities.

    Source: Self-supervised Object-Centric Learning for Videos (arXiv 2310.06907).
    """

    name: ClassVar[str] = "solv"

    def match(self, host: nn.Module) -> bool:
        return _is_packaged(host) or _is_public(host)

    def attach(self, host: Any) -> Capture:
        capture = Capture()
        if _is_packaged(host):
            capture.facts["grid"] = (int(host.grid[0]), int(host.grid[1]))
            bound = lambda module, args, out: _Bound(out.logits, *args[1:2])  # noqa: E731
            capture.watch("binder", host.spatial_binder, bound)
            capture.watch("merger", host.merger, lambda module, args, out: (args[0], out.slots, out.members))
            capture.watch("decoder", host.decoder, lambda module, args, output: output.mask_logits)
            return capture
        if not _is_public(host):
            raise HostError(
                f"Expected {type(host).__name__} to have a binder `s_bind` with `Q`, `f` and `scale`, and a decoder "
                f"`dec`, but it does not. {NAME_THEM}"
            )
        binder, slots = host.s_bind, int(host.s_bind.num_slots)
        capture.facts["grid"] = (int(binder.res_h), int(binder.res_w))
        watch_softmax(capture, "dots", binder)
        capture.watch("binder", binder, functools.partial(_bound_centre, capture))
        if getattr(host, "merge_slots", False):
            given = lambda module, args, kwargs: (args[0], random.getstate())  # noqa: E731
            capture.watch("merged", host.merge, given, inputs=True)
            capture.watch("merger", host.merge, functools.partial(_merged, capture))
        capture.watch("decoder", host.dec, lambda module, args, out: out[..., -1].unflatten(0, (-1, slots))[:, None])
        capture.watch("host masks", host, lambda module, args, output: output_entry(output, "mask"), optional=True)
        return capture

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        bound: _Bound = capture.only("binder")
        masks = torch.cat(capture["decoder"], dim=1) if capture["decoder"] else torch.empty(0)
        if masks.ndim == 4 and masks.shape[1] == 1:
            centre = bound.logits.shape[1] // 2
            bound = _Bound(*(None if value is None else value[:, centre, None] for value in bound))  # type: ignore[arg-type]
        grid = capture.facts["grid"]
        videos, frames, slots, _ = bound.logits.shape
        patches = grid[0] * grid[1]
        if masks.shape != (videos, frames, slots, patches):
            wanted, calls = (videos, frames, slots, patches), len(capture["decoder"])
            raise HostError(
                f"Expected the decoder to give masks {wanted}, but got {tuple(masks.shape)}, {calls} call(s)."
            )
        members = capture.only("merger")[2] if "merger" in capture else None
        logits = bound.logits if members is None else merge_member_logits(bound.logits, members)
        valid = None if members is None else members.any(3)
        logits, patch_valid = scatter_tokens(logits, bound.indices, patches)
        if frames > 1:
            attention, drawn = _probabilities(logits, valid), _probabilities(masks, valid)
            return SSyncMaps(attention_probs=attention, mask_probs=drawn, grid=grid, patch_valid=patch_valid)
        slot_valid = None if valid is None else valid[:, 0]
        return SSyncMaps(logits, masks, grid=grid, slot_valid=slot_valid, patch_valid=patch_valid)

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        if "merger" in capture:
            given, slots, members = capture.only("merger")
            share = members.double() / members.sum(3, keepdim=True).clamp_min(1)
            _check("slots of the merger", share @ given.double(), slots, given)
        own = capture.last("host masks")
        if own is not None and maps.mask_logits is not None:
            valid = None if maps.slot_valid is None else maps.slot_valid[:, None]
            mine = _probabilities(maps.mask_logits.double(), valid)
            _check("masks of the host", mine, own.unsqueeze(1), maps.mask_logits)


def merge_member_logits(logits: Tensor, members: Tensor) -> Tensor:
    """Gives the attention logits ``(B, T, S, N)`` of slots that stand for several.

    Where ``members[..., i, j]``, ``(B, T, S, S)`` bool, slot j went into merged slot i, whose softmax over slots sums
    the members' probabilities. A slot with one member keeps its logits to the bit; one without is 0, with no gradient.
    """
    logits = logits.to(compute_dtype(logits.dtype))
    empty = ~members.any(3, keepdim=True)
    # The gradient of a logsumexp over minus infinities alone is NaN, so that slots without members take all.
    absent = ~(members | empty).unsqueeze(-1)
    merged = logits.unsqueeze(2).masked_fill(absent, float("-inf")).logsumexp(3)
    return merged.masked_fill(empty, 0.0)


def scatter_tokens(logits: Tensor, indices: Tensor | None, patches: int) -> tuple[Tensor, Tensor | None]:
    """Puts kept tokens ``(B, T, S, N')`` in their places ``(B, T, N')`` on the grid, with 0 elsewhere.

    Also returns which patches have a token, ``(B, T, N)`` bool; None when all have.
    """
    if indices is None:
        return logits, None
    places = indices.unsqueeze(2).expand(-1, -1, logits.shape[2], -1)
    spread = logits.new_zeros(*logits.shape[:3], patches).scatter(3, places, logits)
    if indices.shape[2] == patches:
        return spread, None
    valid = torch.zeros(*indices.shape[:2], patches, dtype=torch.bool, device=indices.device)
    return spread, valid.scatter(2, indices, True)


def _bound_centre(capture: Capture, module: Any, args: tuple[Any, ...], output: Any) -> _Bound:
    """Logits of the frames in the centre of their windows, and their tokens' places, of those of all frames."""
    radius = int(module.N_frame)
    every = (capture.last("dots").logits, args[1])
    logits, indices = (value.unflatten(0, (-1, 2 * radius + 1))[:, radius, None] for value in every)
    return _Bound(logits, indices)


def _merged(capture: Capture, module: nn.Module, args: tuple[Any, ...], output: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What went into the merger and came out, ``(B, T, S, D)``, and which slots it put together, ``(B, T, S, S)``."""
    (given, state), slots = capture.last("merged"), output[0]
    members = _members_by_gradient(given, slots)
    if members is None:
        members = _members_by_repetition(module, given, state)
    return given.unsqueeze(1), slots.unsqueeze(1), members.unsqueeze(1)


def _members_by_gradient(given: Tensor, slots: Tensor) -> Tensor | None:
    """Merged slots are means, so that their derivative by the given slots is positive exactly for members."""
    videos, count, channels = slots.shape
    if count > channels or not (slots.requires_grad and given.requires_grad):
        return None
    # One channel for each merged slot reads the whole assignment in one backward pass through the merger.
    probe = torch.eye(count, channels, device=slots.device, dtype=slots.dtype).expand(videos, -1, -1)
    (share,) = torch.autograd.grad(slots, given, probe, retain_graph=True, allow_unused=True)
    return None if share is None else share[..., :count].transpose(1, 2) > 0


def _members_by_repetition(module: Any, given: Tensor, state: Any) -> Tensor:
    """Merge once more, with attention that names the slots, and with the random numbers of the first time."""
    count = given.shape[1]
    names = torch.eye(count, device=given.device, dtype=given.dtype).expand(len(given), -1, -1)
    now = random.getstate()
    random.setstate(state)
    try:
        with torch.no_grad():
            _, share, numbers = type(module).forward(module, given, names)  # around the hooks
    finally:
        random.setstate(now)
    # What is left over has the same share of all names: a small constant, normalised.
    valid = torch.arange(count, device=given.device) < numbers.to(given.device).unsqueeze(1)
    return (share > 0.5 / count) & valid.unsqueeze(2)


def _is_packaged(host: nn.Module) -> bool:
    return any(cls.__name__ == "SOLV" and cls.__module__.startswith("ssync_pl.hosts") for cls in type(host).__mro__)


def _is_public(host: nn.Module) -> bool:
    if not has_modules(
        host, "s_bind.Q", "s_bind.f", "dec", *(["merge"] if getattr(host, "merge_slots", False) else [])
    ):
        return False
    return all(hasattr(host.s_bind, name) for name in ("scale", "num_slots", "res_h", "res_w", "N_frame"))


def _probabilities(logits: Tensor, valid: Tensor | None) -> Tensor:
    logits = logits.to(compute_dtype(logits.dtype))
    if valid is not None:
        logits = logits.masked_fill(~valid.unsqueeze(-1), float("-inf"))
    return logits.softmax(2)


def _check(what: str, mine: Tensor, own: Tensor, source: Tensor) -> None:
    scale = float(own.detach().abs().max())
    check_close(mine, own, what, "what its parts give", scale, tolerance=4 * torch.finfo(source.dtype).eps * scale)
