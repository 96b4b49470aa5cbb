"""The kernels as one differentiable function of two maps of logits."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_SLOTS = 64
_MAX_IMAGES = 65535  # what a grid of programs holds along its second axis
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Values of a tile of slots and patches: 64 per thread of one warp.
_TILE = 2048


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_unserved(attention_logits: Tensor, mask_logits: Tensor) -> str:
    """Says what keeps the kernels from taking two maps of logits, (B, T, S, N); empty where nothing does.

    Under ``TRITON_INTERPRET=1`` maps on the CPU are taken too.
    """
    if type(attention_logits.detach()) is not Tensor or type(mask_logits.detach()) is not Tensor:
        return "the maps are a subclass of torch.Tensor"
    cuda = attention_logits.is_cuda and torch.version.hip is None
    if not cuda and os.environ.get("TRITON_INTERPRET", "") != "1":
        return f"the maps are on {attention_logits.device.type}, and the kernels need a CUDA device"
    if not _has_triton():
        return "Triton is not installed"
    if attention_logits.dtype not in _DTYPES or mask_logits.dtype not in _DTYPES:
        return "the kernels take float32, bfloat16 and float16 only"
    batch, frames, slots, _ = attention_logits.shape
    if slots > MAX_SLOTS or batch * frames > _MAX_IMAGES:
        return f"the kernels take {MAX_SLOTS} slots and {_MAX_IMAGES} frames at most"
    return ""


def fused_block(
    attention_logits: Tensor,
    mask_logits: Tensor,
    grid: tuple[int, int],
    *,
    merge_threshold: float | None,
    regions: tuple[int, int, int],
    weights: tuple[float, float],
    average: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor | None, ...]:
    """Computes the fields of `SSyncOutput`, in their order, as the torch backend does; Brier score, temperature 1.

    Labels of both maps; overlaps of coverage; the graph of slots; regions and losses; in the backward pass, gradients.
    Each map is read twice (the attention once more for its coverage) and once more for its gradient, so it must not be
    written over before the backward pass. Nothing waits for the device, so that a CUDA graph can hold it.
    """
    with _on_device(attention_logits):
        return _FusedBlock.apply(attention_logits, mask_logits, grid, merge_threshold, regions, weights, average)


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        attention: Tensor,
        masks: Tensor,
        grid: tuple[int, int],
        merge_threshold: float | None,
        regions: tuple[int, int, int],
        weights: tuple[float, float],
        average: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor | None, ...]:
        # Deferred: kernels are compiled, or interpreted, as the environment says when they are first needed.
        from ssync_pl.method.triton import programs

        batch, frames, slots, patches = attention.shape
        images, size = batch * frames, (frames, patches)
        tile = _tile(slots)
        parts = -(-patches // tile["PATCHES"])
        new = functools.partial(torch.empty, device=attention.device)

        raw = new(2, batch, frames, patches, dtype=torch.int64)
        sums = new(images, parts, slots, dtype=torch.float32)
        won = new(2, images, parts, slots, dtype=torch.int32)
        for side, logits in enumerate((attention, masks)):
            programs.label_map[(parts, images)](
                logits, raw[side], sums, won[side], *size, *logits.stride(), SUM=side == 0, **tile, num_warps=1
            )
        areas = won.view(2, batch, frames * parts, slots).sum(2)
        if merge_threshold is None:
            overlap = None
            winners = torch.arange(slots, device=attention.device).repeat(batch, 1)
            merged_slots = torch.zeros(batch, dtype=torch.int64, device=attention.device)
        else:
            threshold = sums.view(batch, frames * parts, slots).sum(1) / (frames * patches)
            iou = new(batch, frames, slots, slots, dtype=torch.float32)
            programs.share_coverage[(images,)](
                attention, threshold, iou, *size, *attention.stride(), **tile, num_warps=4
            )
            overlap = iou.mean(1)
            winners, merged_slots = new(batch, slots, dtype=torch.int64), new(batch, dtype=torch.int64)
            programs.link_slots[(batch,)](
                overlap, areas[0], winners, merged_slots, merge_threshold,
                SLOTS=tile["SLOTS"], NUM_SLOTS=slots, DOUBLINGS=(slots - 1).bit_length(), num_warps=4,
            )  # fmt: skip

        merged, selected = torch.empty_like(raw), new(2, batch, frames, patches, dtype=torch.bool)
        scores = new(images * parts, 2, dtype=torch.float32)
        number = new(images * parts, 4, dtype=torch.int32)
        programs.teach[(parts, images)](
            attention, masks, raw, winners, merged, selected.view(torch.int8), scores, number, *size, *grid, *regions,
            *attention.stride(), *masks.stride(), **tile, num_warps=1,
        )  # fmt: skip
        counts = number.sum(0).float()
        entries = counts[:2] * slots
        if average is not None:
            entries = average(entries)
        entries = torch.where(entries > 0, entries, 1.0)
        # Tensors of their own and no views of one, so that a script may add to them in place.
        boundary, interior = (loss.clone() for loss in scores.sum(0) / entries)
        total = weights[0] * boundary + weights[1] * interior

        ctx.save_for_backward(attention, masks, merged, selected, entries)
        ctx.weights = weights
        volumes = [x.unflatten(2, grid) for x in (*merged, *raw, *selected)]
        used = (areas > 0).sum(2).float()
        shares = counts / (images * patches)
        others = (*volumes, winners, merged_slots, overlap, *counts[:2], *shares, *used)
        ctx.mark_non_differentiable(*(value for value in others if value is not None))
        ctx.set_materialize_grads(False)
        return (total, boundary, interior, *others)

    @staticmethod
    def backward(
        ctx: Any, total: Tensor | None, boundary: Tensor | None, interior: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        from ssync_pl.method.triton import programs

        attention, masks, merged, selected, entries = ctx.saved_tensors
        _, frames, slots, patches = attention.shape
        tile = _tile(slots)
        programs_of = (-(-patches // tile["PATCHES"]), attention.shape[0] * frames)
        gradients: list[Tensor | None] = []
        # The decoder's map learns from the encoder's labels at boundaries, and the other way round in interiors.
        for term, (logits, upstream) in enumerate(((masks, boundary), (attention, interior))):
            terms = [] if total is None else [ctx.weights[term] * total]
            terms += [] if upstream is None else [upstream]
            # A side that nothing asks for gets None: its graph need not be walked.
            gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if terms else None
            scale = 2.0 * sum(terms) / entries[term]
            if gradient is not None and torch.is_grad_enabled():
                # With create_graph: the same in operators that can be differentiated once more.
                probs = logits.float().softmax(2)
                error = probs - torch.nn.functional.one_hot(merged[term], slots).movedim(3, 2)
                value = probs * (error - (probs * error).sum(2, keepdim=True)) * selected[term].unsqueeze(2) * scale
                gradient = value.to(logits.dtype)
            elif gradient is not None:
                with _on_device(logits):
                    programs.write_gradient[programs_of](
                        logits, merged[term], selected[term].view(torch.int8), scale, gradient, frames, patches,
                        *logits.stride(), **tile, num_warps=1,
                    )  # fmt: skip
            gradients.append(gradient)
        return gradients[1], gradients[0], None, None, None, None, None


def _tile(slots: int) -> dict[str, int]:
    padded = max(16, 1 << (slots - 1).bit_length())
    return {"SLOTS": padded, "NUM_SLOTS": slots, "PATCHES": _TILE // padded}


def _on_device(of: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the maps."""
    return torch.cuda.device(of.device) if of.is_cuda else contextlib.nullcontext()
