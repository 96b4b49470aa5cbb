"""A small plain model with the layout of Genera1Z's SAVi, and the helper that its loop wraps around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DIM, SIZE = 6, 8


class Genera1zCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * DIM, DIM)

    def forward(self, input: Tensor, hx: Tensor) -> Tensor:
        return hx + self.mix(torch.cat([input, hx], -1)).tanh()


class Genera1zAttention(nn.Module):
    sharpen = 1.0

    def __init__(self, num_iter: int) -> None:
        super().__init__()
        self.num_iter = num_iter
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.gru = Genera1zCell()
        self.own_logits: list[Tensor] = []

    def forward(self, query: Tensor, input: Tensor) -> Tensor:
        keys, values = self.proj_k(input), self.proj_v(input)
        for _ in range(self.num_iter):
            q = self.proj_q(query)
            q = q / q.size(-1) ** 0.5
            logits = torch.einsum("bmc,bnc->bmn", q, keys)
            weights = (self.sharpen * logits).softmax(dim=1)
            weights = weights / (weights.sum(dim=2, keepdim=True) + 1e-8)
            update = torch.einsum("bmn,bnc->bmc", weights, values)
            query = self.gru(update.flatten(0, 1), query.flatten(0, 1)).view(query.shape)
        self.own_logits.append(logits)
        return query


class Genera1zBoxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, DIM)

    def forward(self, boxes: Tensor) -> Tensor:
        return self.embed(torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1))


class Genera1zHost(nn.Module):
    sharpen = 1.0

    def __init__(self, num_iter: int = 1, stride: int = 1, channels: int = 4) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"backbone": nn.Conv2d(3, DIM, 3, stride, 1), "project": nn.Linear(DIM, DIM)})
        self.processor = nn.ModuleDict(
            {"initialize": Genera1zBoxes(), "correct": Genera1zAttention(num_iter), "predict": nn.Linear(DIM, DIM)}
        )
        self.decoder = nn.ModuleDict(
            {"backbone": nn.ConvTranspose2d(DIM, DIM, 2, 2), "readout": nn.Conv2d(DIM, channels, 1)}
        )
        self.place = nn.Parameter(torch.randn(DIM, SIZE // 2, SIZE // 2))

    def forward(self, frames: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        correct = self.processor["correct"]
        correct.own_logits.clear()
        features = self.encoder["backbone"](frames.flatten(0, 1)).flatten(2).transpose(1, 2)
        features = self.encoder["project"](features).unflatten(0, frames.shape[:2])
        state, states = self.processor["initialize"](condition[:, 0]), []
        for t in range(frames.shape[1]):
            states.append(correct(state, features[:, t]))
            state = self.processor["predict"](states[-1])
        slots = torch.stack(states, 1).flatten(0, 1)
        drawn = self.decoder["backbone"](slots.flatten(0, 1)[:, :, None, None] + self.place)
        logit = self.decoder["readout"](drawn).unflatten(0, slots.shape[:2])
        self.own_alpha = logit[:, :, 3]
        image = ((self.sharpen * logit[:, :, 3:]).softmax(1) * logit[:, :, :3]).sum(1)
        return image.unflatten(0, frames.shape[:2]), logit[:, :, 3:].argmax(1), slots, logit


class Genera1zHelper(nn.Module):
    """Takes the batch apart and names the outputs, as the loop around the model expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        output = self.model(frames=batch["video"], condition=batch["boxes"])
        return dict(zip(("flow", "segment", "state", "logit"), output, strict=True))


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "genera1z": lambda: Genera1zHelper(Genera1zHost()),
    "genera1z_iterations": lambda: Genera1zHelper(Genera1zHost(num_iter=2)),
    "genera1z_strided": lambda: Genera1zHelper(Genera1zHost(stride=2)),
}


def genera1z_batch(videos: int = 2, frames: int = 3, padded: int = 0) -> dict[str, Tensor]:
    boxes = torch.rand(videos, frames, 3, 4)
    if padded:
        boxes[:, :, -padded:] = 0
    return {"video": torch.rand(videos, frames, 3, SIZE, SIZE), "boxes": boxes}


def training_loss(host: Any, batch: dict[str, Tensor] | None = None) -> Tensor:
    batch = genera1z_batch() if batch is None else batch
    return nn.functional.mse_loss(host(batch)["flow"], batch["video"])


def parts(host: Any) -> tuple[Any, Any]:
    """Slot attention and decoder, each with a ``sharpen`` to tamper with."""
    return host.model.processor["correct"], host.model


def own_maps(host: Any) -> tuple[Tensor, Tensor]:
    """What the host computed itself: ``(B, T, S, N)`` and ``(B, T, S, h, w)`` logits."""
    correct, model = parts(host)
    logits = torch.stack(correct.own_logits, 1)
    return logits, model.own_alpha.unflatten(0, logits.shape[:2])
