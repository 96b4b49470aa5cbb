"""Small hosts with the layout of the object-centric learning framework."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

DIM, SLOTS, PATCH = 8, 4, 4
FRAME, GRID = (8, 16), (2, 4)
N = GRID[0] * GRID[1]


class OclfAttention(nn.Module):
    """One softmax over slots and heads; keeps the logits of each call's last iteration for the test."""

    def __init__(self, heads: int = 1, iterations: int = 2) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.n_heads, self.dims_per_head = heads, DIM // heads
        self.scale = self.dims_per_head**-0.5
        self.iterations = iterations
        self.sharpen = 1.0
        self.own_logits: list[Tensor] = []

    def attend(self, inputs: Tensor, slots: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor]:
        heads = (self.n_heads, self.dims_per_head)
        k, v = self.to_k(inputs).view(*inputs.shape[:2], *heads), self.to_v(inputs).view(*inputs.shape[:2], *heads)
        for _ in range(self.iterations):
            q = self.to_q(slots).view(*slots.shape[:2], *heads)
            logits = torch.einsum("bihd,bjhd->bihj", q, k) * self.scale
            if masked is not None:
                logits = logits.masked_fill(masked[:, :, None, None], float("-inf"))
            weights = (self.sharpen * logits).flatten(1, 2).softmax(1).view_as(logits)
            shares = (weights + 1e-8) / (weights + 1e-8).sum(-1, keepdim=True)
            slots = slots + torch.einsum("bjhd,bihj->bihd", v, shares).flatten(2)
        self.own_logits.append(logits)
        return slots, weights.mean(2)

    def forward(self, inputs: Tensor, slots: Tensor, masked: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.attend(inputs, slots, masked)


class Grouping(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.slot_attention = attention
        self.positional_embedding = nn.Linear(DIM, DIM)

    def forward(self, features: Tensor, slots: Tensor, masked: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.slot_attention(self.positional_embedding(features), slots, masked)


class OverTime(nn.Module):
    """Carries the slots from frame to frame."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, features: Tensor, slots: Tensor, masked: Tensor | None = None) -> tuple[Tensor, ...]:
        states = []
        for frame in features.unbind(1):
            slots = self.module(frame, slots, masked)[0]
            states.append(slots)
        return (torch.stack(states, 1),)


class PatchDecoder(nn.Module):
    def __init__(self, patches: int = N) -> None:
        super().__init__()
        self.num_patches = patches
        self.decoder = nn.Linear(DIM, DIM + 1)
        self.pos_embed = nn.Parameter(torch.randn(1, patches, DIM))
        self.sharpen = 1.0
        self.own_logits: list[Tensor] = []

    def alpha(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        output = self.decoder(slots.flatten(0, -2)[:, None] + self.pos_embed).unflatten(0, slots.shape[:-1])
        self.own_logits.append(output[..., -1])
        return output[..., :-1], self.sharpen * output[..., -1]

    def forward(self, slots: Tensor) -> Any:
        values, alpha = self.alpha(slots)
        masks = alpha.softmax(-2)
        return SimpleNamespace(reconstruction=(values * masks[..., None]).sum(-3), masks=masks)


class PixelDecoder(nn.Module):
    def __init__(self, size: tuple[int, int] = FRAME, colours: int = 3) -> None:
        super().__init__()
        self.initial_conv_size = size
        self.decoder = nn.Conv2d(DIM, colours + 1, 3, padding=1)
        self.positions = nn.Parameter(torch.randn(DIM, *size))
        self.sharpen = 1.0
        self.own_logits: list[Tensor] = []

    def alpha(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        output = self.decoder(slots.flatten(0, -2)[..., None, None] + self.positions).unflatten(0, slots.shape[:-1])
        self.own_logits.append(output[..., -1, :, :])
        return output[..., :-1, :, :], self.sharpen * output[..., -1, :, :]

    def forward(self, slots: Tensor) -> Any:
        values, alpha = self.alpha(slots)
        masks = alpha.softmax(-3)
        return SimpleNamespace(reconstruction=(values * masks.unsqueeze(-3)).sum(-4), masks=masks)


class AmodalDecoder(PixelDecoder):
    def forward(self, slots: Tensor) -> Any:
        output = super().forward(slots)
        alpha = self.own_logits[-1]
        return SimpleNamespace(
            reconstruction=output.reconstruction, masks=alpha.sigmoid(), masks_vis=output.masks, masks_eval=output.masks
        )


class AutoregressiveDecoder(PatchDecoder):
    """Returns no masks of its own."""

    use_decoder_masks = False


class DensityDecoder(PixelDecoder):
    """Renders densities."""

    depth_positions = 5


class OncePerFrame(nn.Module):
    """Runs a decoder once a frame."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, slots: Tensor) -> Any:
        outputs = [self.module(frame).reconstruction for frame in slots.unbind(1)]
        return SimpleNamespace(reconstruction=torch.stack(outputs, 1))


class Extractor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, DIM, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.patch_embed(images).flatten(2).transpose(1, 2)


class OclfHost(L.LightningModule):
    """The whole model; a video model carries slots through time."""

    def __init__(
        self,
        decoder: nn.Module | None = None,
        attention: nn.Module | None = None,
        video: bool = False,
        decoder_name: str = "object_decoder",
    ) -> None:
        super().__init__()
        grouping: nn.Module = Grouping(attention if attention is not None else OclfAttention())
        self.models = nn.ModuleDict(
            {
                "feature_extractor": Extractor(),
                "perceptual_grouping": OverTime(grouping) if video else grouping,
                decoder_name: decoder if decoder is not None else PatchDecoder(),
            }
        )
        self.slots = nn.Parameter(torch.randn(SLOTS, DIM))
        self.video = video
        self.decoder_name = decoder_name

    @property
    def inner(self) -> tuple[Any, Any]:
        """Slot attention and decoder without their wrappers."""
        grouping, decoder = self.models["perceptual_grouping"], self.models[self.decoder_name]
        return getattr(grouping, "module", grouping).slot_attention, getattr(decoder, "module", decoder)

    def decode(self, grouped: tuple[Tensor, ...]) -> Any:
        return self.models[self.decoder_name](grouped[0])

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        images = batch["image"]
        features = self.models["feature_extractor"](images.flatten(0, -4)).unflatten(0, images.shape[:-3])
        masked = None if "n_slots" not in batch else torch.arange(SLOTS) >= batch["n_slots"][:, None]
        grouped = self.models["perceptual_grouping"](features, self.slots.expand(len(images), -1, -1), masked)
        return features, self.decode(grouped)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self(batch)[1].reconstruction.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "oclf_dinosaur": OclfHost,
    "oclf_heads": lambda: OclfHost(attention=OclfAttention(heads=4)),
    "oclf_slot_attention": lambda: OclfHost(PixelDecoder(GRID)),
    "oclf_flow": lambda: OclfHost(PixelDecoder(GRID, colours=2)),
    "oclf_amodal": lambda: OclfHost(AmodalDecoder(GRID)),
    "oclf_savi": lambda: OclfHost(PixelDecoder(GRID), video=True),
    "oclf_savi_code": lambda: OclfHost(OncePerFrame(PixelDecoder(GRID)), video=True, decoder_name="decoder"),
}


def oclf_batch(video: bool = False, images: int = 2, **extra: Any) -> dict[str, Any]:
    shape = (images, 3, 3, *FRAME) if video else (images, 3, *FRAME)
    return {"image": torch.rand(shape), **extra}


def training_loss(host: Any) -> Tensor:
    return host.training_step(oclf_batch(host.video), 0)
