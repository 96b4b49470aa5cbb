"""`SSyncMaps`: the one contract between a host model and the method."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssync_pl.errors import ShapeError

_MAP_FIELDS = ("attention_logits", "attention_probs", "mask_logits", "mask_probs")


@dataclass(frozen=True, eq=False, repr=False)
class SSyncMaps:
    """A host's encoder map and decoder map on one grid of patches, checked once.

    Each side is given as logits, as probabilities, or as both. With both, the loss reads the probabilities and
    merging the logits; this serves hosts whose maps were resampled to a common grid.

    Args:
        attention_logits: ``(B, T, S, N)`` slot-attention logits of the last iteration (query · key · scale), before
            the softmax over slots. Needed for merging.
        mask_logits: ``(B, T, S, N)`` decoder alpha logits, before the softmax over slots.
        attention_probs: ``(B, T, S, N)`` softmax of the attention over slots, in [0, 1], summing to 1 over S.
        mask_probs: ``(B, T, S, N)`` decoder masks, in [0, 1], summing to 1 over S.
        grid: ``(H, W)`` patches with ``H * W == N``, row by row. Never guessed.
        slot_valid: ``(B, S)`` bool, False for slots that do not exist in a video.
        patch_valid: ``(B, T, N)`` bool, False for patches that carry no map (dropped tokens, padding).
        frame_index: ``(B, T)`` integers, the place of each frame in its clip. Two frames are neighbours in time only
            where these differ by exactly 1, up or down; None means that all of them are.

    Raises:
        ShapeError: A map is missing, or shapes, dtypes or devices do not fit.

    Examples:
        >>> import torch
        >>> d = torch.randn(2, 4, 7, 6 * 8, requires_grad=True)
        >>> a = torch.randn(2, 4, 7, 6 * 8, requires_grad=True)
        >>> SSyncMaps(attention_logits=d, mask_logits=a, grid=(6, 8))
        SSyncMaps(B=2, T=4, S=7, grid=(6, 8), attention=logits, masks=logits, dtype=torch.float32, device=cpu)

    Source: SSync (arXiv 2606.15527), Sec. 3: the encoder's attention map and the decoder's object map.
    """

    attention_logits: Tensor | None = None
    mask_logits: Tensor | None = None
    attention_probs: Tensor | None = None
    mask_probs: Tensor | None = None
    grid: tuple[int, int] | None = None
    slot_valid: Tensor | None = None
    patch_valid: Tensor | None = None
    frame_index: Tensor | None = None

    def __post_init__(self) -> None:
        for side, what in (("attention", "slot attention"), ("mask", "decoder masks")):
            if getattr(self, f"{side}_logits") is None and getattr(self, f"{side}_probs") is None:
                raise ShapeError(
                    f"Expected argument `{side}_logits` or `{side}_probs` to be given, but got neither. "
                    f"Pass the {what} as (B, T, S, N)."
                )
        given = [(name, getattr(self, name)) for name in _MAP_FIELDS if getattr(self, name) is not None]
        for name, value in given:
            _check_map(name, value, *given[0])
        batch, frames, slots, patches = self.shape
        object.__setattr__(self, "grid", _check_grid(self.grid, patches))
        device = self.attention.device
        _check_companion("slot_valid", self.slot_valid, (batch, slots), "bool", device)
        _check_companion("patch_valid", self.patch_valid, (batch, frames, patches), "bool", device)
        _check_companion("frame_index", self.frame_index, (batch, frames), "integer", device)

    @property
    def attention(self) -> Tensor:
        """The encoder's map as given, ``(B, T, S, N)``: probabilities when there are any, else logits."""
        return self.attention_probs if self.attention_probs is not None else self.attention_logits  # type: ignore[return-value]

    @property
    def masks(self) -> Tensor:
        """The decoder's map as given, ``(B, T, S, N)``: probabilities when there are any, else logits."""
        return self.mask_probs if self.mask_probs is not None else self.mask_logits  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sizes of the maps, ``(B, T, S, N)``."""
        return tuple(self.attention.shape)  # type: ignore[return-value]

    def detach(self) -> "SSyncMaps":
        """Returns the same maps without gradient, for pictures and logs."""
        values = {name: getattr(self, name) for name in _MAP_FIELDS}
        return replace(self, **{name: None if v is None else v.detach() for name, v in values.items()})

    def check_values(self, tolerance: float = 1e-2) -> None:
        """Look at the values once; on an accelerator this waits for the device, so never call it in every step.

        Args:
            tolerance: How far a sum over slots may be from 1 in a patch; loose enough for bfloat16.

        Raises:
            ShapeError: A map holds NaN or +inf, or probabilities are negative or do not sum to 1 over slots.
        """
        for name in _MAP_FIELDS:
            value = getattr(self, name)
            if value is None:
                continue
            value = value.detach().float()
            if self.slot_valid is not None:
                value = value.masked_fill(~self.slot_valid[:, None, :, None], 0.0)
            if self.patch_valid is not None:
                value = value.masked_fill(~self.patch_valid[:, :, None, :], 0.0)
            if bool(value.isnan().any()) or bool(value.isposinf().any()):
                raise ShapeError(
                    f"Expected argument `{name}` to be finite, but got NaN or +inf. "
                    "The host has diverged, or the map was read before it was written."
                )
            if name.endswith("_logits") and bool((value >= 0).all()) and bool(((value.sum(2) - 1).abs() < 1e-5).all()):
                advice = f"Pass such values as `{name.replace('_logits', '_probs')}`."
                raise ShapeError(f"Expected argument `{name}` to be logits, but got probabilities. {advice}")
            if name.endswith("_probs"):
                _check_simplex(name, value, self.patch_valid, tolerance)

    def __repr__(self) -> str:
        b, t, s, _ = self.shape
        attention, masks = (
            "+".join(kind for kind in ("logits", "probs") if getattr(self, f"{side}_{kind}") is not None)
            for side in ("attention", "mask")
        )
        return (
            f"SSyncMaps(B={b}, T={t}, S={s}, grid={self.grid}, {attention=!s}, {masks=!s}, "
            f"dtype={self.attention.dtype}, device={self.attention.device})"
        )


def _check_map(name: str, value: Tensor, first_name: str, first: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError(
            f"Expected argument `{name}` to be a floating-point tensor (B, T, S, N), but got {kind}. "
            "Pass the host's soft map, not its labels."
        )
    if value.ndim != 4 or 0 in value.shape:
        hint = " Add the frame axis of an image model with .unsqueeze(1)." if value.ndim == 3 else ""
        raise ShapeError(
            f"Expected argument `{name}` to have shape (B, T, S, N) with no empty axis, "
            f"but got {tuple(value.shape)}.{hint}"
        )
    if value.shape != first.shape:
        raise ShapeError(
            f"Expected argument `{name}` to have the shape of `{first_name}`, {tuple(first.shape)}, but got "
            f"{tuple(value.shape)}. Both maps need the same slots and patches: resample one of them."
        )
    if value.device != first.device:
        raise ShapeError(
            f"Expected argument `{name}` to be on {first.device}, but got {value.device}. Move both maps to one device."
        )


def _check_grid(grid: tuple[int, int] | None, patches: int) -> tuple[int, int]:
    sizes = tuple(int(size) for size in grid) if isinstance(grid, (tuple, list)) else ()
    if len(sizes) != 2 or min(sizes) < 1 or sizes[0] * sizes[1] != patches:
        raise ShapeError(
            f"Expected argument `grid` to be (H, W) with H * W == {patches}, but got {grid}. "
            "It is never guessed: pass the rows and columns of patches of both maps."
        )
    return sizes[0], sizes[1]


def _check_companion(name: str, value: Tensor | None, shape: tuple[int, ...], kind: str, device: torch.device) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise ShapeError(f"Expected argument `{name}` to be a tensor {shape}, but got {type(value).__name__}.")
    is_bool = value.dtype == torch.bool
    is_integer = not (is_bool or value.is_floating_point() or value.is_complex())
    if tuple(value.shape) != shape or not (is_bool if kind == "bool" else is_integer):
        raise ShapeError(
            f"Expected argument `{name}` to be a {kind} tensor of shape {shape}, but got {value.dtype} "
            f"{tuple(value.shape)}. Pass one entry for each of the maps' axes that it names."
        )
    if value.device != device:
        raise ShapeError(
            f"Expected argument `{name}` to be on {device}, but got {value.device}. Move it to the maps' device."
        )


def _check_simplex(name: str, value: Tensor, patch_valid: Tensor | None, tolerance: float) -> None:
    if bool((value < -tolerance).any()):
        raise ShapeError(
            f"Expected argument `{name}` to be probabilities in [0, 1], but got values down to "
            f"{float(value.min()):.3g}. Pass such values as `{name.replace('_probs', '_logits')}`."
        )
    sums = value.sum(2)
    if patch_valid is not None:
        sums = sums.masked_fill(~patch_valid, 1.0)
    low, high = float(sums.min()), float(sums.max())
    if low < 1 - tolerance or high > 1 + tolerance:
        raise ShapeError(
            f"Expected argument `{name}` to sum to 1 over slots in every valid patch, but got sums from "
            f"{low:.3g} to {high:.3g}. Pass the softmax over the slot axis, not over patches, or pass logits."
        )
