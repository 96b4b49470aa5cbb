"""Slot attention as the VideoSAUR family computes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.mlp import MLP
from ssync_pl.method.labels import compute_dtype

__all__ = ["SlotCorrector"]


class SlotCorrector(nn.Module):
    """Slot attention whose recurrent update starts from the normalised slots (VideoSAUR, arXiv 2306.04829).

    Parameters have the names, order and shapes of the public checkpoints. Beside those, it differs from
    `SlotAttention` in this: the GRU's state is the layer-normalised slot, so that each iteration forgets its length.

    Args:
        input_dim: channels of a feature.
        slot_dim: size D of a slot, of keys, queries and values.
        iterations: iterations unless a call says otherwise.
        mlp_hidden: hidden size of the residual MLP behind the GRU; None for `4 * slot_dim`, 0 for no MLP.
        eps: added to the attention before it is normalised over patches.

    Raises:
        ConfigError: `iterations` or `eps` is out of range.

    Example:
        >>> output = SlotCorrector(8, 16)(torch.randn(2, 3, 16), torch.randn(2, 25, 8))
        >>> {name: tuple(value.shape) for name, value in output.items()}
        {'slots': (2, 3, 16), 'masks': (2, 3, 25), 'dots': (2, 3, 25)}
    """

    def __init__(
        self,
        input_dim: int,
        slot_dim: int,
        iterations: int = 2,
        mlp_hidden: int | None = None,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        _check_iterations(iterations)
        if eps <= 0:
            raise ConfigError(f"Expected argument `corrector_eps` to be above 0, but got {eps}. Use 1e-8.")
        self.iterations = iterations
        self.eps = eps
        self.scale = slot_dim**-0.5
        self.to_k = nn.Linear(input_dim, slot_dim, bias=False)
        self.to_v = nn.Linear(input_dim, slot_dim, bias=False)
        self.to_q = nn.Linear(slot_dim, slot_dim, bias=False)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        width = 4 * slot_dim if mlp_hidden is None else mlp_hidden
        self.mlp = MLP(slot_dim, [width], slot_dim, layer_norm=True, residual=True) if width > 0 else None
        self.norm_features = nn.LayerNorm(input_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)

    def forward(self, slots: Tensor, features: Tensor, iterations: int | None = None) -> dict[str, Tensor]:
        """Bind slots to the patches of one frame.

        Args:
            slots: `(B, S, D)`, the state to correct.
            features: `(B, N, C)`.
            iterations: overrides the number given at construction.

        Returns:
            `slots` `(B, S, D)`; of the last iteration `dots` `(B, S, N)`, the logits query · key · scale in at least
            float32, and `masks` `(B, S, N)`, their softmax over slots.

        Raises:
            ShapeError: The inputs are not 3-D or have different batch sizes.
            ConfigError: `iterations` is below 1.
        """
        if slots.ndim != 3 or features.ndim != 3 or slots.shape[0] != features.shape[0]:
            raise ShapeError(
                "Expected arguments `slots` and `features` to be (B, S, D) and (B, N, C) with one B, "
                f"but got {tuple(slots.shape)} and {tuple(features.shape)}. Flatten the grid and call once a frame."
            )
        count = self.iterations if iterations is None else iterations
        _check_iterations(count)
        features = self.norm_features(features)
        keys, values = self.to_k(features), self.to_v(features)
        dots = masks = slots.new_zeros(())
        for _ in range(count):
            slots = self.norm_slots(slots)
            dots = torch.einsum("bsd,bnd->bsn", self.to_q(slots), keys) * self.scale
            dots = dots.to(compute_dtype(dots.dtype))
            masks = dots.softmax(dim=1)
            weights = masks + self.eps
            weights = weights / weights.sum(dim=-1, keepdim=True)
            updates = torch.einsum("bsn,bnd->bsd", weights.to(values.dtype), values)
            slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).unflatten(0, slots.shape[:2])
            if self.mlp is not None:
                slots = self.mlp(slots)
        return {"slots": slots, "masks": masks, "dots": dots}


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ConfigError(f"Expected slot attention to run at least 1 iteration, but got {iterations}. Use 2 or 3.")
