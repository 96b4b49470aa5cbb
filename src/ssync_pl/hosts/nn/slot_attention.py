"""Slot attention (Locatello et al. 2020), the corrector of the hosts."""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.errors import require, require_shape
from ssync_pl.hosts.nn.layers import MLP
from ssync_pl.method.labels import compute_dtype

_UPDATE_BIAS = -1.5  # the update gate keeps sigmoid(-1.5), 18 %, of the old slot
_SHRINK = 0.1


class SlotAttentionOutput(NamedTuple):
    """What one call of `SlotAttention` returns."""

    slots: Tensor
    logits: Tensor


class SlotAttention(nn.Module):
    """Slots compete for patches by a softmax over slots and move by a GRU (Locatello et al. 2020, algorithm 1).

    Slots and features are normalised before they are projected (pre-norm). The softmax runs in float32, as half
    precision ties patches between slots.
    """

    normalized_state = False
    """Whether the GRU's state is the normalised slot, so that each iteration forgets the slot's length."""
    projections = ("to_q", "to_k", "to_v")
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear

    def __init__(
        self,
        slot_dim: int,
        feature_dim: int | None = None,
        iterations: int = 1,
        mlp_hidden: int = 256,
        eps: float = 1e-8,
        sharpness: float | None = None,
    ) -> None:
        super().__init__()
        require(iterations >= 1, "argument `iterations` to be at least 1", iterations, advice="Use 1 to 3.")
        require(eps > 0, "argument `eps` (`corrector_eps`) to be above 0", eps, advice="Use 1e-8.")
        require(sharpness is None or sharpness > 0, "argument `sharpness` to be None or above 0", sharpness)
        feature_dim = slot_dim if feature_dim is None else feature_dim
        self.iterations = iterations
        self.eps = eps
        self.scale = slot_dim**-0.5
        for name in self.projections:  # the order decides which random numbers each gets
            setattr(self, name, nn.Linear(slot_dim if name == "to_q" else feature_dim, slot_dim, bias=False))
        if sharpness is not None:
            for layer in (self.to_q, self.to_k):
                nn.init.normal_(layer.weight, std=sharpness * layer.in_features**-0.5)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.mlp = self.build_mlp(slot_dim, mlp_hidden) if mlp_hidden > 0 else None
        self.norm_features = nn.LayerNorm(feature_dim)
        self.norm_slots = nn.LayerNorm(slot_dim)

    @staticmethod
    def build_mlp(slot_dim: int, hidden: int) -> nn.Module:
        """Build the residual branch behind the GRU."""
        return nn.Sequential(
            nn.LayerNorm(slot_dim), nn.Linear(slot_dim, hidden), nn.ReLU(), nn.Linear(hidden, slot_dim)
        )

    def forward(self, slots: Tensor, features: Tensor, iterations: int | None = None) -> Any:
        """Bind slots to the patches of one frame."""
        fits = slots.ndim == features.ndim == 3 and slots.shape[0] == features.shape[0]
        require_shape(fits, "arguments `slots` (B, S, D) and `features` (B, N, C) with one B", slots, features)
        count = self.iterations if iterations is None else iterations
        require(count >= 1, "argument `iterations` to be at least 1", count, advice="Use 1 to 3.")
        features = self.norm_features(features)
        keys, values = self.to_k(features), self.to_v(features)
        logits = masks = slots.new_zeros(())
        for _ in range(count):
            normalized = self.norm_slots(slots)
            logits = torch.einsum("bsd,bnd->bsn", self.to_q(normalized), keys) * self.scale
            logits = logits.to(compute_dtype(logits.dtype))
            masks = logits.softmax(dim=1)
            weights = masks + self.eps
            weights = weights / weights.sum(dim=-1, keepdim=True)
            updates = torch.einsum("bsn,bnd->bsd", weights.to(values.dtype), values)
            state = normalized if self.normalized_state else slots
            slots = self.gru(updates.flatten(0, 1), state.flatten(0, 1)).unflatten(0, slots.shape[:2])
            if self.mlp is not None:
                slots = slots + self.mlp(slots)
        return self.output(slots, logits, masks)

    @staticmethod
    def output(slots: Tensor, logits: Tensor, masks: Tensor) -> Any:
        """Give the results of the last iteration their form."""
        return SlotAttentionOutput(slots, logits)


class SlotCorrector(SlotAttention):
    """Slot attention as the VideoSAUR family computes it (arXiv 2306.04829): the GRU starts from normalised slots.

    Parameters have the names, order and shapes of the public checkpoints. A call returns a dict: `slots` `(B, S, D)`;
    of the last iteration `dots` `(B, S, N)`, the logits in at least float32, and `masks`, their softmax over slots.
    """

    normalized_state = True
    projections = ("to_k", "to_v", "to_q")
    returns_logits: ClassVar[bool] = True

    def __init__(
        self, input_dim: int, slot_dim: int, iterations: int = 2, mlp_hidden: int | None = None, eps: float = 1e-8
    ) -> None:
        super().__init__(slot_dim, input_dim, iterations, 4 * slot_dim if mlp_hidden is None else mlp_hidden, eps)

    @staticmethod
    def build_mlp(slot_dim: int, hidden: int) -> nn.Module:
        """Build the residual branch behind the GRU."""
        return MLP(slot_dim, [hidden], slot_dim, layer_norm=True)

    @staticmethod
    def output(slots: Tensor, logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Give the results of the last iteration their published names."""
        return {"slots": slots, "masks": masks, "dots": logits}


@torch.no_grad()
def init_soft_kmeans_(corrector: Any, sharpness: float = 1.5) -> None:
    """Give slot attention initial weights with which its iterations are those of soft k-means.

    Queries and keys get one random rotation times `sharpness`, values are the features as they are, and the GRU puts
    the mean of a slot's patches in the place of the slot. With independent weights, slots and patches begin in
    unrelated spaces, and many steps go by until attention groups anything.
    """
    require(0 < sharpness < math.inf, "argument `corrector_sharpness` to be above 0", sharpness, advice="Use 1.5.")
    channels, dim = corrector.to_k.in_features, corrector.to_q.in_features
    expected = "features of as many channels as a slot for corrector_init='kmeans'"
    require(channels == dim, expected, channels, dim, advice="Set `encoder_hidden` above 0.")
    nn.init.orthogonal_(corrector.to_q.weight, gain=sharpness)
    corrector.to_k.weight.copy_(corrector.to_q.weight)
    nn.init.eye_(corrector.to_v.weight)
    gru = corrector.gru
    for weight in (gru.weight_ih, gru.weight_hh):
        weight.mul_(_SHRINK)
    for bias in (gru.bias_ih, gru.bias_hh):
        bias.zero_()
    # Rows of PyTorch's GRU: reset gate, update gate, candidate.
    gru.weight_ih[2 * dim :].add_(corrector.to_v.weight)
    gru.bias_ih[dim : 2 * dim].fill_(_UPDATE_BIAS)
