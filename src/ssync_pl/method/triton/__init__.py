"""GPU kernels of the method: the twin of the torch backend of `ssync_loss`, which compares and chooses them.

Triton is imported when a kernel is first launched, since it comes with CUDA builds of PyTorch only.
"""

from ssync_pl.method.triton.block import MAX_SLOTS, fused_block, why_unserved
