"""Adapter of junkeun-yi's SAVi, a plain PyTorch model after the JAX original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssync_pl.adapters.agreement import check_softmax
from ssync_pl.adapters.base import HostAdapter, maps_on_common_grid, register_adapter, stack_frames
from ssync_pl.adapters.capture import Capture
from ssync_pl.adapters.heads import HeadMaps, separate_heads
from ssync_pl.adapters.projections import Projection, take_projection
from ssync_pl.adapters.slots_only import fold_frames, has_modules
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps

__all__ = ["JunkeunYiSaviAdapter"]

_ATTENTION = "corrector.inverted_attention.attn_fn"
_MODULES = ("encoder", "corrector.dense_q", "corrector.dense_k", _ATTENTION, "processor.corrector", "decoder.mask_pred")


@register_adapter
class JunkeunYiSaviAdapter(HostAdapter):
    """``SAVi`` of junkeun-yi's SAVi-pytorch.

    The corrector is registered twice, as ``corrector`` and as ``processor.corrector``; it is one module, and its hooks
    fire once a frame. Its inner attention gets queries and keys ``(B, N, heads, D)`` and returns a softmax over slots
    for each head, ``(B, heads, S, N)``: the logits are those of the last iteration, query / √D · key. Several heads
    become the mean of their probabilities, and of their logits for merging. The decoder draws all frames at once, and
    its alpha is the output of ``mask_pred``. The grid is that of the encoder's output.

    Note:
        The host's loss is a sum over pixels, in the thousands, beside which SSync's is nothing: give
        ``relative_weight``. ``torch.nn.DataParallel``, which the host's trainer uses, works with one device only: on
        several it runs copies of the model in threads, and is refused.

    Example:
        >>> JunkeunYiSaviAdapter().match(nn.Identity())
        False

    Source: https://github.com/junkeun-yi/SAVi-pytorch, SAVi (arXiv 2111.12594).
    """

    name: ClassVar[str] = "junkeun-yi-savi"

    def match(self, host: nn.Module) -> bool:
        """Whether the host is this model.

        Args:
            host: The model that is trained.

        Returns:
            True by structure; names of classes do not matter.

        Example:
            >>> JunkeunYiSaviAdapter().match(nn.Linear(1, 1))
            False
        """
        return has_modules(host, *_MODULES) and host.processor.corrector is host.corrector  # type: ignore[union-attr]

    def attach(self, host: nn.Module) -> Capture:
        """Listen to the encoder, the corrector with its inner attention, and the decoder with its alpha.

        Args:
            host: The model that is trained.

        Returns:
            A closed capture.

        Raises:
            HostError: The host has no such modules, or decodes no corrected slots.

        Example:
            >>> JunkeunYiSaviAdapter().attach(nn.Identity())  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected Identity to have encoder, corrector.dense_q, ...
        """
        if not self.match(host):
            raise HostError(
                f"Expected {type(host).__name__} to have {', '.join(_MODULES)}, the two correctors being one module, "
                "but it does not. Name the modules yourself: attach(attention=..., masks=...) or "
                "SSyncCallback(attention=..., masks=...)."
            )
        model: Any = host
        if not getattr(model, "decode_corrected", True):
            raise HostError(
                f"Expected {type(host).__name__} to decode the corrected slots, but it has decode_corrected=False: "
                "masks of predicted slots show the next frame, not the one that the attention sees. Set it to True."
            )
        capture = Capture()
        capture.watch("encoder", model.encoder, _grid)
        capture.watch("corrector.dense_k", model.corrector.dense_k, _StartOfCall(capture))
        capture.watch("corrector.dense_q", model.corrector.dense_q, take_projection)
        attention = model.corrector.inverted_attention.attn_fn
        capture.watch_input("query and key", attention, _query_and_key)
        capture.watch(_ATTENTION, attention, _own_attention)
        capture.watch("corrector", model.corrector, _Logits(capture))
        capture.watch("decoder.mask_pred", model.decoder.mask_pred)
        capture.watch("decoder", model.decoder, _Masks(capture))
        return capture

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        """Merge the heads, stack the frames and bring both maps to one grid.

        Args:
            capture: Filled by one training step.
            batch: Not needed.

        Returns:
            Maps ``(B, T, S, N)``, attached to the graph.

        Raises:
            HostError: The decoder did not run on the corrector's frames, or the two grids do not divide each other.

        Example:
            >>> capture = Capture()
            >>> capture.watch("corrector", nn.Identity())
            >>> JunkeunYiSaviAdapter().collect(capture)
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected 'corrector' to run inside the training step, but it did not.
        """
        heads: list[HeadMaps] = [separate_heads(call.logits, 1, 2) for call in capture["corrector"]]
        attention = stack_frames([call.logits for call in heads], "corrector")
        grid: tuple[int, int] = capture.only("encoder")
        # With decode_predicted, a second pass draws the predicted slots.
        decoded: _Decoded = capture["decoder"][0]
        masks = fold_frames(decoded.logits.squeeze(-1), attention, "decoder")
        maps = maps_on_common_grid(attention, grid, masks)
        probs = [call.probs for call in heads if call.probs is not None]
        if not probs:
            return maps
        clip = stack_frames(probs, "corrector").unflatten(3, grid)
        if maps.grid is not None and maps.grid != grid:
            kernel = (grid[0] // maps.grid[0], grid[1] // maps.grid[1])
            clip = F.avg_pool2d(clip.flatten(0, 1), kernel).unflatten(0, clip.shape[:2])
        return replace(maps, attention_probs=clip.flatten(3))

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        """Compare with the attention of each head and with the masks that the decoder returned.

        Args:
            capture: Filled by one training step.
            maps: What `collect` made of it; not needed.

        Raises:
            HostError: A softmax over slots of the logits is not what the host returned.

        Example:
            >>> verify = JunkeunYiSaviAdapter().verify  # called in the first step
        """
        for call in capture["corrector"]:
            check_softmax(call.logits, call.probs, 2, "attention that the corrector returns")
        decoded: _Decoded = capture["decoder"][0]
        check_softmax(decoded.logits, decoded.masks, 1, "masks that the decoder returns")


class _Attention(NamedTuple):
    """One call of the corrector: logits and the host's own softmax, both (B, heads, S, N)."""

    logits: Tensor
    probs: Tensor


