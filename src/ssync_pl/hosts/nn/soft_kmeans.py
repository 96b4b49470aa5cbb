"""Slot attention that starts as soft k-means."""

from __future__ import annotations

import math

import torch
from torch import nn

from ssync_pl.errors import ConfigError
from ssync_pl.hosts.nn.corrector import SlotCorrector

__all__ = ["init_soft_kmeans_"]

_UPDATE_BIAS = -1.5  # the update gate keeps sigmoid(-1.5), 18 %, of the old slot
_SHRINK = 0.1


@torch.no_grad()
def init_soft_kmeans_(corrector: SlotCorrector, sharpness: float = 1.5) -> None:
    """Give slot attention initial weights with which its iterations are those of soft k-means.

    Queries and keys get one and the same random rotation times `sharpness`, so that a patch goes to the slots most
    like it: the logits are `sharpness ** 2 * <slot, feature> / sqrt(D)`, both normalised. Values are the features as
    they are, and the GRU starts out putting the mean of a slot's patches in the place of the slot. With independent
    random weights, as is usual, slots and patches begin in spaces that have nothing to do with each other, and many
    steps go by until attention groups anything; here it groups alike features from the first step. Weights are changed
    in place; names, shapes and what can be learned stay.

    Args:
        corrector: slot attention whose features have as many channels as its slots.
        sharpness: how decided the first assignments are; above 0.

    Raises:
        ConfigError: features and slots have different sizes, or `sharpness` is not above 0.

    Example:
        >>> corrector = SlotCorrector(8, 8)
        >>> init_soft_kmeans_(corrector, sharpness=2.0)
        >>> torch.allclose(corrector.to_q.weight.mT @ corrector.to_k.weight, 4 * torch.eye(8), atol=1e-5)
        True
    """
    if sharpness <= 0 or not math.isfinite(sharpness):
        raise ConfigError(f"Expected argument `corrector_sharpness` to be above 0, but got {sharpness}. Use 1.5.")
    channels, dim = corrector.to_k.in_features, corrector.to_q.in_features
    if channels != dim:
        raise ConfigError(
            "Expected features of as many channels as a slot for corrector_init='kmeans', where slots are means of "
            f"features, but got {channels} and {dim}. Set `encoder_hidden` above 0, which projects features to the "
            "size of a slot, or `slot_dim` to the features' channels."
        )
    identity = torch.eye(dim, dtype=corrector.to_v.weight.dtype, device=corrector.to_v.weight.device)
    nn.init.orthogonal_(corrector.to_q.weight, gain=sharpness)
    corrector.to_k.weight.copy_(corrector.to_q.weight)
    corrector.to_v.weight.copy_(identity)
    gru = corrector.gru
    for weight in (gru.weight_ih, gru.weight_hh):
        weight.mul_(_SHRINK)
    for bias in (gru.bias_ih, gru.bias_hh):
        bias.zero_()
    # Rows of PyTorch's GRU: reset gate, update gate, candidate.
    gru.weight_ih[2 * dim :].add_(identity)
    gru.bias_ih[dim : 2 * dim].fill_(_UPDATE_BIAS)
