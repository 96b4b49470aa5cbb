"""Slots of single frames, linked over time."""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Linking = Literal["memory", "previous", "index"]
"""What the slots of a frame are compared with; see `link_slots`."""


def link_slots(slots: Tensor, valid: Tensor, linking: Linking = "memory") -> Tensor:
    """Give the slots of each frame the identities of a video.

    Slots of a frame are matched one to one with those that came before, by the largest total cosine (Hungarian
    matching).
    """
    index = torch.arange(slots.shape[2], device=slots.device).expand(valid.shape)
    if linking == "index":
        return index
    unit = F.normalize(slots.detach().float(), dim=-1).cpu().numpy()
    present = valid.cpu().numpy()
    identities = index.cpu().numpy().copy()
    for video in range(len(unit)):
        _link_video(unit[video], present[video], identities[video], forget=linking == "previous")
    return torch.from_numpy(identities).to(slots.device)


def _link_video(unit: np.ndarray, present: np.ndarray, identities: np.ndarray, forget: bool) -> None:
    known: dict[int, np.ndarray] = {}
    for frame in range(len(unit)):
        now = np.flatnonzero(present[frame])
        if not now.size:
            continue
        rows = np.arange(len(now))
        if known:
            names = np.array(sorted(known))
            alike = unit[frame, now] @ np.stack([known[name] for name in names]).T
            matched, columns = linear_sum_assignment(-alike)
            linked = names[alike.argmax(axis=1)]
            linked[matched] = names[columns]
            if forget:
                rows = matched
            else:
                rest = np.setdiff1d(rows, matched)
                # Where slots are left over, every known name is taken, and there are as many names as slots.
                linked[rest] = np.setdiff1d(np.arange(unit.shape[1]), names)[: len(rest)]
            identities[frame, now] = linked
        seen = {int(identities[frame, now[row]]): unit[frame, now[row]] for row in rows}
        known = seen if forget else {**known, **seen}


def relabel_slots(masks: Tensor, identities: Tensor) -> Tensor:
    """Turn masks `(B, T, S, N)` of slots into masks of identities `(B, T, S)`; pieces of one object are summed."""
    return torch.zeros_like(masks).scatter_add_(2, identities.unsqueeze(-1).expand_as(masks), masks)
