"""Decoder of features: an MLP on every pair of slot and patch, mixed by a softmax over slots."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.patch_mixture import PatchMLP, linear_layers, mix_patches
from ssync_pl.hosts.nn.weights import init_fan_in_

__all__ = ["FeatureMixture", "RelativeMixtureDecoder"]


class FeatureMixture(NamedTuple):
    """What `RelativeMixtureDecoder` returns.

    Args:
        reconstruction: `(B, P, N, C)`, the slots' features mixed by the masks.
        mask_logits: float32 `(B, P, S, N)`, before the softmax over valid slots.

    Example:
        >>> FeatureMixture._fields
        ('reconstruction', 'mask_logits')
    """

    reconstruction: Tensor
    mask_logits: Tensor


class RelativeMixtureDecoder(nn.Module):
    """Predicts a frame's features from slots that know where they are.

    A slot is copied to every patch; a learned embedding of the patch and a linear map of its position relative to the
    slot are added; an MLP gives features and alpha. Its first and last layers are linear, so that slots and places pass
    the first apart, and features leave the last after they were mixed: the same result for fewer multiplications.

    Args:
        patches: N.
        slot_dim: D.
        feature_dim: C.
        hidden: output channels of the MLP's hidden layers.
        init: `"default"` is PyTorch's initialisation; `"fan_in"` keeps the signal's variance from layer to layer, with
            which small models learn objects sooner.
        memory_efficient: make activations in chunks, and keep fewer for the backward pass: the same result and
            gradients in less memory, see `mix_patches`. Where modules of the MLP have hooks or were replaced, and under
            `torch.compile`, all are made at once.

    Raises:
        ConfigError: a size is out of range, or `init` is unknown.

    Example:
        >>> decoder = RelativeMixtureDecoder(patches=6, slot_dim=8, feature_dim=5, hidden=(16, 16))
        >>> valid = torch.ones(2, 1, 3, dtype=torch.bool)
        >>> decoder(torch.randn(2, 1, 3, 8), torch.randn(2, 1, 3, 6, 2), valid).mask_logits.shape
        torch.Size([2, 1, 3, 6])

    Source: Aydemir et al. 2023 (arXiv 2310.06907), section 3.4.
    """

    def __init__(
        self,
        patches: int,
        slot_dim: int = 128,
        feature_dim: int = 768,
        hidden: Sequence[int] = (1024, 1024, 1024, 1024),
        init: Literal["default", "fan_in"] = "default",
        memory_efficient: bool = True,
    ) -> None:
        super().__init__()
        self.memory_efficient = memory_efficient
        if init not in ("default", "fan_in"):
            raise ConfigError(f"Expected argument `init` to be 'default' or 'fan_in', but got {init!r}. Choose one.")
        if not hidden or min(patches, slot_dim, feature_dim, *hidden) < 1:
            raise ConfigError(
                "Expected arguments `patches`, `slot_dim`, `feature_dim` and `hidden` (one layer or more) to be at "
                f"least 1, but got {patches}, {slot_dim}, {feature_dim} and {tuple(hidden)}."
            )
        self.place = nn.Parameter(0.02 * torch.randn(patches, slot_dim))
        self.from_position = nn.Linear(2, slot_dim)
        self.first = nn.Linear(slot_dim, hidden[0])
        parts: list[nn.Module] = [nn.ReLU()]
        for width, following in pairwise(hidden):
            parts += [nn.Linear(width, following), nn.ReLU()]
        self.mlp = nn.Sequential(*parts)
        self.to_features = nn.Linear(hidden[-1], feature_dim)
        self.to_alpha = nn.Linear(hidden[-1], 1)
        if init == "fan_in":
            init_fan_in_(nn.Sequential(self.first, self.mlp, self.to_features))
            init_fan_in_(self.to_alpha)

    def forward(self, slots: Tensor, positions: Tensor, valid: Tensor) -> FeatureMixture:
        """Decode frames.

        Args:
            slots: `(B, P, S, D)`.
            positions: `(B, P, S, N, 2)`, patches as each slot sees them.
            valid: bool `(B, P, S)`; other slots take no part.

        Returns:
            Features and mask logits.

        Raises:
            ShapeError: the inputs do not fit.
        """
        if slots.ndim != 4 or positions.shape[:3] != slots.shape[:3] or valid.shape != slots.shape[:3]:
            raise ShapeError(
                "Expected arguments `slots`, `positions` and `valid` to be (B, P, S, D), (B, P, S, N, 2) and "
                f"(B, P, S), but got {tuple(slots.shape)}, {tuple(positions.shape)} and {tuple(valid.shape)}."
            )
        layers = self._layers()
        if layers is not None:
            return self._mix(slots, positions, valid, layers)
        width = self.first.weight
        place = F.linear(self.place + self.from_position.bias, width)
        offset = F.linear(positions, width @ self.from_position.weight)
        hidden = self.mlp(self.first(slots).unsqueeze(3) + place + offset)
        mask_logits = self.to_alpha(hidden).squeeze(-1).float()
        masks = mask_logits.masked_fill(~valid.unsqueeze(-1), float("-inf")).softmax(dim=2)
        mixed = torch.einsum("bpsnh,bpsn->bpnh", hidden, masks.to(hidden.dtype))
        return FeatureMixture(self.to_features(mixed), mask_logits)

    def _layers(self) -> list[nn.Linear] | None:
        """Hidden layers but the first if weights will do, None if the modules have to run."""
        if not self.memory_efficient or linear_layers([self.from_position]) is None:
            return None
        ends = [linear_layers([layer]) for layer in (self.first, self.to_features, self.to_alpha)]
        return None if None in ends else linear_layers(list(self.mlp)[1:], within=[self.mlp])

    def _mix(self, slots: Tensor, positions: Tensor, valid: Tensor, layers: list[nn.Linear]) -> FeatureMixture:
        videos = slots.shape[:2]
        with torch.autocast(slots.device.type, enabled=False):
            width = self.first.weight
            slots, positions = slots.to(width.dtype), positions.to(width.dtype)
            share = self.first(slots)
            places = F.linear(self.place + self.from_position.bias, width)
            from_position = width @ self.from_position.weight
        mlp = PatchMLP(
            hidden=[(layer.weight, layer.bias) for layer in layers],
            features=(self.to_features.weight, self.to_features.bias),
            alpha=(self.to_alpha.weight[0], self.to_alpha.bias[0]),
        )
        reconstruction, mask_logits = mix_patches(
            share.flatten(0, 1),
            places,
            mlp,
            offsets=(positions.flatten(0, 1), from_position),
            valid=valid.flatten(0, 1),
        )
        return FeatureMixture(reconstruction.unflatten(0, videos), mask_logits.unflatten(0, videos).float())
