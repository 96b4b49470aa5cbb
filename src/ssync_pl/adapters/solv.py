"""Adapter of SOLV: the public code's model and this package's host."""

from __future__ import annotations

import random
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.adapters.base import HostAdapter, register_adapter
from ssync_pl.adapters.capture import Capture, submodule
from ssync_pl.adapters.projections import Projection, take_projection
from ssync_pl.errors import HostError
from ssync_pl.method.labels import compute_dtype
from ssync_pl.method.maps import SSyncMaps

__all__ = ["SolvAdapter", "merge_member_logits", "scatter_tokens"]

# Of the public code: added to the attention before it is normalised over tokens.
_EPSILON = 1e-8


@register_adapter
class SolvAdapter(HostAdapter):
    """SOLV looks at a window of frames, and decodes the frame in its centre: T = 1.

    The encoder's map is the centre frame's slot attention, last query · key · ``scale`` of the spatial binder. Two
    things lie between it and the decoder's masks:

    * Slots are merged. The logits of a merged slot are the logsumexp of its members': its softmax over slots is the
      members' summed attention. Slots that are left over count as invalid (``slot_valid``).
    * A part of the tokens is dropped. Their patches have masks but no attention, so they count as invalid
      (``patch_valid``); the attention of the others is put in its place on the grid.

    Known by structure: the public model has ``s_bind``, ``merge`` and ``dec``. Its merger keeps the assignment to
    itself, which is read off the gradient of its result; where there is none (validation), the merger is run once more
    on the same slots with the same random numbers. This package's host says everything; when it is evaluated, all
    frames come, as probabilities.

    Example:
        >>> SolvAdapter().match(nn.Identity())
        False

    Source: Self-supervised Object-Centric Learning for Videos (arXiv 2310.06907).
    """

    name: ClassVar[str] = "solv"

    def match(self, host: nn.Module) -> bool:
        """Whether the host has the parts of the public model, or is this package's SOLV.

        Args:
            host: The model that is trained.

        Returns:
            True for either.

        Example:
            >>> SolvAdapter().match(nn.Linear(1, 1))
            False
        """
        return _is_packaged(host) or _is_public(host)

    def attach(self, host: nn.Module) -> Capture:
        """Listen to binder, merger and decoder.

        Args:
            host: The model that is trained.

        Returns:
            A closed capture.

        Raises:
            HostError: The host has no such modules.

        Example:
            >>> SolvAdapter().attach(nn.Identity())
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected Identity to have a binder `s_bind` with `Q`, `f` and `scale`, and a \
decoder `dec`, but it does not. Name the modules yourself: SSyncCallback(attention=..., masks=...).
        """
        if _is_packaged(host):
            return _attach_packaged(host)
        if not _is_public(host):
            raise HostError(
                f"Expected {type(host).__name__} to have a binder `s_bind` with `Q`, `f` and `scale`, and a decoder "
                "`dec`, but it does not. Name the modules yourself: SSyncCallback(attention=..., masks=...)."
            )
        return _attach_public(host)

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        """Merge the attention as the slots were merged, and put it on the grid of the masks.

        Args:
            capture: Filled by one training step.
            batch: Not needed.

        Returns:
            Maps ``(B, 1, S, N)``, attached to the graph; ``(B, T, S, N)`` when this package's host is evaluated.

        Raises:
            HostError: The modules did not run once, or not on the same videos.

        Example:
            >>> SolvAdapter().collect(_SolvCapture((2, 3)))
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected 'binder' to run once inside the training step, but it ran 0 times.
        """
        if not isinstance(capture, _SolvCapture):
            raise HostError("Expected a capture that `SolvAdapter.attach` made, but got another one. Attach again.")
        bound: _Bound = capture.only("binder")
        masks = torch.cat(capture["decoder"], dim=1) if capture["decoder"] else torch.empty(0)
        if masks.ndim == 4 and masks.shape[1] == 1:
            bound = bound.centre()
        videos, frames, slots, _ = bound.logits.shape
        patches = capture.grid[0] * capture.grid[1]
        if masks.shape != (videos, frames, slots, patches):
            raise HostError(
                f"Expected the decoder to give masks {(videos, frames, slots, patches)} of the frames in the centre of "
                f"their windows, but got {tuple(masks.shape)} in {len(capture['decoder'])} call(s)."
            )
        members = capture.only("merger").members if capture.merges else None
        logits = bound.logits if members is None else merge_member_logits(bound.logits, members)
        valid = None if members is None else members.any(3)
        logits, patch_valid = scatter_tokens(logits, bound.indices, patches)
        if frames == 1:
            return SSyncMaps(
                attention_logits=logits,
                mask_logits=masks,
                grid=capture.grid,
                slot_valid=None if valid is None else valid[:, 0],
                patch_valid=patch_valid,
            )
        return SSyncMaps(
            attention_probs=_probabilities(logits, valid),
            mask_probs=_probabilities(masks, valid),
            grid=capture.grid,
            patch_valid=patch_valid,
        )

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        """Compare with the attention, the merged slots and the masks that the host itself used.

        Args:
            capture: Filled by one training step.
            maps: What `collect` made of it.

        Raises:
            HostError: They differ.

        Example:
            >>> verify = SolvAdapter().verify  # called by `SSyncCallback` in the first step
        """
        if not isinstance(capture, _SolvCapture):
            return
        bound: _Bound = capture.only("binder")
        own = bound.logits.double().softmax(2) + _EPSILON
        _require_close("attention of the binder", own / own.sum(3, keepdim=True), bound.attention, bound.logits)
        if capture.merges:
            merged: _Merged = capture.only("merger")
            share = merged.members.double()
            share = share / share.sum(3, keepdim=True).clamp_min(1)
            _require_close("slots of the merger", share @ merged.given.double(), merged.slots, merged.given)
        if capture.masks is not None and maps.mask_logits is not None:
            own = _probabilities(
                maps.mask_logits.double(), None if maps.slot_valid is None else maps.slot_valid[:, None]
            )
            _require_close("masks of the host", own, capture.masks, maps.mask_logits)


