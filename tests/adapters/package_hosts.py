"""Stand-ins for models around the `slot-attention` package, whose decoders users write themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from stand_in_parts import DIM, FRAME, RawDecoder, S, SlotAttention, StandIn, T, eyes, mean_of_heads
from torch import Tensor, nn


class SplitHeads(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, value: Tensor) -> Tensor:
        return value.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PackageAttention(SlotAttention):
    """Returns slots only, which it samples itself; ``heads`` have a softmax over slots each."""

    def __init__(self, heads: int | None = None) -> None:
        super().__init__(heads=heads or 1)
        self.slots_mu, self.slots_logsigma = (nn.Parameter(torch.ones(1, 1, DIM)) for _ in range(2))
        self.norm_input, self.norm_slots, self.several = nn.LayerNorm(DIM), nn.LayerNorm(DIM), heads is not None
        if heads is not None:
            self.split_heads, self.combine_heads = SplitHeads(heads), nn.Linear(DIM, DIM)

    def split(self, value: Tensor) -> Tensor:
        return self.split_heads(value) if self.several else value

    def product(self, query: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("...sd,...nd->...sn", query, keys) * self.scale

    def softmax(self, logits: Tensor) -> Tensor:
        return logits.softmax(-2)

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        updates = weights @ values
        return self.combine_heads(updates.transpose(1, 2).flatten(2)) if self.several else updates

    def forward(self, inputs: Tensor, num_slots: int = S) -> Tensor:
        slots = self.slots_mu + self.slots_logsigma.exp() * torch.randn(len(inputs), num_slots, DIM)
        return self.attend(self.norm_input(inputs), self.norm_slots(slots))[0]

    def whole(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return mean_of_heads(logits) if self.several else (logits, None)


class PackageWrapper(nn.Module):
    """Decides which slots to keep, 0 or 1 with a gradient."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.slot_attn, self.pred_keep_slot, self.kept = PackageAttention(), nn.Linear(DIM, 2), torch.tensor(kept)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.slot_attn(inputs)
        soft = self.pred_keep_slot(slots).softmax(-1)[..., -1]
        return slots, self.kept + soft - soft.detach()


class Pictures(RawDecoder):
    """Channels come first, or ``last``."""

    checked = False

    def __init__(self, last: bool) -> None:
        super().__init__(FRAME)
        self.last = last

    def forward(self, slots: Tensor) -> Tensor:
        return super().forward(slots).movedim(1, -1) if self.last else super().forward(slots)


class PackageHost(StandIn):
    """An autoencoder for images, for frames folded into the batch, or for frames one after another (``"loop"``).

    With ``unfold``, masks get their frames back before the softmax over slots.
    """

    def __init__(
        self, attention: nn.Module | None = None, frames: str = "image", last: bool = False, unfold: bool = False
    ) -> None:
        attention = PackageAttention() if attention is None else attention
        super().__init__({"encoder": eyes(), "decoder": Pictures(last), "slot_attn": attention})
        self.frames, self.unfold, self.clips = frames, unfold, frames == "loop"
        self.existing = attention.kept.bool() if isinstance(attention, PackageWrapper) else None

    def reconstruct(self, video: Tensor) -> Tensor:
        slots = self.slot_attn(self.features(video).flatten(0, 1))
        slots, kept = slots if isinstance(slots, tuple) else (slots, None)
        output = self.decoder(slots)
        output = (output.movedim(-1, 1) if self.decoder.last else output).unflatten(0, slots.shape[:2])
        lead = (-1, T) if self.unfold else (-1,)
        masks = output[:, :, 3:].unflatten(0, lead).softmax(len(lead)).flatten(0, len(lead) - 1)
        masks = masks if kept is None else masks * kept[:, :, None, None, None]
        return (output[:, :, :3] * masks).sum(1)

    def forward(self, video: Tensor) -> Tensor:
        if self.frames == "folded":
            return self.reconstruct(video)
        return torch.stack([self.reconstruct(one) for one in video.split(1, 1)[: T if self.clips else 1]])


HOSTS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "slot-attention": {
        "package_images": PackageHost,
        "package_folded": lambda: PackageHost(frames="folded"),
        "package_unfolded": lambda: PackageHost(frames="folded", unfold=True),
        "package_heads": lambda: PackageHost(PackageAttention(heads=2)),
        "package_adaptive": lambda: PackageHost(PackageWrapper([[1.0, 0, 1, 1], [1.0, 1, 0, 1]])),
        "package_none_left": lambda: PackageHost(PackageWrapper([[1.0, 0, 1, 1], [0.0, 0, 0, 0]])),
    }
}
