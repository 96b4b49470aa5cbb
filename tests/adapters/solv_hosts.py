"""A stand-in for the public SOLV model, which keeps its own tensors for comparison, and this package's SOLV."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from ssync_pl.hosts import SOLV

SLOTS, DIM, CHANNELS, RADIUS = 5, 8, 6, 1
ROWS, COLUMNS = 3, 4
PATCHES, KEPT, VIDEOS = ROWS * COLUMNS, 6, 3
FRAMES = 2 * RADIUS + 1


class Binder(nn.Module):
    """Slot attention whose keys and values depend on the slot; `f` makes keys, then values, in each iteration."""

    def __init__(self, iterations: int = 2) -> None:
        super().__init__()
        self.num_slots, self.slot_dim, self.iters, self.scale = SLOTS, DIM, iterations, DIM**-0.5
        self.res_h, self.res_w, self.N, self.N_frame, self.sigma = ROWS, COLUMNS, PATCHES, RADIUS, 5
        self.abs_grid = nn.Parameter(torch.rand(1, 1, PATCHES, 2) * 2 - 1)
        self.slots = nn.Parameter(torch.randn(1, SLOTS, DIM))
        self.S_p, self.S_s = nn.Parameter(torch.randn(1, SLOTS, 1, 2)), nn.Parameter(torch.rand(1, SLOTS, 1, 2) + 0.5)
        self.Q, self.K, self.V = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.g = nn.Linear(2, DIM)
        self.f = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(inplace=True), nn.Linear(DIM, DIM))
        self.initial_mlp = nn.Linear(CHANNELS, DIM)
        self.gru = nn.GRUCell(DIM, DIM)
        self.tamper = False
        self.own_logits: Tensor | None = None

    def forward(self, inputs: Tensor, token_indices: Tensor) -> tuple[Tensor, Tensor]:
        frames = len(inputs)
        tokens = self.initial_mlp(inputs)[:, None].expand(-1, SLOTS, -1, -1)
        at = self.abs_grid[0, 0][token_indices][:, None]
        slots, centre, reach = self.slots.expand(frames, -1, -1), self.S_p, self.S_s
        for _ in range(self.iters + 1):
            relative = (at - centre) / (reach * self.sigma)
            keys = self.f(self.K(tokens) + self.g(relative))
            values = self.f(self.V(tokens) + self.g(relative))
            query = self.Q(slots)[..., None]
            logits = torch.einsum("bsdi,bsjd->bsj", query, keys)
            logits *= self.scale
            attention = logits.softmax(1) + 1e-8
            attention = attention / attention.sum(-1, keepdim=True)
            update = (attention[..., None] * values).sum(2)
            centre = (attention[..., None] * at).sum(2, keepdim=True)
            reach = ((attention[..., None] * (at - centre) ** 2).sum(2, keepdim=True) + 1e-4).sqrt()
            slots = self.gru(update.flatten(0, 1), slots.reshape(-1, DIM)).view(frames, SLOTS, DIM)
        self.own_logits = logits.detach()
        attention = attention.view(-1, FRAMES, SLOTS, KEPT)[:, RADIUS]
        return slots, attention.roll(1, -1) if self.tamper else attention


class Merger(nn.Module):
    """Clusters slots on the CPU, by chance not at all; gives means, merged attention and numbers, no assignment."""

    def __init__(self, threshold: float = 0.6) -> None:
        super().__init__()
        self.num_slots, self.cluster_drop_p, self.threshold, self.tamper = SLOTS, 0.4, threshold, False
        self.own_clusters: list[list[int]] = []

    def forward(self, slots: Tensor, patch_attn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        unit = torch.nn.functional.normalize(slots.detach().cpu(), dim=-1)
        self.own_clusters = []
        for video in unit:
            labels = list(range(SLOTS))
            if random.random() >= self.cluster_drop_p:
                heads: list[int] = []
                for slot in range(SLOTS):
                    near = [k for k, head in enumerate(heads) if 1 - float(video[slot] @ video[head]) < self.threshold]
                    if not near:
                        heads.append(slot)
                    labels[slot] = near[0] if near else len(heads) - 1
            self.own_clusters.append(labels)
        onehot = torch.eye(SLOTS)[torch.tensor(self.own_clusters)].transpose(1, 2).to(slots)
        sizes = onehot.sum(-1, keepdim=True)
        merged = onehot @ slots / (sizes + 1e-8)
        attention = onehot @ patch_attn + 1e-8
        attention = attention / attention.sum(-1, keepdim=True)
        return merged.flip(0) if self.tamper else merged, attention, (sizes[..., 0] > 0).sum(-1)


class Decoder(nn.Module):
    """Features and, in the last channel, alpha of every patch of every slot."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(DIM, 16), nn.Linear(16, CHANNELS + 1)

    def forward(self, slot_maps: Tensor) -> Tensor:
        return self.layer2(self.layer1(slot_maps).relu())


