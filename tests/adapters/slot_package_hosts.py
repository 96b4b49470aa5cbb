"""Models around slot attention with the layout of the `slot-attention` package. `HOSTS` names factories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE_DIM, PACKAGE_SLOTS, PACKAGE_GRID, PACKAGE_T = 8, 4, (4, 4), 2


class SplitHeads(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, value: Tensor) -> Tensor:
        return value.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PackageAttention(nn.Module):
    """Returns slots only, which it samples itself; ``heads`` have a softmax over slots each."""

    def __init__(self, heads: int | None = None) -> None:
        super().__init__()
        dim = PACKAGE_DIM
        self.slots_mu, self.slots_logsigma = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.ones(1, 1, dim))
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_input, self.norm_slots = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.gru = nn.GRUCell(dim, dim)
        if heads is not None:
            self.split_heads, self.combine_heads = SplitHeads(heads), nn.Linear(dim, dim)
        self.scale, self.eps, self.iters = dim**-0.5, 1e-8, 2
        self.sharpen = 1.0
        self.own_logits: list[Tensor] = []

    def forward(self, inputs: Tensor, num_slots: int | None = None) -> Tensor:
        count = num_slots or PACKAGE_SLOTS
        noise = torch.randn(len(inputs), count, PACKAGE_DIM)
        slots = self.slots_mu + self.slots_logsigma.exp() * noise
        split: Any = getattr(self, "split_heads", nn.Identity())
        inputs = self.norm_input(inputs)
        keys, values = split(self.to_k(inputs)), split(self.to_v(inputs))
        for _ in range(self.iters):
            logits = torch.einsum("...sd,...nd->...sn", split(self.to_q(self.norm_slots(slots))), keys) * self.scale
            weights = F.normalize((self.sharpen * logits).softmax(-2) + self.eps, p=1, dim=-1)
            updates = weights @ values
            if hasattr(self, "combine_heads"):
                updates = self.combine_heads(updates.transpose(1, 2).flatten(2))
            slots = self.gru(updates.reshape(-1, PACKAGE_DIM), slots.reshape(-1, PACKAGE_DIM)).view_as(slots)
        self.own_logits.append(logits)
        return slots


class PackageWrapper(nn.Module):
    """Decides which slots to keep, 0 or 1 with a gradient."""

    def __init__(self, slot_attn: nn.Module) -> None:
        super().__init__()
        self.slot_attn = slot_attn
        self.pred_keep_slot = nn.Linear(PACKAGE_DIM, 2)
        self.kept = torch.tensor([1.0, 0.0, 1.0, 1.0])

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.slot_attn(inputs)
        soft = self.pred_keep_slot(slots).softmax(-1)[..., -1]
        return slots, self.kept.expand(len(slots), -1) + soft - soft.detach()


class PackageCodes(nn.Module):
    """Averages slots of one code, and packs them to the front."""

    def __init__(self, slot_attention: nn.Module) -> None:
        super().__init__()
        self.slot_attention, self.vq = slot_attention, nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.vq(self.slot_attention(inputs)).flip(1)


class PackagePictures(nn.Module):
    """A decoder as users write it: a picture and the logit of a mask for each slot, slots folded into the batch."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.positions = nn.Parameter(3 * torch.randn(PACKAGE_DIM, 8, 8))
        self.net = nn.Conv2d(PACKAGE_DIM, 4, 1)
        self.last = last
        self.own_logits: list[Tensor] = []

    def forward(self, slots: Tensor) -> Tensor:
        output = self.net(slots.flatten(0, 1)[:, :, None, None] + self.positions)
        self.own_logits.append(output[:, -1].unflatten(0, slots.shape[:2]))
        return output.movedim(1, -1) if self.last else output


class PackageHost(L.LightningModule):
    """An autoencoder for images, for frames folded into the batch, or for frames one after another.

    Args:
        attention: The slot attention.
        frames: ``"image"``, ``"folded"`` or ``"loop"``.
        last: The decoder gives channels last.
        unfold: Masks get their frames back before the softmax over slots.
    """

    def __init__(
        self, attention: nn.Module | None = None, frames: str = "image", last: bool = False, unfold: bool = False
    ) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, PACKAGE_DIM, 4, 4)
        self.slot_attn = PackageAttention() if attention is None else attention
        self.decoder = PackagePictures(last)
        self.frames, self.unfold = frames, unfold
        self.host_losses: list[Tensor] = []

    def _reconstruct(self, images: Tensor) -> Tensor:
        slots = self.slot_attn(3 * self.encoder(images).flatten(2).transpose(1, 2))
        slots, kept = slots if isinstance(slots, tuple) else (slots, None)
        output = self.decoder(slots)
        output = (output.movedim(-1, 1) if self.decoder.last else output).unflatten(0, slots.shape[:2])
        if self.unfold:
            masks = output[:, :, 3:].unflatten(0, (-1, PACKAGE_T)).softmax(2).flatten(0, 1)
        else:
            masks = output[:, :, 3:].softmax(1)
        if kept is not None:
            masks = masks * kept[:, :, None, None, None]
        return (output[:, :, :3] * masks).sum(1)

    def forward(self, video: Tensor) -> Tensor:
        if self.frames == "image":
            return self._reconstruct(video[:, 0])
        if self.frames == "folded":
            return self._reconstruct(video.flatten(0, 1)).unflatten(0, video.shape[:2])
        return torch.stack([self._reconstruct(frame) for frame in video.unbind(1)], 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self(batch["video"]).square().mean()
        self.host_losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "package_images": PackageHost,
    "package_folded": lambda: PackageHost(frames="folded"),
    "package_heads": lambda: PackageHost(PackageAttention(heads=2)),
    "package_adaptive": lambda: PackageHost(PackageWrapper(PackageAttention())),
}


def package_batch(videos: int = 2, seed: int = 0) -> dict[str, Tensor]:
    return {"video": 2 * torch.randn(videos, PACKAGE_T, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def training_loss(host: Any) -> Tensor:
    return host.training_step(package_batch(), 0)


def package_loader(batches: int = 3, videos: int = 2) -> Any:
    clips = [{"video": package_batch(1, seed)["video"][0]} for seed in range(batches * videos)]
    return torch.utils.data.DataLoader(clips, batch_size=videos, generator=torch.Generator())  # type: ignore[arg-type]