def merge_member_logits(logits: Tensor, members: Tensor) -> Tensor:
    """Attention logits of slots that stand for several.

    Args:
        logits: ``(B, T, S, N)``.
        members: ``(B, T, S, S)`` bool; ``[..., i, j]`` where slot j went into merged slot i.

    Returns:
        ``(B, T, S, N)``: the softmax over merged slots sums the members' probabilities. A slot with one member keeps
        its logits to the bit; one without is 0, with no gradient.

    Example:
        >>> logits = torch.tensor([[[[1.0], [2.0], [0.0]]]])
        >>> members = torch.tensor([[[[True, True, False], [False, False, True], [False, False, False]]]])
        >>> merged = merge_member_logits(logits, members)
        >>> torch.allclose(merged[:, :, :2].softmax(2)[0, 0, 0], logits.softmax(2)[0, 0, :2].sum())
        True
    """
    logits = logits.to(compute_dtype(logits.dtype))
    empty = ~members.any(3, keepdim=True)
    # The gradient of a logsumexp over minus infinities alone is NaN, so that slots without members take all.
    absent = ~(members | empty).unsqueeze(-1)
    merged = logits.unsqueeze(2).masked_fill(absent, float("-inf")).logsumexp(3)
    return merged.masked_fill(empty, 0.0)


