"""A look at the kernels before they are trusted: do they compute, on this device, what the plain code does?"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from ssync_pl.method.direct import direct_block
from ssync_pl.method.parts import BlockParts
from ssync_pl.method.triton.fused import fused_block

__all__ = ["kernels_hold"]

_SHAPE, _GRID = (2, 2, 32), (4, 8)
_EXACT = ("raw_encoder_labels", "raw_decoder_labels", "encoder_labels", "decoder_labels", "boundary", "interior")


def kernels_hold(attention_logits: Tensor, mask_logits: Tensor) -> bool:
    """Whether the kernels give what the direct path gives, tried once a process for each number of slots and type.

    Kernels are compiled on the user's machine, by a compiler that changes with every release. The trial is small, takes
    what compiling takes, and is the only time that the fused path waits for the device. While a CUDA graph is being
    captured nothing can be tried, so that only what was used before is used there.

    Args:
        attention_logits: `(B, T, S, N)`; only its device, type and number of slots count.
        mask_logits: `(B, T, S, N)`.

    Returns:
        True when labels, regions and winners are equal, and losses and gradients close.

    Example:
        >>> kernels_hold.__name__  # True on a CUDA device with a Triton that works
        'kernels_hold'
    """
    key = (attention_logits.device, attention_logits.shape[2], attention_logits.dtype, mask_logits.dtype)
    if key not in _found:
        if attention_logits.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        try:
            _found[key], reason = _try(*key), "do not give what they should"
        except Exception as error:  # no C compiler, a device that is too old, another Triton: the direct path serves
            _found[key], reason = False, f"could not be run ({type(error).__name__}: {str(error)[:200]})"
        if not _found[key]:
            warnings.warn(
                f"The fused kernels {reason} on {key[0]} for {key[1]} slots, so that they are not used: SSync takes "
                "the direct path, which is slower. Another release of PyTorch and Triton may help.",
                stacklevel=2,
            )
    return _found[key]


_found: dict[tuple[torch.device, int, torch.dtype, torch.dtype], bool] = {}


def _try(device: torch.device, slots: int, attention_dtype: torch.dtype, mask_dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    batch, frames, patches = _SHAPE
    shape = (2, batch, frames, slots, patches)
    # Multiples of 1/16 that bfloat16 holds exactly, so that no order of summation moves a threshold.
    values = (torch.randint(-40, 41, shape, generator=generator, device="cpu") / 16).to(device)
    with torch.enable_grad(), torch.inference_mode(False):
        sides = [_run(block, values, attention_dtype, mask_dtype) for block in (fused_block, direct_block)]
    (fused, got), (direct, expected) = sides
    same = [torch.equal(getattr(fused, name).long(), getattr(direct, name).long()) for name in (*_EXACT, "winners")]
    near = functools.partial(torch.allclose, rtol=1e-4, atol=1e-6)
    same += [near(getattr(fused, name), getattr(direct, name)) for name in ("boundary_loss", "interior_loss")]
    eps = max(torch.finfo(dtype).eps for dtype in (attention_dtype, mask_dtype))
    close = functools.partial(torch.allclose, rtol=4 * eps, atol=1e-6)
    return all(same) and all(close(a.float(), b.float()) for a, b in zip(got, expected, strict=True))


def _run(block: object, values: Tensor, *dtypes: torch.dtype) -> tuple[BlockParts, tuple[Tensor, ...]]:
    leaves = [value.clone().to(dtype).requires_grad_() for value, dtype in zip(values, dtypes, strict=True)]
    parts: BlockParts = block(*leaves, _GRID)  # type: ignore[operator]
    return parts, torch.autograd.grad(parts.boundary_loss + parts.interior_loss, leaves)
