"""Dense alignment, the quadratic rival of SSync: every patch is compared with every other of its group of frames."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ssync_pl.errors import ShapeError, require, require_shape
from ssync_pl.method.labels import hard_labels

_EPSILON = 1e-8


def decoder_consistency(
    decoder_features: Tensor,
    encoder_features: Tensor,
    encoder_labels: Tensor,
    *,
    group_frames: int = 4,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
) -> Tensor:
    """Pulls what the decoder rebuilt at a patch to the encoder's features of that patch and of its object.

    For each patch the similarities to all patches of its group of frames form a softmax. Two mean log-probabilities
    are taken, of the patch itself and of all patches with its label, which ranks them: itself first, its object second.

    Args:
        decoder_features: ``(B, T, N, C)``, with gradient.
        encoder_features: ``(B, T, N, C)``; no gradient flows into them.
        encoder_labels: ``(B, T, N)`` int64, the slot that wins each patch in slot attention.
        group_frames: Frames that are compared with each other; must divide T. Time and memory are proportional to
            ``B * T * N * N * group_frames``.
        temperature: Of the softmax, above 0.
        base_temperature: Scales the loss to ``temperature / base_temperature`` of it.

    Returns:
        0-dim loss.

    Source: SRL, dense synergistic learning for video object-centric models: the decoder's consistency loss.
    """
    _check(decoder_features, encoder_features, encoder_labels, group_frames, temperature, base_temperature)
    student, anchor = _groups(decoder_features, group_frames), _groups(encoder_features.detach(), group_frames)
    same = _same_label(encoder_labels, group_frames)
    log_probs = (student @ anchor.mT / temperature).log_softmax(dim=-1)
    of_object = (log_probs * same).sum(-1) / same.sum(-1)
    of_itself = log_probs.diagonal(dim1=-2, dim2=-1)
    return -(of_object + of_itself).mean() / 2 * (temperature / base_temperature)


def encoder_consistency(
    features: Tensor,
    reference_features: Tensor,
    decoder_labels: Tensor,
    *,
    group_frames: int = 4,
    neighbours: int = 8,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
) -> Tensor:
    """Pulls the encoder's features of a patch to its nearest patches and to its object in the decoder's masks.

    As `decoder_consistency`, with the features themselves on both sides: a patch is not compared with itself, and in
    its place stand the patches that are nearest in the frozen features.

    Args:
        features: ``(B, T, N, C)``, with gradient.
        reference_features: ``(B, T, N, D)``, the frozen backbone's; no gradient flows into them.
        decoder_labels: ``(B, T, N)`` int64, the slot that wins each patch in the decoder's masks.
        neighbours: Nearest patches per frame of a group, in [1, N]; the patch itself is among them.
        group_frames, temperature, base_temperature: As for `decoder_consistency`.
    """
    _check(features, reference_features, decoder_labels, group_frames, temperature, base_temperature)
    patches = features.shape[2]
    require(1 <= neighbours <= patches, f"argument `neighbours` to be in [1, {patches}], a frame's patches", neighbours)
    student, fixed = _groups(features, group_frames), _groups(reference_features.detach(), group_frames)
    itself = torch.eye(student.shape[1], dtype=torch.bool, device=student.device)
    with torch.no_grad():
        alike = fixed @ fixed.mT
        # Patches that tie with the last of the nearest are among them.
        close = (alike >= alike.topk(neighbours * group_frames, dim=-1).values[..., -1:]) & ~itself
        same = _same_label(decoder_labels, group_frames) & ~itself
    logits = student @ student.mT / temperature
    log_probs = logits - logits.masked_fill(itself, -math.inf).logsumexp(dim=-1, keepdim=True)
    of_close = (log_probs * close).sum(-1) / (close.sum(-1) + _EPSILON)
    of_object = (log_probs * same).sum(-1) / (same.sum(-1) + _EPSILON)
    return -(of_close + of_object).mean() / 2 * (temperature / base_temperature)


def slot_redundancy(attention: Tensor, slots: Tensor, redundant: int = 5) -> Tensor:
    """Spreads the attention of slots that repeat another one, until they hold nothing.

    In each video the two slots that are most alike at the last frame are found, and of them the one whose attention
    is nearer to uniform; then the next pair among the others, and so on. The loss is the mean divergence of those
    slots' attention from the uniform one. SRL uses it during its first steps only.
    """
    fits = attention.ndim == slots.ndim == 4 and attention.shape[:3] == slots.shape[:3]
    require_shape(fits, "`attention` (B, T, S, N) and `slots` (B, T, S, D) of one clip", attention, slots)
    require(redundant >= 1, "argument `redundant` to be at least 1", redundant)
    batch, frames, count, patches = attention.shape
    if count < 2:
        return attention.sum() * 0.0
    picks = min(redundant, count - 1)  # at the last pick two slots have to be left
    divergence = (attention * ((attention + _EPSILON).log() + math.log(patches))).sum(-1)
    with torch.no_grad():
        last = normalize(slots[:, -1].detach(), dim=-1)
        first, second = torch.triu_indices(count, count, offset=1, device=slots.device)
        alike = (last @ last.mT)[:, first, second]
        by_video = divergence.mean(1)
        chosen = torch.zeros_like(by_video, dtype=torch.bool)
        for _ in range(picks):
            free = ~(chosen[:, first] | chosen[:, second])
            pair = alike.masked_fill(~free, -math.inf).max(1, keepdim=True).indices
            one, other = first[pair], second[pair]
            flatter = torch.where(by_video.gather(1, one) <= by_video.gather(1, other), one, other)
            chosen = chosen.scatter(1, flatter, True)
    return (divergence * chosen.unsqueeze(1)).sum() / (picks * batch * frames)


class DenseAlignmentOutput(NamedTuple):
    """Losses of `DenseAlignment`, 0-dim: the weighted sum and its three terms."""

    loss: Tensor
    decoder_loss: Tensor
    encoder_loss: Tensor
    redundancy_loss: Tensor


class DenseAlignment(nn.Module):
    """The three losses with their projections, as a regulariser of a host that rebuilds features."""

    def __init__(
        self,
        feature_dim: int,
        encoder_dim: int | None = None,
        projection_dim: int = 128,
        group_frames: int = 4,
        neighbours: int = 8,
        redundant: int = 5,
        weight: float = 0.1,
        redundancy_weight: float = 0.1,
        redundancy_steps: int = 10_000,
        start_step: int = 20_000,
    ) -> None:
        super().__init__()
        self.decoder_projection = nn.Linear(feature_dim, projection_dim, bias=False)
        self.encoder_projection = nn.Linear(encoder_dim or feature_dim, projection_dim, bias=False)
        self.group_frames, self.neighbours, self.redundant = group_frames, neighbours, redundant
        self.weight, self.redundancy_weight = weight, redundancy_weight
        self.start_step, self.redundancy_steps = start_step, redundancy_steps

    def forward(
        self,
        backbone_features: Tensor,
        rebuilt_features: Tensor,
        encoder_features: Tensor,
        attention: Tensor,
        masks: Tensor,
        slots: Tensor,
        step: int,
    ) -> DenseAlignmentOutput:
        """Computes what is on after a number of optimizer steps; losses that are off are 0.

        Features are ``(B, T, N, C)``: frozen, rebuilt by the decoder, and what slot attention reads. Maps are
        ``(B, T, S, N)`` probabilities over slots, slots are ``(B, T, S, D)``.
        """
        decoder = encoder = redundancy = rebuilt_features.new_zeros(())
        group = {"group_frames": self.group_frames}
        if step >= self.start_step and self.weight > 0:
            rebuilt, anchor = (self.decoder_projection(x) for x in (rebuilt_features, backbone_features))
            decoder = decoder_consistency(rebuilt, anchor, hard_labels(attention), **group)
            encoded = self.encoder_projection(encoder_features)
            group["neighbours"] = self.neighbours
            encoder = encoder_consistency(encoded, backbone_features, hard_labels(masks), **group)
        if step < self.redundancy_steps and self.redundancy_weight > 0:
            share = attention + _EPSILON
            redundancy = slot_redundancy(share / share.sum(-1, keepdim=True), slots, self.redundant)
        loss = self.weight * (decoder + encoder) + self.redundancy_weight * redundancy
        return DenseAlignmentOutput(loss, decoder, encoder, redundancy)


def _groups(features: Tensor, group_frames: int) -> Tensor:
    """(groups, patches of a group, C), each patch of length 1."""
    return normalize(features, dim=-1).reshape(-1, group_frames * features.shape[2], features.shape[3])


def _same_label(labels: Tensor, group_frames: int) -> Tensor:
    grouped = labels.reshape(-1, group_frames * labels.shape[2])
    return grouped.unsqueeze(-1) == grouped.unsqueeze(-2)


def _check(
    student: Tensor, other: Tensor, labels: Tensor, group_frames: int, temperature: float, base_temperature: float
) -> None:
    require(temperature > 0 and base_temperature > 0, "temperatures above 0", temperature, base_temperature)
    fits = student.ndim == other.ndim == 4 and student.shape[:3] == other.shape[:3] == labels.shape
    expected = "features (B, T, N, C) and labels (B, T, N) of the same videos, frames and patches"
    require_shape(fits, expected, student, other, labels)
    check_group(student.shape[1], group_frames)


def check_group(frames: int, group_frames: int) -> None:
    """Refuses groups that do not divide the frames of a clip, by `ShapeError`."""
    if group_frames < 1 or frames % group_frames:
        expected = f"argument `group_frames` to divide the {frames} frames of a clip"
        raise ShapeError(f"Expected {expected}, but got {group_frames}.")
