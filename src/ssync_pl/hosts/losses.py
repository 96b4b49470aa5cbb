"""Losses of the hosts beside reconstruction: VideoSAUR's temporal similarity and SlotContrast's slot contrast."""

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from ssync_pl.errors import require, require_shape
from ssync_pl.hosts.evaluation import mean_over_frames
from ssync_pl.method.labels import compute_dtype


def slot_contrast_loss(slots: Tensor, valid: Tensor, *, temperature: float = 0.1, across_batch: bool = True) -> Tensor:
    """Cross-entropy of finding each slot of frame t + 1 among the slots of frame t, by cosine similarity."""
    fits = slots.ndim == 4 and slots.shape[1] >= 2
    require_shape(fits, "argument `slots` to be (B, T, S, D) with T >= 2", slots, advice="Raise `clip_length`.")
    require(temperature > 0, "argument `temperature` to be above 0", temperature, advice="Use 0.1.")
    groups = "1 t (b s)" if across_batch else "b t s"
    # Similarities are divided by a small number: half precision would show.
    with torch.autocast(slots.device.type, enabled=False):
        vectors = rearrange(F.normalize(slots.to(compute_dtype(slots.dtype)), dim=-1), f"b t s d -> {groups} d")
        logits = torch.einsum("btid,btjd->btij", vectors[:, :-1], vectors[:, 1:]) / temperature
    own = torch.diagonal(logits, dim1=-2, dim2=-1)
    pairs = repeat(valid[:, :-1] & valid[:, 1:], f"b t -> {groups}", s=slots.shape[2])
    # A slot stays beside itself, so that no column is empty; columns that do not count get weight 0 below.
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    among = logits.masked_fill(~(pairs.unsqueeze(-1) | itself), -torch.inf)
    return mean_over_frames(among.logsumexp(dim=-2) - own, pairs)


@torch.no_grad()
def temporal_similarity(
    features: Tensor, *, shift: int = 1, temperature: float = 0.075, threshold: float | None = 0.0
) -> Tensor:
    """Computes the target of VideoSAUR's loss: how each patch's features spread over the patches of a later frame.

    Cosine similarities below the threshold are left out, the others divided by the temperature and put through a
    softmax over the later frame's patches. A patch that resembles nothing there is spread evenly.
    """
    require(shift >= 1 and temperature > 0, "`shift` from 1 and `temperature` to be above 0", shift, temperature)
    fits = features.ndim == 4 and features.shape[1] > shift
    expected = f"argument `features` to be (B, T, N, K) with T > {shift}"
    require_shape(fits, expected, features, advice="Raise `clip_length`.")
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.to(compute_dtype(features.dtype)), dim=-1)
        similarity = torch.einsum("btnk,btmk->btnm", unit[:, :-shift], unit[:, shift:])
    if threshold is not None:
        kept = similarity >= threshold
        # Where nothing is kept, equal logits spread the patch evenly; a softmax of -inf alone would be NaN.
        similarity = torch.where(kept.any(dim=-1, keepdim=True), similarity.masked_fill(~kept, -torch.inf), 0.0)
    return (similarity / temperature).softmax(dim=-1)


def temporal_similarity_loss(prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy between predicted logits and the target's distribution over a later frame's patches."""
    expected = f"argument `prediction` to have the shape of the target, {tuple(target.shape)}"
    require_shape(prediction.shape == target.shape, expected, prediction)
    # Distributions and not classes: PyTorch takes both, the classes' axis being the second.
    logits = prediction.flatten(0, 2).to(compute_dtype(prediction.dtype))
    per_patch = F.cross_entropy(logits, target.flatten(0, 2).to(logits.dtype), reduction="none")
    return mean_over_frames(per_patch.view(prediction.shape[:3]).mean(dim=-1), valid)
