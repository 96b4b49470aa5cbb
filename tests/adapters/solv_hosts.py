"""A stand-in for the public SOLV model, which keeps its own tensors for comparison, and this package's SOLV."""

import random
from typing import Any

import torch
from tiny_models import tiny
from torch import Tensor, nn

from ssync_pl.hosts import SOLV

SLOTS, DIM, CHANNELS, RADIUS = 5, 8, 6, 1
GRID = (3, 4)
PATCHES, KEPT, VIDEOS, FRAMES = 12, 6, 3, 2 * RADIUS + 1


class Binder(nn.Module):
    def __init__(self, iterations: int = 2) -> None:
        super().__init__()
        self.num_slots, self.iters, self.scale, self.N_frame = SLOTS, iterations, DIM**-0.5, RADIUS
        self.res_h, self.res_w = GRID
        self.slots, self.shift = nn.Parameter(torch.randn(SLOTS, DIM)), nn.Parameter(torch.randn(SLOTS, 1, DIM))
        self.Q, self.K, self.V = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.f = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(inplace=True), nn.Linear(DIM, DIM))
        self.initial_mlp, self.gru = nn.Linear(CHANNELS, DIM), nn.GRUCell(DIM, DIM)

    def forward(self, inputs: Tensor, token_indices: Tensor) -> tuple[Tensor, Tensor]:
        tokens, slots = self.initial_mlp(inputs)[:, None] + self.shift, self.slots.expand(len(inputs), -1, -1)
        for _ in range(self.iters + 1):
            keys, values = self.f(self.K(tokens)), self.f(self.V(tokens))
            logits = torch.einsum("bsdi,bsjd->bsj", self.Q(slots)[..., None], keys)
            logits *= self.scale
            attention = logits.softmax(1) + 1e-8
            attention = attention / attention.sum(-1, keepdim=True)
            update = (attention[..., None] * values).sum(2)
            slots = self.gru(update.flatten(0, 1), slots.flatten(0, 1)).view(slots.shape)
        self.own_logits = logits.detach()
        return slots, centre(attention)


class Merger(nn.Module):
    """Clusters slots by chance, or not at all; gives means, merged attention and numbers, but no assignment."""

    tamper = False

    def forward(self, slots: Tensor, patch_attn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.own_clusters = []
        for _ in slots:
            drawn = [random.randrange(3) for _ in range(SLOTS)] if random.random() < 0.6 else list(range(SLOTS))
            found = list(dict.fromkeys(drawn))
            self.own_clusters.append([found.index(label) for label in drawn])
        onehot = torch.eye(SLOTS)[torch.tensor(self.own_clusters)].transpose(1, 2).to(slots)
        sizes = onehot.sum(-1, keepdim=True)
        merged, attention = onehot @ slots / (sizes + 1e-8), onehot @ patch_attn + 1e-8
        attention = attention / attention.sum(-1, keepdim=True)
        return merged.flip(0) if self.tamper else merged, attention, (sizes[..., 0] > 0).sum(-1)


class SolvHost(nn.Module):
    def __init__(self, merge: bool = True, iterations: int = 2) -> None:
        super().__init__()
        self.merge_slots, self.tamper, self.s_bind, self.merge = merge, False, Binder(iterations), Merger()
        self.t_bind = nn.Linear(FRAMES * DIM, DIM)
        self.dec = nn.Sequential(nn.Linear(DIM, 16), nn.ReLU(), nn.Linear(16, CHANNELS + 1))
        self.pos_dec = nn.Parameter(torch.randn(PATCHES, DIM))

    def forward(self, frames: Tensor, mask: Tensor, token_indices: Tensor) -> dict[str, Tensor]:
        slots, attention = self.s_bind(frames, token_indices)
        windows = slots.unflatten(0, (-1, FRAMES)) * mask[..., None, None]
        slots = self.t_bind(windows.transpose(1, 2).flatten(2)) + windows[:, RADIUS]
        numbers = torch.full((len(mask),), SLOTS)
        if self.merge_slots:
            slots, attention, numbers = self.merge(slots, attention)
        slots = slots + attention @ attention.new_ones(KEPT, DIM)
        out = self.dec((slots[:, :, None] + self.pos_dec).flatten(0, 1)).unflatten(0, (-1, SLOTS))
        # Slots beyond a video's number are left out.
        self.own_alpha = [one[:number, :, -1] for one, number in zip(out, numbers.tolist(), strict=True)]
        shares = [alpha.softmax(0) for alpha in self.own_alpha]
        rec = [(one[: len(share), :, :-1] * share[..., None]).sum(0) for one, share in zip(out, shares, strict=True)]
        masks = torch.stack([nn.functional.pad(share, (0, 0, 0, SLOTS - len(share))) for share in shares])
        masks = masks.roll(1, -1) if self.tamper else masks
        return {"rec": torch.stack(rec), "mask": masks, "slots": slots, "slot_nums": numbers}


def centre(value: Tensor) -> Tensor:
    return value.unflatten(0, (-1, FRAMES))[:, RADIUS]


def solv_inputs() -> tuple[Tensor, Tensor, Tensor]:
    frames, mask = torch.randn(VIDEOS * FRAMES, KEPT, CHANNELS), torch.ones(VIDEOS, FRAMES)
    places = torch.stack([torch.randperm(PATCHES)[:KEPT].sort().values for _ in frames])
    mask[0, 0] = 0
    return frames, mask, places


def packaged() -> Any:
    sizes: dict[str, Any] = {"num_slots": SLOTS, "slot_dim": DIM, "grid": GRID, "decoder_hidden": (16,)}
    return tiny(SOLV, merge_threshold=0.3, merge_min_slots=1, merge_rise=1.0, **sizes)
