"""A small LightningModule with the layout of SOLD's autoencoder training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

DIM, SLOTS, SIZE = 6, 3, 8


class SoldConvolutions(nn.Module):
    """Both sides have their convolutions under ``encoder``, and a position embedding beside them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(channels_in, DIM, 3, stride, 1), nn.ReLU(), nn.Conv2d(DIM, channels_out, 1), nn.Identity()
        )
        side = SIZE // stride
        self.positional_embedding = nn.Conv2d(1, DIM, 1)
        self.register_buffer("place", torch.linspace(-1, 1, side * side).view(1, 1, side, side))


class SoldEncoder(SoldConvolutions):
    def forward(self, images: Tensor) -> Tensor:
        return (self.encoder(images) + self.positional_embedding(self.place)).flatten(2).transpose(1, 2)


class SoldDecoder(SoldConvolutions):
    sharpen = 1.0

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        copies = slots.flatten(0, 1)[:, :, None, None].expand(-1, -1, SIZE, SIZE)
        drawn = self.encoder(copies + self.positional_embedding(self.place)).unflatten(0, slots.shape[:2])
        self.own_alpha = drawn[:, :, 3]
        return drawn[:, :, :3].clamp(0, 1), (self.sharpen * drawn[:, :, 3:]).softmax(1)


class SoldCorrector(nn.Module):
    sharpen = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.epsilon = DIM**-0.5, 1e-8
        self.num_iterations, self.num_initial_iterations = 1, 3
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.gru = nn.GRUCell(DIM, DIM)
        self.own_logits: list[Tensor] = []
        self.attention_masks: Tensor | None = None

    def forward(self, features: Tensor, slots: Tensor, is_first: bool) -> Tensor:
        keys, values = self.to_k(features), self.to_v(features)
        for _ in range(self.num_initial_iterations if is_first else self.num_iterations):
            logits = torch.einsum("b i d, b j d -> b i j", self.to_q(slots), keys) * self.scale
            weights = (self.sharpen * logits).softmax(1) + self.epsilon
            self.attention_masks = weights / weights.sum(-1, keepdim=True)
            update = torch.einsum("bij,bjd->bid", self.attention_masks, values)
            slots = self.gru(update.reshape(-1, DIM), slots.reshape(-1, DIM)).view(slots.shape)
        self.own_logits.append(logits)
        return slots


class SoldSlots(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(1, SLOTS, DIM))

    def forward(self, batch_size: int) -> Tensor:
        return self.slots.expand(batch_size, -1, -1)


class SoldAutoencoder(nn.Module):
    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.corrector, self.predictor, self.initializer = SoldCorrector(), nn.Linear(DIM, DIM), SoldSlots()
        self.encoder, self.decoder = SoldEncoder(3, DIM, stride), SoldDecoder(DIM, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.corrector.own_logits.clear()
        states, slots = [], self.initializer(len(images))
        for t in range(images.shape[1]):
            corrected = self.corrector(self.encoder(images[:, t]), slots, is_first=t == 0)
            states.append(corrected)
            slots = self.predictor(corrected)
        colours, masks = self.decoder(torch.stack(states, 1).flatten(0, 1))
        return {"reconstructions": (colours * masks).sum(1).unflatten(0, images.shape[:2]), "masks": masks}


class SoldHost(L.LightningModule):
    """The first stage's module; with ``manual``, the second stage's way to optimise."""

    def __init__(self, stride: int = 1, manual: bool = False) -> None:
        super().__init__()
        self.autoencoder = SoldAutoencoder(stride)
        self.automatic_optimization = not manual
        self.outputs: list[dict[str, Any]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, _ = batch
        outputs = self.autoencoder(images)
        loss = nn.functional.mse_loss(outputs["reconstructions"], images)
        self.outputs.append({**outputs, "reconstruction_loss": loss, "loss": loss})
        return self.outputs[-1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


HOSTS: dict[str, Callable[[], nn.Module]] = {"sold": SoldHost, "sold_strided": lambda: SoldHost(stride=2)}


def sold_batch(videos: int = 2, frames: int = 3) -> tuple[Tensor, Tensor]:
    return torch.rand(videos, frames, 3, SIZE, SIZE), torch.randn(videos, frames, 2)


def training_loss(host: Any) -> Tensor:
    return host.training_step(sold_batch(), 0)["loss"]


def parts(host: Any) -> tuple[Any, Any]:
    """Slot attention and decoder, each with a ``sharpen`` to tamper with."""
    return host.autoencoder.corrector, host.autoencoder.decoder


def own_maps(host: Any) -> tuple[Tensor, Tensor]:
    """What the host computed itself: ``(B, T, S, N)`` and ``(B, T, S, h, w)`` logits."""
    corrector, decoder = parts(host)
    logits = torch.stack(corrector.own_logits, 1)
    return logits, decoder.own_alpha.unflatten(0, logits.shape[:2])
