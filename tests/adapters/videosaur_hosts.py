"""Small hosts with the layout of the VideoSAUR family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DIM, SLOTS, PATCH = 6, 3, 4


class Corrector(nn.Module):
    """Slot attention that keeps the logits of its last iteration for the test, as lists by call."""

    def __init__(self, iterations: int = 2, give_dots: bool = False, over_patches: bool = False) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.scale = DIM**-0.5
        self.iterations = iterations
        self.give_dots = give_dots
        self.over_patches = over_patches
        self.sharpen = 1.0
        self.own_logits: list[Tensor] = []

    def forward(self, slots: Tensor, features: Tensor, n_iters: int | None = None) -> dict[str, Tensor]:
        keys, values = self.to_k(features), self.to_v(features)
        for _ in range(n_iters or self.iterations):
            logits = torch.einsum("bsd,bnd->bsn", self.to_q(slots), keys) * self.scale
            weights = logits.softmax(1)
            slots = slots + torch.einsum("bsn,bnd->bsd", weights / weights.sum(-1, keepdim=True), values)
        self.own_logits.append(logits)
        output = {"slots": slots, "masks": (self.sharpen * logits).softmax(1)}
        if self.over_patches:
            output["spread"] = logits.softmax(-1)
        return {**output, "dots": logits} if self.give_dots else output


class MLPDecoder(nn.Module):
    def __init__(self, patches: int) -> None:
        super().__init__()
        self.mlp = nn.Linear(DIM, 5)
        self.positions = nn.Parameter(torch.randn(patches, DIM))
        self.own_logits: list[Tensor] = []
        self.sharpen = 1.0

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        alpha = self.mlp(slots[:, :, None] + self.positions)[..., -1]
        self.own_logits.append(alpha)
        return {"masks": (self.sharpen * alpha).softmax(1)}


class MixerDecoder(nn.Module):
    def __init__(self, patches: int) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.output_transform = nn.Linear(DIM, 4)
        self.scale = 0.7
        self.positions = nn.Parameter(torch.randn(1, patches, DIM))
        self.own_logits: list[Tensor] = []
        self.sharpen = 1.0

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        query = self.to_q(self.positions.expand(len(slots), -1, -1))
        logits = torch.einsum("bnd,bsd->bns", query, self.to_k(slots)) * self.scale
        self.own_logits.append(logits.transpose(1, 2))
        weights = (self.sharpen * logits).softmax(-1)
        return {"reconstruction": self.output_transform(weights @ slots), "masks": weights.transpose(1, 2)}


class BroadcastDecoder(nn.Module):
    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.backbone = nn.Conv2d(DIM, DIM, 1)
        self.output_transform = nn.Conv2d(DIM, 4, 1)
        self.positions = nn.Parameter(torch.randn(DIM, *size))
        self.own_logits: list[Tensor] = []
        self.sharpen = 1.0

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        features = self.backbone(slots.flatten(0, 1)[:, :, None, None] + self.positions)
        alpha = self.output_transform(features)[:, -1].unflatten(0, slots.shape[:2])
        self.own_logits.append(alpha)
        return {"masks": (self.sharpen * alpha).softmax(1)}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, DIM, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images).flatten(2).transpose(1, 2)


class Processor(nn.Module):
    def __init__(self, corrector: Corrector) -> None:
        super().__init__()
        self.corrector = corrector


class Scan(nn.Module):
    def __init__(self, module: Processor) -> None:
        super().__init__()
        self.module = module

    def forward(self, slots: Tensor, features: Tensor, and_back: bool = False) -> Tensor:
        states = []
        for t in range(features.shape[1]):
            slots = self.module.corrector(slots, features[:, t], **({"n_iters": 3} if t == 0 else {}))["slots"]
            states.append(slots)
        if and_back:
            for t in reversed(range(features.shape[1] - 1)):
                slots = self.module.corrector(slots, features[:, t])["slots"]
                states[t] = slots
        return torch.stack(states, 1)


class OverTime(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, value: Tensor) -> Any:
        output = self.module(value.flatten(0, 1))
        if isinstance(output, Tensor):
            return output.unflatten(0, value.shape[:2])
        return {key: entry.unflatten(0, value.shape[:2]) for key, entry in output.items()}


class Host(nn.Module):
    """The whole model; an image model has no wrappers over time."""

    def __init__(self, decoder: nn.Module, video: bool = True, **corrector: Any) -> None:
        super().__init__()
        self.video = video
        self.slots = nn.Parameter(torch.randn(SLOTS, DIM))
        processor = Processor(Corrector(**corrector))
        self.encoder: nn.Module = OverTime(Encoder()) if video else Encoder()
        self.processor: nn.Module = Scan(processor) if video else processor
        self.decoder: nn.Module = OverTime(decoder) if video else decoder

    @property
    def inner(self) -> tuple[Any, Any]:
        """Corrector and decoder without their wrappers."""
        if self.video:
            return self.processor.module.corrector, self.decoder.module  # type: ignore[union-attr]
        return self.processor.corrector, self.decoder

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        slots, features = self.slots.expand(len(frames), -1, -1), self.encoder(frames)
        states = self.processor(slots, features) if self.video else self.processor.corrector(slots, features)["slots"]
        return self.decoder(states)
