"""Small hosts with the layout of RandSF.Q and VQ-VFM-OCL: plain PyTorch, maps returned. `HOSTS` names factories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

RANDSFQ_DIM, RANDSFQ_SLOTS, RANDSFQ_GRID, RANDSFQ_T = 8, 4, (2, 4), 3
_N = RANDSFQ_GRID[0] * RANDSFQ_GRID[1]


class Aggregat(nn.Module):
    """Slot attention that returns its attention; slots that a mask rules out have logits of minus infinity."""

    def __init__(self, num_iter: int = 2) -> None:
        super().__init__()
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(RANDSFQ_DIM, RANDSFQ_DIM, bias=False) for _ in range(3))
        self.num_iter = num_iter
        self.sharpen = 1.0
        self.own_logits: list[Tensor] = []

    def forward(
        self, features: Tensor, query: Tensor, smask: Tensor | None = None, num_iter: int | None = None
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.proj_k(features), self.proj_v(features)
        for _ in range(num_iter or self.num_iter):
            logits = torch.einsum("bsd,bnd->bsn", self.proj_q(query) * RANDSFQ_DIM**-0.5, keys)
            if smask is not None:
                logits = logits.where(smask[:, :, None], -torch.inf)
            attention = (self.sharpen * logits).softmax(1)
            query = query + torch.einsum("bsn,bnd->bsd", attention / (attention.sum(2, keepdim=True) + 1e-5), values)
        self.own_logits.append(logits)
        return query, attention


class BroadcastDecode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.posit_embed = nn.Linear(RANDSFQ_DIM, RANDSFQ_DIM)
        self.backbone = nn.Sequential(nn.Linear(RANDSFQ_DIM, 6), nn.GELU(), nn.Linear(6, RANDSFQ_DIM + 1))
        self.places = nn.Parameter(3 * torch.randn(_N, RANDSFQ_DIM))
        self.sharpen = 1.0
        self.own_logits: list[Tensor] = []

    def forward(self, clue: Any, slots: Tensor, smask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mixture = self.posit_embed(slots.flatten(0, 1)[:, None] + self.places)
        output = self.backbone(mixture).unflatten(0, slots.shape[:2])
        alpha = output[..., -1]
        if smask is not None:
            alpha = alpha.where(smask[:, :, None], -torch.inf)
        self.own_logits.append(alpha)
        masks = (self.sharpen * alpha).softmax(1)
        return (output[..., :-1] * masks[..., None]).sum(1), masks


class MixerDecode(nn.Module):
    """Attention over slots with several heads; the masks are its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.posit_embed = nn.Identity()
        self.attent = nn.MultiheadAttention(RANDSFQ_DIM, 2, batch_first=True)
        self.places = nn.Parameter(3 * torch.randn(_N, RANDSFQ_DIM))
        self.own_masks: list[Tensor] = []

    def forward(self, clue: Any, slots: Tensor) -> tuple[Tensor, Tensor]:
        mixed, masks = self.attent(self.places.expand(len(slots), -1, -1), slots, slots)
        self.own_masks.append(masks.transpose(1, 2))
        return mixed, self.own_masks[-1]


