"""Small hosts with the layout of AdaSlot: slot attention that decides which slots to keep."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from oclf_hosts import DIM, GRID, OclfAttention, OclfHost, PatchDecoder, PixelDecoder, oclf_batch
from torch import Tensor, nn
from torch.nn import functional as F


class DroppingAttention(OclfAttention):
    """Keeps what its network decides, or what the test says."""

    def __init__(self, heads: int = 1) -> None:
        super().__init__(heads)
        self.single_gumbel_score_network = nn.Linear(DIM, 2)
        self.kept: Tensor | None = None

    def forward(self, inputs: Tensor, slots: Tensor, masked: Tensor | None = None) -> tuple[Tensor, ...]:
        slots, attention = self.attend(inputs, slots, masked)
        scores = self.single_gumbel_score_network(slots)
        decision = F.gumbel_softmax(scores, hard=True)[..., 1]
        if self.kept is not None:
            # Straight through, as the network's own decision.
            soft = scores.softmax(-1)[..., 1]
            decision = self.kept - soft.detach() + soft
        return slots, attention, scores.softmax(-1)[..., 1], decision


class _Dropping:
    """Multiplies the softmax of all slots with the decision, in the ways of AdaSlot."""

    mask_type = "mask_normalized"

    def masks(self, alpha: Tensor, decision: Tensor, axis: int) -> Tensor:
        decision = decision.view(*decision.shape, *[1] * (-axis - 1))
        if self.mask_type == "logit":
            return (alpha - 1e5 * (1 - decision)).softmax(axis)
        masks = alpha.softmax(axis)
        if self.mask_type == "none":
            return masks
        masks = masks * decision
        return masks if self.mask_type == "mask" else masks / (masks.sum(axis, keepdim=True) + 1e-5)


class DroppingPatchDecoder(_Dropping, PatchDecoder):
    def forward(self, slots: Tensor, decision: Tensor | None = None) -> Any:
        values, alpha = self.alpha(slots)
        masks = self.masks(alpha, decision, -2)
        return SimpleNamespace(reconstruction=(values * masks[..., None]).sum(-3), masks=masks)


class DroppingPixelDecoder(_Dropping, PixelDecoder):
    def forward(self, slots: Tensor, decision: Tensor | None = None) -> Any:
        values, alpha = self.alpha(slots)
        masks = self.masks(alpha, decision, -3)
        return SimpleNamespace(reconstruction=(values * masks.unsqueeze(-3)).sum(-4), masks=masks)


class AdaSlotHost(OclfHost):
    """An image model that hands the decision to its decoder."""

    def __init__(self, decoder: Any = None, heads: int = 1, mask_type: str = "mask_normalized") -> None:
        super().__init__(decoder if decoder is not None else DroppingPatchDecoder(), DroppingAttention(heads))
        self.inner[1].mask_type = mask_type
        self.decision: Tensor | None = None

    def decode(self, grouped: tuple[Tensor, ...]) -> Any:
        self.decision = grouped[3]
        return self.models["object_decoder"](grouped[0], grouped[3])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.1 * self.decision.mean()  # type: ignore[union-attr]


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "adaslot": AdaSlotHost,
    "adaslot_heads": lambda: AdaSlotHost(heads=2),
    "adaslot_pixels": lambda: AdaSlotHost(DroppingPixelDecoder(GRID)),
    "adaslot_unnormalised": lambda: AdaSlotHost(mask_type="mask"),
}


def training_loss(host: Any) -> Tensor:
    return host.training_step(oclf_batch(), 0)
