"""What `cost.py` compares with, written for it: the method frame by frame, and the method in plain batched PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["loop_block", "vectorised_block"]


def loop_block(attention: Tensor, masks: Tensor, grid: tuple[int, int], merge_threshold: float = 0.7) -> Tensor:
    """Both losses with Python loops over videos, frames and slots, as the method reads on paper.

    Args:
        attention: ``(B, T, S, N)`` logits.
        masks: ``(B, T, S, N)`` logits.
        grid: ``(H, W)``.
        merge_threshold: Overlap above which slots are redundant.

    Returns:
        0-dim loss.
    """
    _, frames, slots, _ = attention.shape
    boundary, interior = [], []
    for d, a in zip(attention, masks, strict=True):
        encoder, decoder = [x.softmax(1).argmax(1) for x in (d.detach(), a.detach())]
        winners = _loop_winners(d.detach(), encoder, merge_threshold)
        encoder, decoder = [
            torch.stack([torch.tensor([winners[int(i)] for i in frame], device=d.device) for frame in labels])
            for labels in (encoder, decoder)
        ]
        for t in range(frames):
            p, q = d[t].softmax(0), a[t].softmax(0)
            differ_e, differ_d = [_loop_neighbours(x.view(frames, *grid), t) for x in (encoder, decoder)]
            here = ((differ_e >= 1) & (differ_e <= 9)).flatten().nonzero().flatten()
            if len(here):
                boundary.append((q[:, here] - F.one_hot(encoder[t][here], slots).T).square().flatten())
            here = (differ_d < 1).flatten().nonzero().flatten()
            if len(here):
                interior.append((p[:, here] - F.one_hot(decoder[t][here], slots).T).square().flatten())
    parts = [torch.cat(x).mean() for x in (boundary, interior) if x]
    return sum(parts, (attention.sum() + masks.sum()) * 0.0)


def _loop_winners(d: Tensor, labels: Tensor, threshold: float) -> list[int]:
    frames, slots, _ = d.shape
    cover = d > d.mean(dim=(0, 2), keepdim=True)
    linked = [[False] * slots for _ in range(slots)]
    for i in range(slots):
        for j in range(i):
            overlap = 0.0
            for t in range(frames):
                together = (cover[t, i] & cover[t, j]).sum().item()
                either = (cover[t, i] | cover[t, j]).sum().item()
                overlap += together / either if either else 0.0
            linked[i][j] = linked[j][i] = overlap / frames > threshold
    area = [(labels == i).sum().item() for i in range(slots)]
    winners = [-1] * slots
    for start in range(slots):
        if winners[start] >= 0:
            continue
        stack, group = [start], {start}
        while stack:
            i = stack.pop()
            for j in range(slots):
                if linked[i][j] and j not in group:
                    group.add(j)
                    stack.append(j)
        best = max(sorted(group), key=lambda i: area[i])
        for i in group:
            winners[i] = best
    return winners


def _loop_neighbours(labels: Tensor, t: int) -> Tensor:
    frames, height, width = labels.shape
    own = labels[t]
    rows, columns = (torch.arange(size, device=labels.device) for size in (height, width))
    count = (labels[max(t - 1, 0)] != own).int() + (labels[min(t + 1, frames - 1)] != own)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            shifted = own[(rows + dy).clamp(0, height - 1)][:, (columns + dx).clamp(0, width - 1)]
            count = count + (shifted != own)
    return count


def vectorised_block(attention: Tensor, masks: Tensor, grid: tuple[int, int], merge_threshold: float = 0.7) -> Tensor:
    """Both losses in batched PyTorch and nothing else: no statistics, no options, no checks.

    Args:
        attention: ``(B, T, S, N)`` logits.
        masks: ``(B, T, S, N)`` logits.
        grid: ``(H, W)``.
        merge_threshold: Overlap above which slots are redundant.

    Returns:
        0-dim loss.
    """
    batch, _, slots, _ = attention.shape
    p, q = attention.softmax(2), masks.softmax(2)
    with torch.no_grad():
        encoder, decoder = p.max(2).indices, q.max(2).indices
        cover = (attention > attention.mean((1, 3), keepdim=True)).float()
        together = cover @ cover.mT
        area = together.diagonal(dim1=-2, dim2=-1)
        either = area.unsqueeze(-1) + area.unsqueeze(-2) - together
        overlap = (together / either.clamp_min(1e-6)).mean(1)
        reach = ((overlap > merge_threshold) | torch.eye(slots, dtype=torch.bool, device=p.device)).float()
        for _ in range(slots.bit_length()):
            reach = (reach @ reach > 0).float()
        flat = encoder.view(batch, -1)
        won = torch.zeros(batch, slots, device=p.device).scatter_add_(1, flat, torch.ones_like(flat, dtype=p.dtype))
        winners = torch.where(reach > 0, won.unsqueeze(1), -1.0).max(2).indices
        encoder, decoder = (winners.gather(1, x.view(batch, -1)).view(x.shape) for x in (encoder, decoder))
        differ_e, differ_d = (_neighbours(x.unflatten(2, grid)).flatten(2) for x in (encoder, decoder))
        boundary, interior = (differ_e >= 1) & (differ_e <= 9), differ_d < 1
    index = torch.arange(slots, device=p.device).unsqueeze(1)
    losses = []
    for student, teacher, where in ((q, encoder, boundary), (p, decoder, interior)):
        error = (student - (teacher.unsqueeze(2) == index).to(p.dtype)).square().sum(2)
        losses.append((error * where).sum() / (where.sum() * slots).clamp_min(1))
    return losses[0] + losses[1]


def _neighbours(labels: Tensor) -> Tensor:
    _, _, height, width = labels.shape
    padded = F.pad(labels.float(), (1, 1, 1, 1, 1, 1), mode="replicate").to(labels.dtype)
    count = (padded[:, :-2, 1:-1, 1:-1] != labels).int() + (padded[:, 2:, 1:-1, 1:-1] != labels)
    for dy in range(3):
        for dx in range(3):
            count += padded[:, 1:-1, dy : dy + height, dx : dx + width] != labels
    return count