class RandomOrderDecode(MixerDecode):
    """A transformer over patches in a random order, which still returns its attention over slots."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, RANDSFQ_DIM))
        layer = nn.TransformerDecoderLayer(RANDSFQ_DIM, 2, 8, 0.0, batch_first=True)
        self.backbone = nn.TransformerDecoder(layer, 1)


class StepByStepDecode(nn.Module):
    """Predicts patches one after the other, without masks."""

    def __init__(self) -> None:
        super().__init__()
        self.bos = nn.Parameter(torch.zeros(1, 1, RANDSFQ_DIM))
        self.posit_embed = nn.Identity()
        layer = nn.TransformerDecoderLayer(RANDSFQ_DIM, 2, 8, 0.0, batch_first=True)
        self.backbone = nn.TransformerDecoder(layer, 2)

    def forward(self, clue: Tensor, slots: Tensor) -> Tensor:
        return self.backbone(torch.cat([self.bos.expand(len(clue), -1, -1), clue[:, :-1]], 1), slots)


class DiffusionDecode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noise_sched = nn.Identity()
        self.backbone = nn.Linear(RANDSFQ_DIM, RANDSFQ_DIM)

    def forward(self, clue: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        return self.backbone(clue), torch.randn_like(clue)


class RandSFQHost(nn.Module):
    """A video model, or an image model without ``transit``."""

    def __init__(self, decode: nn.Module | None = None, video: bool = True, slot_mask: Tensor | None = None) -> None:
        super().__init__()
        self.encode_backbone = nn.Conv2d(3, RANDSFQ_DIM, 4, 4)
        self.encode_project = nn.Linear(RANDSFQ_DIM, RANDSFQ_DIM)
        self.initializ = nn.Parameter(3 * torch.randn(RANDSFQ_SLOTS, RANDSFQ_DIM))
        self.aggregat = Aggregat()
        self.decode = BroadcastDecode() if decode is None else decode
        if video:
            self.transit = nn.Linear(RANDSFQ_DIM, RANDSFQ_DIM)
        self.slot_mask = slot_mask

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        video = hasattr(self, "transit")
        frames = input.flatten(0, 1) if video else input
        feature = self.encode_backbone(frames)
        tokens = feature.flatten(2).transpose(1, 2)
        encode = self.encode_project(tokens).unflatten(0, input.shape[:2] if video else (len(input), 1))
        query, slots, attention = self.initializ.expand(len(input), -1, -1), [], []
        for t in range(encode.shape[1]):
            smask = {} if self.slot_mask is None else {"smask": self.slot_mask}
            slots_t, attention_t = self.aggregat(encode[:, t], query, **smask, num_iter=None if t == 0 else 1)
            query = self.transit(slots_t) if video else slots_t
            slots.append(slots_t)
            attention.append(attention_t)
        smask = {} if self.slot_mask is None else {"smask": self.slot_mask.repeat_interleave(encode.shape[1], 0)}
        output = self.decode(tokens.detach(), torch.stack(slots, 1).flatten(0, 1), **smask)
        recon, masks = output if isinstance(output, tuple) else (output, None)
        return tokens.detach(), torch.stack(attention, 1), masks, recon


class RandSFQWrap(nn.Module):
    """The wrapper of these code bases: a batch in, a dict out."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, **pack: Any) -> dict[str, Any]:
        return dict(zip(("feature", "attent", "attent2", "recon"), self.m(pack["batch"]["video"]), strict=True))


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "randsfq_step_by_step": lambda: RandSFQWrap(RandSFQHost(StepByStepDecode())),
    "randsfq_diffusion": lambda: RandSFQWrap(RandSFQHost(DiffusionDecode())),
}
HOSTS: dict[str, Callable[[], nn.Module]] = {
    "randsfq_broadcast": lambda: RandSFQWrap(RandSFQHost()),
    "randsfq_images": lambda: RandSFQWrap(RandSFQHost(video=False)),
    "randsfq_mixer": lambda: RandSFQWrap(RandSFQHost(MixerDecode())),
    "randsfq_random_order": lambda: RandSFQWrap(RandSFQHost(RandomOrderDecode())),
}


def randsfq_batch(host: Any, videos: int = 2, seed: int = 0) -> dict[str, Tensor]:
    shape = (RANDSFQ_T, 3, 8, 16) if hasattr(host.m, "transit") else (3, 8, 16)
    return {"video": 3 * torch.randn(videos, *shape, generator=torch.Generator().manual_seed(seed))}


def training_loss(host: Any, seed: int = 0) -> Tensor:
    output = host(batch=randsfq_batch(host, seed=seed))
    return nn.functional.mse_loss(output["recon"], output["feature"])
