"""Stand-ins for models around the `slot-attention` package, whose decoders users write themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from stand_in_parts import DIM, FRAME, PATCH, Decoder, S, SlotAttention, StandIn, T, mean_of_heads
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
        super().__init__()
        self.slots_mu, self.slots_logsigma = (nn.Parameter(torch.ones(1, 1, DIM)) for _ in range(2))
        self.norm_input, self.norm_slots, self.heads = nn.LayerNorm(DIM), nn.LayerNorm(DIM), heads
        if heads is not None:
            self.split_heads, self.combine_heads = SplitHeads(heads), nn.Linear(DIM, DIM)

    def forward(self, inputs: Tensor, num_slots: int = S) -> Tensor:
        slots = self.slots_mu + self.slots_logsigma.exp() * torch.randn(len(inputs), num_slots, DIM)
        split: Any = self.split_heads if self.heads else nn.Identity()
        inputs = self.norm_input(inputs)
        keys, values = split(self.to_k(inputs)), split(self.to_v(inputs))
        for _ in range(self.iterations):
            logits = torch.einsum("...sd,...nd->...sn", split(self.to_q(self.norm_slots(slots))), keys) * self.scale
            weights = nn.functional.normalize((self.sharpen * logits).softmax(-2) + self.eps, p=1, dim=-1)
            updates = weights @ values
            if self.heads:
                updates = self.combine_heads(updates.transpose(1, 2).flatten(2))
            slots = self.gru(updates.reshape(-1, DIM), slots.reshape(-1, DIM)).view_as(slots)
        self.own_logits.append(logits)
        return slots

    def whole(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return mean_of_heads(logits) if self.heads else (logits, None)


class PackageWrapper(nn.Module):
    """Decides which slots to keep, 0 or 1 with a gradient."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.slot_attn, self.pred_keep_slot, self.kept = PackageAttention(), nn.Linear(DIM, 2), torch.tensor(kept)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.slot_attn(inputs)
        soft = self.pred_keep_slot(slots).softmax(-1)[..., -1]
        return slots, self.kept + soft - soft.detach()


class PackageCodes(nn.Module):
    """Averages slots of one code, and packs them to the front."""

    def __init__(self) -> None:
        super().__init__()
        self.slot_attention, self.vq = PackageAttention(), nn.Identity()


class Pictures(Decoder):
    """A picture and the logit of a mask for each slot, slots folded into the batch; ``last`` has channels last."""

    checked = False

    def __init__(self, last: bool) -> None:
        super().__init__(FRAME)
        self.last = last

    def forward(self, slots: Tensor) -> Tensor:
        colours, _ = self.draw(slots)
        output = torch.cat([colours, self.own_logits[-1].unsqueeze(2)], 2).flatten(0, 1)
        return output.movedim(1, -1) if self.last else output


class PackageHost(StandIn):
    """An autoencoder for images, for frames folded into the batch, or for frames one after another (``"loop"``).

    With ``unfold``, masks get their frames back before the softmax over slots.
    """

    def __init__(
        self, attention: nn.Module | None = None, frames: str = "image", last: bool = False, unfold: bool = False
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, DIM, PATCH, PATCH), Pictures(last)
        self.slot_attn = PackageAttention() if attention is None else attention
        self.frames, self.unfold = frames, unfold

    @property
    def kept(self) -> Tensor | None:
        return self.slot_attn.kept.bool() if isinstance(self.slot_attn, PackageWrapper) else None

    def reconstruct(self, images: Tensor) -> Tensor:
        slots = self.slot_attn(3 * self.encoder(images).flatten(2).mT)
        slots, kept = slots if isinstance(slots, tuple) else (slots, None)
        output = self.decoder(slots)
        output = (output.movedim(-1, 1) if self.decoder.last else output).unflatten(0, slots.shape[:2])
        lead = (-1, T) if self.unfold else (-1,)
        masks = output[:, :, 3:].unflatten(0, lead).softmax(len(lead)).flatten(0, len(lead) - 1)
        masks = masks if kept is None else masks * kept[:, :, None, None, None]
        return (output[:, :, :3] * masks).sum(1)

    def forward(self, video: Tensor) -> Tensor:
        if self.frames == "loop":
            return torch.stack([self.reconstruct(frame) for frame in video.unbind(1)], 1)
        return self.reconstruct(video[:, 0] if self.frames == "image" else video.flatten(0, 1))


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
