"""Fused GPU path of the block: the same results as `functional`, chosen automatically, never required.

Nothing here is imported before it is used, since Triton comes with CUDA builds of PyTorch only.
"""

from __future__ import annotations

from ssync_pl.method.triton.fused import MAX_SLOTS, fused_available, fused_block
from ssync_pl.method.triton.trial import kernels_hold

__all__ = ["MAX_SLOTS", "fused_available", "fused_block", "kernels_hold"]