def scatter_tokens(logits: Tensor, indices: Tensor | None, patches: int) -> tuple[Tensor, Tensor | None]:
    """Put the tokens that were kept in their places on the grid.

    Args:
        logits: ``(B, T, S, N')``.
        indices: ``(B, T, N')`` place of each token, each once; None for all in their order.
        patches: N.

    Returns:
        ``(B, T, S, N)`` with 0 where there is no token, and ``(B, T, N)`` bool, True where there is one (None when all
        patches have).

    Example:
        >>> grid, valid = scatter_tokens(torch.ones(1, 1, 1, 2), torch.tensor([[[3, 0]]]), 4)
        >>> grid.flatten(), valid.flatten()
        (tensor([1., 0., 0., 1.]), tensor([ True, False, False,  True]))
    """
    if indices is None:
        return logits, None
    places = indices.unsqueeze(2).expand(-1, -1, logits.shape[2], -1)
    spread = logits.new_zeros(*logits.shape[:3], patches).scatter(3, places, logits)
    if indices.shape[2] == patches:
        return spread, None
    valid = torch.zeros(*indices.shape[:2], patches, dtype=torch.bool, device=indices.device)
    return spread, valid.scatter(2, indices, True)


class _Bound(NamedTuple):
    """The binder's logits and token-normalised attention ``(B, T, S, N')``, and the tokens' places ``(B, T, N')``."""

    logits: Tensor
    attention: Tensor
    indices: Tensor | None

    def centre(self) -> _Bound:
        at = slice(self.logits.shape[1] // 2, self.logits.shape[1] // 2 + 1)
        return _Bound(self.logits[:, at], self.attention[:, at], None if self.indices is None else self.indices[:, at])


class _Merged(NamedTuple):
    """What went into the merger and came out, ``(B, T, S, D)``, and the members ``(B, T, S, S)``."""

    given: Tensor
    slots: Tensor
    members: Tensor


class _SolvCapture(Capture):
    """Knows the grid, and the masks that the host returned where its own call was heard."""

    def __init__(self, grid: tuple[int, int], merges: bool = True) -> None:
        super().__init__()
        self.grid = grid
        self.merges = merges
        self.masks: Tensor | None = None
        for key in ("binder", "decoder"):
            self._records[key] = []

    def clear(self) -> None:
        super().clear()
        self.masks = None


def _attach_public(host: Any) -> Capture:
    binder = host.s_bind
    capture = _SolvCapture((int(binder.res_h), int(binder.res_w)), bool(getattr(host, "merge_slots", False)))
    capture.watch("Q", binder.Q, _Latest(capture, "Q", 1))
    capture.watch("f", binder.f, _Latest(capture, "f", 2))
    capture.watch("binder", binder, _BoundCentre(capture))
    if capture.merges:
        merger = submodule(host, "merge")
        capture.watch_input("random state", merger, _random_state)
        capture.watch("merger", merger, _Merger(capture))
    capture.watch("decoder", submodule(host, "dec"), _Alpha(int(binder.num_slots)))
    capture.keep(host.register_forward_hook(_HostMasks(capture)))
    return capture


class _Latest:
    """Keeps the last calls of a projection only; the loop of the binder makes many."""

    def __init__(self, capture: Capture, key: str, count: int) -> None:
        self.capture = capture
        self.key = key
        self.count = count

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Projection:
        del self.capture[self.key][: -self.count + 1 or None]
        return take_projection(module, args, output)


class _BoundCentre:
    """Logits of the frames in the centre of their windows, computed as the binder computes those of all frames."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> _Bound:
        # `f` makes keys, then values, in each iteration.
        if not self.capture["Q"] or len(self.capture["f"]) < 2:
            raise HostError(
                f"Expected {type(module).__name__} to call `Q` once and `f` twice in each iteration, but it did not."
            )
        query: Projection = self.capture["Q"][-1]
        key: Projection = self.capture["f"][-2]
        with query.precision():
            logits = torch.einsum("bsdi,bsjd->bsj", query.value.unsqueeze(-1), key.value)
            logits = logits * module.scale
        for name in ("Q", "f"):
            self.capture[name][:] = [True]  # lets go of the graph; the key still counts as heard
        radius = int(module.N_frame)
        window = (-1, 2 * radius + 1)
        indices = args[1].unflatten(0, window)[:, radius].unsqueeze(1)
        centre = logits.unflatten(0, window)[:, radius].unsqueeze(1)
        return _Bound(centre, output[1].unsqueeze(1), indices)


class _Merger:
    """Which slots the merger put together; it returns their means only."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> _Merged:
        given, slots = args[0], output[0]
        members = _members_by_gradient(given, slots)
        if members is None:
            members = _members_by_repetition(module, given, self.capture["random state"][-1])
        return _Merged(given.unsqueeze(1), slots.unsqueeze(1), members.unsqueeze(1))


def _random_state(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return random.getstate()


def _members_by_gradient(given: Tensor, slots: Tensor) -> Tensor | None:
    """Merged slots are means, so that their derivative by the given slots is positive exactly for members.

    A probe of one channel for each merged slot reads the whole assignment in one backward pass through the merger.
    """
    videos, count, channels = slots.shape
    if count > channels or not (slots.requires_grad and given.requires_grad):
        return None
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


class _Alpha:
    """Alpha beside the reconstruction: the last channel of ``(B * S, N, C + 1)``."""

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
        return output[..., -1].unflatten(0, (-1, self.slots)).unsqueeze(1)


class _HostMasks:
    """Remembers the masks that the model returned, for the check of the first step."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        capture = self.capture
        if capture.is_open and isinstance(capture, _SolvCapture) and isinstance(output, dict):
            masks = output.get("mask")
            capture.masks = masks.detach().unsqueeze(1) if isinstance(masks, Tensor) else None


def _attach_packaged(host: Any) -> Capture:
    capture = _SolvCapture((int(host.grid[0]), int(host.grid[1])))
    capture.watch("binder", submodule(host, "spatial_binder"), _packaged_bound)
    capture.watch("merger", submodule(host, "merger"), _packaged_merged)
    capture.watch("decoder", submodule(host, "decoder"), _packaged_masks)
    return capture


def _packaged_bound(module: nn.Module, args: tuple[Any, ...], output: Any) -> _Bound:
    return _Bound(output.logits, output.attention, args[1] if len(args) > 1 else None)


def _packaged_merged(module: nn.Module, args: tuple[Any, ...], output: Any) -> _Merged:
    return _Merged(args[0], output.slots, output.members)


def _packaged_masks(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    return output.mask_logits


def _is_packaged(host: nn.Module) -> bool:
    return any(cls.__name__ == "SOLV" and cls.__module__.startswith("ssync_pl.hosts") for cls in type(host).__mro__)


def _is_public(host: nn.Module) -> bool:
    binder = getattr(host, "s_bind", None)
    modules = [binder, getattr(host, "dec", None), getattr(binder, "Q", None), getattr(binder, "f", None)]
    if not all(isinstance(module, nn.Module) for module in modules):
        return False
    if getattr(host, "merge_slots", False) and not isinstance(getattr(host, "merge", None), nn.Module):
        return False
    return all(hasattr(binder, name) for name in ("scale", "num_slots", "res_h", "res_w", "N_frame"))


def _probabilities(logits: Tensor, valid: Tensor | None) -> Tensor:
    logits = logits.to(compute_dtype(logits.dtype))
    if valid is not None:
        logits = logits.masked_fill(~valid.unsqueeze(-1), float("-inf"))
    return logits.softmax(2)


def _require_close(what: str, own: Tensor, used: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        gap = float((own - used.double()).abs().max() / used.double().abs().max().clamp_min(1e-12))
    tolerance = max(1e-5, 4 * torch.finfo(used.dtype).eps, 4 * torch.finfo(source.dtype).eps)
    if not gap <= tolerance:
        raise HostError(
            f"Expected the {what} to follow from what its parts gave, but it differs by {gap:.3g} of its largest value "
            f"(tolerance {tolerance:.1g}). This host changes its maps on the way: write a HostAdapter for it."
        )