class SolvHost(nn.Module):
    """`forward(frames, mask, token_indices)` of the public model: a plain module, trained by a loop."""

    def __init__(self, merge: bool = True, iterations: int = 2) -> None:
        super().__init__()
        self.slot_num, self.token_num, self.merge_slots, self.tamper = SLOTS, PATCHES, merge, False
        self.s_bind = Binder(iterations)
        self.t_bind = nn.Linear(FRAMES * DIM, DIM)
        self.merge = Merger()
        self.dec = Decoder()
        self.pos_dec = nn.Parameter(torch.randn(1, PATCHES, DIM))
        self.own_alpha: list[Tensor] = []

    def forward(self, frames: Tensor, mask: Tensor, token_indices: Tensor) -> dict[str, Tensor]:
        slots, attention = self.s_bind(frames, token_indices)
        windows = slots.view(-1, FRAMES, SLOTS, DIM) * mask[..., None, None]
        slots = self.t_bind(windows.transpose(1, 2).flatten(2)) + windows[:, RADIUS]
        numbers = torch.full((len(mask),), SLOTS)
        if self.merge_slots:
            slots, attention, numbers = self.merge(slots, attention)
        where = attention @ attention.new_ones(KEPT, DIM)
        out = self.dec(((slots + where)[:, :, None] + self.pos_dec).flatten(0, 1)).unflatten(0, (-1, SLOTS))
        rec, masks, self.own_alpha = [], torch.zeros(len(mask), SLOTS, PATCHES), []
        for video, number in enumerate(numbers.tolist()):
            alpha = out[video, :number, :, -1]
            self.own_alpha.append(alpha.detach())
            share = alpha.softmax(0)
            masks[video, :number] = share
            rec.append((out[video, :number, :, :-1] * share[..., None]).sum(0))
        if self.tamper:
            masks = masks.roll(1, -1)
        return {"rec": torch.stack(rec), "mask": masks, "slots": slots, "slot_nums": numbers}


def centre(value: Tensor) -> Tensor:
    """The centre frame of each window, of values of all frames."""
    return value.unflatten(0, (-1, FRAMES))[:, RADIUS]


def solv_inputs(videos: int = VIDEOS) -> tuple[Tensor, Tensor, Tensor]:
    frames = torch.randn(videos * FRAMES, KEPT, CHANNELS)
    places = torch.stack([torch.randperm(PATCHES)[:KEPT].sort().values for _ in range(videos * FRAMES)])
    mask = torch.ones(videos, FRAMES)
    mask[0, 0] = 0
    return frames, mask, places


def training_loss(host: nn.Module, batch: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    batch = solv_inputs() if batch is None else batch
    generator = torch.Generator().manual_seed(7)
    target = torch.randn(len(batch[1]), PATCHES, CHANNELS, generator=generator)
    return (host(*batch)["rec"] - target).square().mean()


def packaged() -> Any:
    sizes: dict[str, Any] = {"slot_dim": DIM, "feature_dim": CHANNELS, "grid": (ROWS, COLUMNS), "clip_length": FRAMES}
    merging: dict[str, Any] = {"merge_threshold": 0.3, "merge_min_slots": 1, "merge_rise": 1.0}
    parts: dict[str, Any] = {"temporal_blocks": 1, "temporal_heads": 2, "decoder_hidden": (16,), "dropout": 0.0}
    return SOLV(SLOTS, backbone=None, edge_probability=0.0, **sizes, **merging, **parts)
