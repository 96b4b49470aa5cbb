"""Hosts whose modules return only slots and pictures: the maps exist inside of them alone."""

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


class SlotsOnly(nn.Module):
    """Slot attention that returns slots, in one of the layouts of the field."""

    def __init__(self, layout: str = "bsn", softmax: str = "method", iterations: int = 2, heads: int = 1) -> None:
        super().__init__()
        self.to_q = nn.Linear(DIM, DIM, bias=False)
        self.to_k = nn.Linear(DIM, DIM, bias=False)
        self.update = nn.Linear(DIM, DIM)
        self.layout, self.softmax, self.iterations, self.heads = layout, SOFTMAXES[softmax], iterations, heads
        self.absent = 0
        self.kept: list[Tensor] = []

    def forward(self, slots: Tensor, features: Tensor) -> Tensor:
        for _ in range(self.iterations):
            q, k = self.to_q(slots), self.to_k(features)
            if self.heads > 1:
                q, k = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k))
                logits = q @ k.transpose(2, 3)  # (B, heads, S, N)
                weights = self.softmax(logits, 2).mean(1)
            elif self.layout == "bns":
                logits = k @ q.transpose(1, 2)
                weights = self.softmax(logits, 2).transpose(1, 2)
            else:
                logits = q @ k.transpose(1, 2)
                if self.absent:
                    logits = logits.index_fill(1, torch.arange(SLOTS - self.absent, SLOTS), float("-inf"))
                weights = self.softmax(logits, 1)
            weights = weights / (weights.sum(2, keepdim=True) + 1e-8)
            # A second softmax over other axes, as of a predictor, must not be taken for the map.
            mixed = (slots @ slots.transpose(1, 2)).softmax(2) @ slots
            slots = slots + self.update(weights @ features) + 0.1 * mixed
        self.kept.append(logits)
        return slots


class PicturesOnly(nn.Module):
    """Decoder that returns the reconstruction, in one of the layouts of the field."""

    def __init__(self, layout: str = "bsn", scale: int = 1) -> None:
        super().__init__()
        self.layout, self.scale = layout, scale
        self.position = nn.Parameter(torch.randn(PATCHES * scale**2, DIM))
        self.out = nn.Linear(DIM, 4)
        self.kept: list[Tensor] = []

    def forward(self, slots: Tensor) -> Tensor:
        """Gives ``(B, T, 3, N)`` for slots ``(B, T, S, D)``."""
        out = self.out((slots[:, :, :, None] + self.position).tanh())  # (B, T, S, N, 4)
        colour, alpha = out[..., :3], out[..., 3]
        self.kept.append(alpha)
        height, width = HEIGHT * self.scale, WIDTH * self.scale
        if self.layout == "btsn":
            masks = alpha.softmax(2)
        elif self.layout == "bsn":
            masks = alpha.flatten(0, 1).softmax(1).view_as(alpha)
        elif self.layout == "bns":
            masks = alpha.flatten(0, 1).transpose(1, 2).softmax(-1).transpose(1, 2).reshape(alpha.shape)
        elif self.layout == "bs1hw":
            masks = alpha.flatten(0, 1).unflatten(2, (1, height, width)).softmax(1).view_as(alpha)
        elif self.layout == "bshw1":
            masks = alpha.flatten(0, 1).unflatten(2, (height, width, 1)).softmax(1).view_as(alpha)
        elif self.layout == "btshw":
            masks = alpha.unflatten(3, (height, width)).softmax(2).view_as(alpha)
        else:
            masks = alpha.transpose(2, 3).softmax(3).transpose(2, 3)  # btns
        return torch.einsum("btsn,btsnc->btcn", masks, colour)


class Unknown(nn.Module):
    """A model of unusual names that no adapter knows."""

    def __init__(self, attention: SlotsOnly | None = None, decoder: PicturesOnly | None = None) -> None:
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(1, SLOTS, DIM))
        self.eyes = nn.Linear(3, DIM)
        self.place = nn.Parameter(2 * torch.randn(PATCHES, DIM))
        self.binder = SlotsOnly() if attention is None else attention
        self.painter = PicturesOnly() if decoder is None else decoder
        self.checkpointing = ""

    def forward(self, video: Tensor) -> Tensor:
        features = self.eyes(video.flatten(3).transpose(2, 3)) + self.place
        slots, clip = self.seeds.repeat(len(video), 1, 1), []
        for t in range(video.shape[1]):
            if self.checkpointing:
                slots = checkpoint(self.binder, slots, features[:, t], use_reentrant=self.checkpointing == "reentrant")
            else:
                slots = self.binder(slots, features[:, t])
            clip.append(slots)
        return self.painter(torch.stack(clip, 1))

    def loss_function(self, video: Tensor) -> Tensor:
        picture = self(video)
        target = F.interpolate(video.flatten(0, 1), size=(HEIGHT * self.painter.scale, WIDTH * self.painter.scale))
        return (picture.flatten(0, 1).unflatten(2, target.shape[2:]) - target).square().mean()

    def own(self) -> tuple[Tensor, Tensor]:
        """The host's own tensors of the last step, as ``(B, T, S, N)`` where there are no heads."""
        attention = torch.stack(self.binder.kept, 1)
        return attention.transpose(2, 3) if self.binder.layout == "bns" else attention, self.painter.kept[-1]

    def forget(self) -> None:
        self.binder.kept.clear()
        self.painter.kept.clear()


class UnknownImages(nn.Module):
    """An image model with a vocabulary of its own, whose softmaxes are both in methods of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(SLOTS, DIM))
        self.eyes = nn.Linear(3, DIM)
        self.position = nn.Parameter(2 * torch.randn(PATCHES, DIM))

    def bind(self, features: Tensor) -> Tensor:
        weights = ((features + self.position) @ self.seeds.T).softmax(-1)  # (B, N, S)
        return self.seeds + torch.einsum("bns,bnd->bsd", weights / weights.sum(1, keepdim=True), features)

    def paint(self, slots: Tensor) -> Tensor:
        alpha = (slots @ self.position.T).unflatten(2, (1, HEIGHT, WIDTH))
        return torch.einsum("bsxhw,bsd->bxhw", alpha.softmax(1), slots)

    def forward(self, image: Tensor) -> Tensor:
        return self.paint(self.bind(self.eyes(image.flatten(2).transpose(1, 2))))


class UnknownHost(L.LightningModule):
    """The model in a LightningModule; the loss may be computed outside of any forward pass."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.net = Unknown() if model is None else model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(self.net, Unknown):
            self.net.forget()
            return self.net.loss_function(batch["video"])
        return self.net.paint(self.net.bind(self.net.eyes(batch["image"].flatten(2).transpose(1, 2)))).square().mean()

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
