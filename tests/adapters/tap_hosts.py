"""Hosts that no adapter knows: their modules return only slots and pictures, the maps exist inside of them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SLOTS, DIM, HEIGHT, WIDTH = 3, 6, 4, 4
PATCHES = HEIGHT * WIDTH

# How hosts call the softmax: each takes logits and the axis of the slots.
SOFTMAXES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "method": lambda x, axis: x.softmax(axis),
    "method_keyword": lambda x, axis: x.softmax(dim=axis),
    "torch": lambda x, axis: torch.softmax(x, axis),
    "negative": lambda x, axis: torch.softmax(x, dim=axis - x.ndim),
    "functional": lambda x, axis: F.softmax(x, dim=axis),
    "keywords": lambda x, axis: F.softmax(input=x, dim=axis),
    "module": lambda x, axis: nn.Softmax(dim=axis)(x),
    "special": lambda x, axis: torch.special.softmax(x, axis),
    "log": lambda x, axis: F.log_softmax(x, axis).exp(),
    "float": lambda x, axis: x.softmax(axis, dtype=torch.float32),
}
# How decoders lay out alpha (B, T, S, N) of h x w pixels for the softmax, which comes back in its shape
MASKS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "btsn": lambda x, h, w: x.softmax(2),
    "btns": lambda x, h, w: x.mT.softmax(3).mT,
    "bsn": lambda x, h, w: x.flatten(0, 1).softmax(1).view_as(x),
    "bns": lambda x, h, w: x.flatten(0, 1).mT.softmax(-1).mT.reshape(x.shape),
    "bs1hw": lambda x, h, w: x.flatten(0, 1).unflatten(2, (1, h, w)).softmax(1).view_as(x),
    "bshw1": lambda x, h, w: x.flatten(0, 1).unflatten(2, (h, w, 1)).softmax(1).view_as(x),
    "btshw": lambda x, h, w: x.unflatten(3, (h, w)).softmax(2).view_as(x),
}


class SlotsOnly(nn.Module):
    """Slot attention that returns slots, with its logits as ``(B, S, N)``, ``(B, N, S)`` or with heads."""

    def __init__(self, layout: str = "bsn", softmax: str = "method", iterations: int = 2, heads: int = 1) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.update = nn.Linear(DIM, DIM)
        self.layout, self.softmax, self.iterations, self.heads = layout, SOFTMAXES[softmax], iterations, heads
        self.kept: list[Tensor] = []

    def forward(self, slots: Tensor, features: Tensor) -> Tensor:
        for _ in range(self.iterations):
            q, k = self.to_q(slots), self.to_k(features)
            if self.heads > 1:
                q, k = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k))
                logits = q @ k.mT  # (B, heads, S, N)
                weights = self.softmax(logits, 2).mean(1)
            elif self.layout == "bns":
                logits = k @ q.mT
                weights = self.softmax(logits, 2).mT
            else:
                logits = q @ k.mT
                weights = self.softmax(logits, 1)
            weights = weights / (weights.sum(2, keepdim=True) + 1e-8)
            # A second softmax over other axes, as of a predictor, must not be taken for the map.
            mixed = (slots @ slots.mT).softmax(2) @ slots
            slots = slots + self.update(weights @ features) + 0.1 * mixed
        self.kept.append(logits)
        return slots


class PicturesOnly(nn.Module):
    """Decoder that returns the reconstruction ``(B, T, 3, N)`` of slots ``(B, T, S, D)``."""

    def __init__(self, layout: str = "bsn", scale: int = 1) -> None:
        super().__init__()
        self.layout, self.scale = layout, scale
        self.position = nn.Parameter(torch.randn(PATCHES * scale**2, DIM))
        self.out = nn.Linear(DIM, 4)
        self.kept: list[Tensor] = []

    def forward(self, slots: Tensor) -> Any:
        out = self.out((slots[:, :, :, None] + self.position).tanh())  # (B, T, S, N, 4)
        self.kept.append(out[..., 3])
        masks = MASKS[self.layout](out[..., 3], HEIGHT * self.scale, WIDTH * self.scale)
        return torch.einsum("btsn,btsnc->btcn", masks, out[..., :3])


class Unknown(nn.Module):
    """A model of unusual names."""

    def __init__(self, attention: SlotsOnly | None = None, decoder: PicturesOnly | None = None) -> None:
        super().__init__()
        self.seeds, self.eyes = nn.Parameter(torch.randn(1, SLOTS, DIM)), nn.Linear(3, DIM)
        self.place = nn.Parameter(2 * torch.randn(PATCHES, DIM))
        self.binder = SlotsOnly() if attention is None else attention
        self.painter = PicturesOnly() if decoder is None else decoder
        self.checkpointing = ""

    def forward(self, video: Tensor) -> Tensor:
        features = self.eyes(video.flatten(3).mT) + self.place
        slots, clip = self.seeds.repeat(len(video), 1, 1), []
        for frame in features.unbind(1):
            if self.checkpointing:
                slots = checkpoint(self.binder, slots, frame, use_reentrant=self.checkpointing == "reentrant")
            else:
                slots = self.binder(slots, frame)
            clip.append(slots)
        return self.painter(torch.stack(clip, 1))

    def loss_function(self, video: Tensor) -> Tensor:
        return (self(video) - video.flatten(3)).square().mean()

    def own(self) -> tuple[Tensor, Tensor]:
        """The host's own tensors of the last step, as ``(B, T, S, N)`` where there are no heads."""
        attention = torch.stack(self.binder.kept, 1)
        return attention.mT if self.binder.layout == "bns" else attention, self.painter.kept[-1]

    def forget(self) -> None:
        self.binder.kept.clear()
        self.painter.kept.clear()


class UnknownImages(nn.Module):
    """An image model with a vocabulary of its own, whose softmaxes are both in methods of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds, self.eyes = nn.Parameter(torch.randn(SLOTS, DIM)), nn.Linear(3, DIM)
        self.position = nn.Parameter(2 * torch.randn(PATCHES, DIM))

    def bind(self, features: Tensor) -> Tensor:
        weights = ((features + self.position) @ self.seeds.T).softmax(-1)  # (B, N, S)
        return self.seeds + torch.einsum("bns,bnd->bsd", weights / weights.sum(1, keepdim=True), features)

    def paint(self, slots: Tensor) -> Tensor:
        alpha = (slots @ self.position.T).unflatten(2, (1, HEIGHT, WIDTH))
        return torch.einsum("bsxhw,bsd->bxhw", alpha.softmax(1), slots)


class UnknownHost(L.LightningModule):
    """That model in a LightningModule, whose loss is computed outside of any forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UnknownImages()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net.paint(self.net.bind(self.net.eyes(batch["image"].flatten(2).mT))).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_unknown(attention: SlotsOnly | None = None, decoder: PicturesOnly | None = None) -> Unknown:
    torch.manual_seed(0)
    host = Unknown(attention, decoder)
    with torch.no_grad():
        host.seeds.mul_(3)  # slots that differ enough to win patches
    return host


def tap_clip(batch: int = 2, frames: int = 2, seed: int = 0) -> Tensor:
    return torch.rand((batch, frames, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(seed))
