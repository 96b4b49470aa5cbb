"""What one call of slot attention, and one of the decoder, gives in the OCLF family."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.adapters.capture import Capture
from ssync_pl.adapters.heads import joint_heads
from ssync_pl.adapters.projections import Projection
from ssync_pl.errors import HostError

__all__ = ["NAME_THEM", "AttentionCall", "AttentionListener", "MaskCall", "MaskListener", "last_channel"]

NAME_THEM = "Name the modules yourself: SSyncCallback(attention=..., masks=...)."


class AttentionCall(NamedTuple):
    """One call of slot attention.

    Args:
        logits: ``(B, S, N)``, heads merged; minus infinity for slots that the host masked.
        attention: ``(B, S, N)``, what the host returned, summed over heads.
        present: ``(B, S)`` bool, the slots that exist; None when all do.
        patch_size: Of the feature extractor, height and width in pixels; None when it has no patches.

    Example:
        >>> AttentionCall(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 0.5), None, None).present is None
        True
    """

    logits: Tensor
    attention: Tensor
    present: Tensor | None
    patch_size: tuple[int, int] | None


class MaskCall(NamedTuple):
    """One call of the decoder.

    Args:
        logits: Alpha ``(..., S, N)`` or ``(..., S, h, w)`` before the softmax over slots.
        masks: The host's own masks, of the same shape.
        pixels: Whether the last two axes are rows and columns.

    Example:
        >>> MaskCall(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 0.5), False).slot_axis
        1
    """

    logits: Tensor
    masks: Tensor
    pixels: bool

    @property
    def slot_axis(self) -> int:
        """Axis of the slots.

        Returns:
            The third axis from the end for masks in pixels, the second for patches.

        Example:
            >>> MaskCall(torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 3, 2, 4, 4), True).slot_axis
            2
        """
        return self.logits.ndim - (3 if self.pixels else 2)


class AttentionListener:
    """Logits of one call: the last query with the key, times the scale, in the order and precision of the host.

    Args:
        capture: Holds the projections of the call, as ``to_q`` and ``to_k``.
        patch_size: Of the feature extractor, handed on.

    Example:
        >>> AttentionListener(Capture()).present(None, (), ()) is None
        True
    """

    def __init__(self, capture: Capture, patch_size: tuple[int, int] | None = None) -> None:
        self.capture = capture
        self.patch_size = patch_size

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> AttentionCall:
        """What `Capture.watch` keeps of slot attention.

        Args:
            module: The slot attention, with ``n_heads``, ``dims_per_head`` and ``scale``.
            args: Features, initial slots and, where slots are masked, the mask ``(B, S)``.
            output: Slots and attention ``(B, S, N)``, averaged over heads; more may follow.

        Returns:
            Logits and attention, attached to the graph.

        Raises:
            HostError: The output has another form, or a projection did not run.
        """
        attention = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(attention, Tensor) or attention.ndim != 3:
            kind = tuple(attention.shape) if isinstance(attention, Tensor) else type(output).__name__
            raise HostError(
                f"Expected {type(module).__name__} to return slots and attention (B, S, N), but got {kind}. {NAME_THEM}"
            )
        if not self.capture["to_q"] or not self.capture["to_k"]:
            raise HostError(
                f"Expected {type(module).__name__} to call its 'to_q' and 'to_k' in each of its calls, but it did not. "
                f"{NAME_THEM}"
            )
        query: Projection = self.capture["to_q"][-1]
        key: Projection = self.capture["to_k"][-1]
        heads = (module.n_heads, module.dims_per_head)
        with query.precision():
            q, k = query.value.unflatten(-1, heads), key.value.unflatten(-1, heads)
            logits = torch.einsum("bihd,bjhd->bihj", q, k) * module.scale
        masked = _masked(args)
        if masked is not None:
            logits = logits.masked_fill(masked[:, :, None, None], float("-inf"))
        present = self.present(module, args, output)
        return AttentionCall(joint_heads(logits, 2), attention * module.n_heads, present, self.patch_size)

    def present(self, module: Any, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """The slots that exist.

        Args:
            module: The slot attention.
            args: Features, initial slots and, where slots are masked, the mask ``(B, S)``.
            output: What it returned.

        Returns:
            ``(B, S)`` bool, or None when all exist.

        Example:
            >>> AttentionListener(Capture()).present(None, (0, 0, torch.tensor([[False, True]])), ())
            tensor([[ True, False]])
        """
        masked = _masked(args)
        return None if masked is None else ~masked


class MaskListener:
    """Alpha logits and masks of one call of the decoder.

    Args:
        capture: Holds what `last_channel` took from the decoder's inner network, as ``decoder.decoder``.

    Example:
        >>> capture = Capture()
        >>> capture.watch("decoder", nn.Identity(), MaskListener(capture))
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> MaskCall:
        """What `Capture.watch` keeps of the decoder.

        Args:
            module: The decoder.
            args: Its input; not needed.
            output: An object with ``masks``.

        Returns:
            Alpha in the shape of the masks, attached to the graph.

        Raises:
            HostError: There are no masks, or alpha has another shape.
        """
        # An amodal decoder returns sigmoids as its masks, and beside them the softmax that it paints with.
        masks = getattr(output, "masks_vis", getattr(output, "masks", None))
        if not isinstance(masks, Tensor):
            raise HostError(
                f"Expected {type(module).__name__} to return `masks`, but got {type(output).__name__}. {NAME_THEM}"
            )
        if not self.capture["decoder.decoder"]:
            raise HostError(f"Expected {type(module).__name__} to call its 'decoder', but it did not. {NAME_THEM}")
        alpha: Tensor = self.capture["decoder.decoder"][-1]
        lead = masks.shape[: masks.ndim - alpha.ndim + 1]
        if math.prod(lead) != alpha.shape[0] or masks.shape[len(lead) :] != alpha.shape[1:]:
            raise HostError(
                f"Expected the last channel inside {type(module).__name__} to have the shape of its masks, "
                f"{tuple(masks.shape)}, but got {tuple(alpha.shape)}. {NAME_THEM}"
            )
        return MaskCall(alpha.unflatten(0, lead), masks, pixels=alpha.ndim == 3)


def last_channel(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    """Alpha of a decoder's inner network; what `Capture.watch` keeps of it.

    Args:
        module: The inner network.
        args: Its input; not needed.
        output: ``(B * S, N, C)`` for patches, ``(B * S, C, h, w)`` for pixels.

    Returns:
        The last channel, ``(B * S, N)`` or ``(B * S, h, w)``.

    Raises:
        HostError: The output has another shape.

    Example:
        >>> last_channel(nn.Identity(), (), torch.zeros(6, 9, 5)).shape
        torch.Size([6, 9])
    """
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise HostError(
            f"Expected the decoder's inner {type(module).__name__} to give (B * S, N, C) or (B * S, C, h, w), but got "
            f"{kind}. {NAME_THEM}"
        )
    return output.select(-1 if output.ndim == 3 else 1, -1)


def _masked(args: tuple[Any, ...]) -> Tensor | None:
    masked = args[2] if len(args) > 2 else None
    return masked.bool() if isinstance(masked, Tensor) else None