class _Decoded(NamedTuple):
    """One call of the decoder: alpha logits and the host's own masks, both (B * T, S, h, w, 1)."""

    logits: Tensor
    masks: Tensor


class _QueryKey(NamedTuple):
    query: Tensor
    key: Tensor


class _StartOfCall:
    """Forgets the frame before when the keys of a new one are projected."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Projection:
        for key in ("corrector.dense_k", "corrector.dense_q", "query and key", _ATTENTION):
            self.capture[key].clear()
        return take_projection(module, args, output)


class _Logits:
    """Logits of the last iteration, in the order and precision of the host."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> _Attention:
        if not self.capture["query and key"] or not self.capture["corrector.dense_q"]:
            raise HostError(
                f"Expected {type(module).__name__} to run its 'dense_q' and 'inverted_attention' in each of its calls, "
                "but it did not. Name the modules yourself: attach(attention=..., masks=...)."
            )
        query, key = self.capture["query and key"][-1]
        projected: Projection = self.capture["corrector.dense_q"][-1]
        with projected.precision():
            scaled = query / (query.shape[-1] ** 0.5)
            logits = torch.matmul(scaled.permute(0, 2, 1, 3), key.permute(0, 2, 3, 1))
        return _Attention(logits, self.capture[_ATTENTION][-1])


class _Masks:
    """The decoder's masks beside the alpha of the same call, in the shape of the masks."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> _Decoded:
        masks = output.get("alpha_mask") if isinstance(output, Mapping) else None
        alpha: Tensor = self.capture["decoder.mask_pred"][-1]
        if not isinstance(masks, Tensor) or masks.ndim != 5 or masks.numel() != alpha.numel():
            raise HostError(
                f"Expected {type(module).__name__} to return a dict with masks (B * T, S, h, w, 1) under 'alpha_mask', "
                "but it did not. Name the modules yourself: attach(attention=..., masks=...)."
            )
        return _Decoded(alpha.reshape(masks.shape), masks)


def _grid(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> tuple[int, int]:
    return int(output.shape[-3]), int(output.shape[-2])  # channels last


def _query_and_key(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _QueryKey:
    given = {**dict(zip(("query", "key"), args, strict=False)), **kwargs}
    return _QueryKey(given["query"], given["key"])


def _own_attention(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    if not isinstance(output, (tuple, list)) or len(output) < 2 or not isinstance(output[1], Tensor):
        raise HostError(
            f"Expected {type(module).__name__} to return updates and attention, but got {type(output).__name__}. Name "
            "the modules yourself: attach(attention=..., masks=...)."
        )
    return output[1]
