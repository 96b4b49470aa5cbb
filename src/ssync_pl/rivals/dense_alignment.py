"""Dense alignment, the quadratic rival of SSync: every patch is compared with every other of its group of frames."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ssync_pl.errors import ConfigError, ShapeError

__all__ = ["DenseAlignment", "DenseAlignmentOutput", "decoder_consistency", "encoder_consistency", "slot_redundancy"]

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
    """Pull what the decoder rebuilt at a patch to the encoder's features of that patch and of its object.

    For each patch the similarities to all patches of its group of frames form a softmax. Two mean log-probabilities
    are taken, of the patch itself and of all patches with its label, which ranks them: itself first, its object second.

    Args:
        decoder_features: ``(B, T, N, C)``, with gradient.
        encoder_features: ``(B, T, N, C)``; no gradient flows into them.
        encoder_labels: ``(B, T, N)`` int64, the slot that wins each patch in slot attention.
        group_frames: Frames that are compared with each other; must divide T. Time and memory are proportional to
            ``B * T * N * N * group_frames``.
        temperature: Of the softmax, above 0.
        base_temperature: The loss is scaled by ``temperature / base_temperature``.

    Returns:
        0-dim loss.

    Raises:
        ShapeError: Shapes do not fit.
        ConfigError: A number is out of range.

    Example:
        >>> x = torch.eye(4).view(1, 1, 4, 4)
        >>> near = decoder_consistency(x, x, torch.arange(4).view(1, 1, 4), group_frames=1)
        >>> far = decoder_consistency(x.flip(2), x, torch.arange(4).view(1, 1, 4), group_frames=1)
        >>> bool(near < far)
        True

    Source: SRL, dense synergistic learning for video object-centric models: the decoder's consistency loss.
    """
    _check_temperatures(temperature, base_temperature)
    student = _groups(decoder_features, group_frames, "decoder_features")
    anchor = _groups(encoder_features.detach(), group_frames, "encoder_features")
    _check_same_patches(decoder_features, encoder_features)
    label = _group_labels(encoder_labels, decoder_features, group_frames, "encoder_labels")
    log_probs = (student @ anchor.mT / temperature).log_softmax(dim=-1)
    same = label.unsqueeze(-1) == label.unsqueeze(-2)
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
    """Pull the encoder's features of a patch to its nearest patches and to its object in the decoder's masks.

    As `decoder_consistency`, with the features themselves on both sides: a patch is not compared with itself, and in
    its place stand the patches that are nearest in the frozen features.

    Args:
        features: ``(B, T, N, C)``, with gradient.
        reference_features: ``(B, T, N, D)``, the frozen backbone's; no gradient flows into them.
        decoder_labels: ``(B, T, N)`` int64, the slot that wins each patch in the decoder's masks.
        group_frames: Frames that are compared with each other; must divide T.
        neighbours: Nearest patches, counted for each frame of a group, at least 1; the patch itself is among them.
        temperature: Of the softmax, above 0.
        base_temperature: The loss is scaled by ``temperature / base_temperature``.

    Returns:
        0-dim loss.

    Raises:
        ShapeError: Shapes do not fit.
        ConfigError: A number is out of range.

    Example:
        >>> x = torch.tensor([[[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]]])
        >>> together = encoder_consistency(x, x, torch.tensor([[[0, 0, 1, 1]]]), group_frames=1, neighbours=2)
        >>> apart = encoder_consistency(x, x, torch.tensor([[[0, 1, 0, 1]]]), group_frames=1, neighbours=2)
        >>> bool(together < apart)
        True

    Source: SRL: the encoder's consistency loss.
    """
    _check_temperatures(temperature, base_temperature)
    student = _groups(features, group_frames, "features")
    fixed = _groups(reference_features.detach(), group_frames, "reference_features")
    _check_same_patches(features, reference_features)
    label = _group_labels(decoder_labels, features, group_frames, "decoder_labels")
    nearest = neighbours * group_frames
    if not 1 <= neighbours <= features.shape[2]:
        raise ConfigError(
            f"Expected argument `neighbours` to be in [1, {features.shape[2]}], the patches of a frame, but got "
            f"{neighbours}."
        )
    itself = torch.eye(student.shape[1], dtype=torch.bool, device=student.device)
    with torch.no_grad():
        alike = fixed @ fixed.mT
        # Patches that tie with the last of the nearest are among them.
        close = (alike >= alike.topk(nearest, dim=-1).values[..., -1:]) & ~itself
        same = (label.unsqueeze(-1) == label.unsqueeze(-2)) & ~itself
    logits = student @ student.mT / temperature
    log_probs = logits - logits.masked_fill(itself, -math.inf).logsumexp(dim=-1, keepdim=True)
    of_close = (log_probs * close).sum(-1) / (close.sum(-1) + _EPSILON)
    of_object = (log_probs * same).sum(-1) / (same.sum(-1) + _EPSILON)
    return -(of_close + of_object).mean() / 2 * (temperature / base_temperature)


def slot_redundancy(attention: Tensor, slots: Tensor, redundant: int = 5) -> Tensor:
    """Spread the attention of slots that repeat another one, until they hold nothing.

    In each video the two slots that are most alike at the last frame are found, and of them the one whose attention
    is nearer to uniform; then the next pair among the others, and so on. The loss is the mean divergence of those
    slots' attention from the uniform one. SRL uses it during its first steps only.

    Args:
        attention: ``(B, T, S, N)``, normalised over the patches of a frame.
        slots: ``(B, T, S, D)``; no gradient flows into them.
        redundant: Number of slots to find, at least 1; fewer are found where S is smaller.

    Returns:
        0-dim loss, in [0, log N].

    Raises:
        ShapeError: Shapes do not fit.
        ConfigError: ``redundant`` is out of range.

    Example:
        >>> attention = torch.tensor([[[[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]]])
        >>> slots = torch.tensor([[[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]]])
        >>> slot_redundancy(attention, slots, redundant=1).abs() < 1e-6
        tensor(True)

    Source: SRL: the warm-up against slot redundancy.
    """
    if attention.ndim != 4 or slots.ndim != 4 or attention.shape[:3] != slots.shape[:3]:
        raise ShapeError(
            "Expected arguments `attention` and `slots` to be (B, T, S, N) and (B, T, S, D) of one clip, but got "
            f"{tuple(attention.shape)} and {tuple(slots.shape)}."
        )
    if redundant < 1:
        raise ConfigError(f"Expected argument `redundant` to be at least 1, but got {redundant}.")
    count, patches = attention.shape[2:]
    # At the last pick two slots have to be left.
    picks = min(redundant, max(count - 1, 1))
    if count < 2:
        return attention.sum() * 0.0
    divergence = (attention * ((attention + _EPSILON).log() + math.log(patches))).sum(-1)
    with torch.no_grad():
        last = normalize(slots[:, -1].detach(), dim=-1)
        first, second = torch.triu_indices(count, count, offset=1, device=slots.device)
        alike = (last @ last.mT)[:, first, second]
        by_video = divergence.mean(1)
        chosen = torch.zeros_like(by_video, dtype=torch.bool)
        for _ in range(picks):
            free = ~(chosen[:, first] | chosen[:, second])
            pair = alike.masked_fill(~free, -math.inf).max(1).indices
            one, other = first[pair], second[pair]
            flatter = torch.where(_at(by_video, one) <= _at(by_video, other), one, other)
            chosen = chosen.scatter(1, flatter.unsqueeze(1), True)
    return (divergence * chosen.unsqueeze(1)).sum() / (picks * attention.shape[0] * attention.shape[1])


class DenseAlignmentOutput(NamedTuple):
    """Losses of `DenseAlignment`.

    Args:
        loss: 0-dim, the weighted sum.
        decoder_loss: 0-dim, of `decoder_consistency`.
        encoder_loss: 0-dim, of `encoder_consistency`.
        redundancy_loss: 0-dim, of `slot_redundancy`.

    Example:
        >>> DenseAlignmentOutput._fields[0]
        'loss'
    """

    loss: Tensor
    decoder_loss: Tensor
    encoder_loss: Tensor
    redundancy_loss: Tensor


class DenseAlignment(nn.Module):
    """The three losses with their projections, as a regulariser of a host that rebuilds features.

    Args:
        feature_dim: Size of the backbone's and the rebuilt features.
        encoder_dim: Size of the features that slot attention reads; None for ``feature_dim``.
        projection_dim: Size of the projections that are compared.
        group_frames: Frames that are compared with each other; must divide T.
        neighbours: As in `encoder_consistency`.
        redundant: As in `slot_redundancy`.
        weight: Of both consistency losses, at least 0.
        redundancy_weight: Of the redundancy loss, at least 0.
        redundancy_steps: The redundancy loss is on before this step.
        start_step: The consistency losses are on from this step.

    Raises:
        ConfigError: A size or weight is out of range.

    Example:
        >>> dense = DenseAlignment(feature_dim=16, encoder_dim=8, group_frames=2, neighbours=2, start_step=0)
        >>> maps = torch.randn(1, 2, 3, 9).softmax(2)
        >>> features = torch.randn(1, 2, 9, 16)
        >>> out = dense(features, features + 0.1, torch.randn(1, 2, 9, 8), maps, maps, torch.randn(1, 2, 3, 4), step=0)
        >>> bool(out.loss > 0)
        True

    Source: SRL; its published run groups 4 frames, weights 0.1, starts after step 20 000 and ends the redundancy loss
    after step 10 000. Its code counts batches of an epoch where this counts steps of the training, and its redundancy
    loss reads the mean over iterations of the softmax of slot attention's logits over patches, in place of the last
    attention over slots normalised over patches: call `slot_redundancy` with that mean for the same. The losses equal
    those of its code to rounding.
    """

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
        sizes = (feature_dim, feature_dim if encoder_dim is None else encoder_dim, projection_dim)
        if min(*sizes, group_frames, neighbours, redundant) < 1:
            raise ConfigError(f"Expected sizes and counts of at least 1, but got {(*sizes, group_frames, neighbours)}.")
        if min(weight, redundancy_weight) < 0:
            raise ConfigError(f"Expected weights of at least 0, but got {weight} and {redundancy_weight}.")
        self.decoder_projection = nn.Linear(sizes[0], projection_dim, bias=False)
        self.encoder_projection = nn.Linear(sizes[1], projection_dim, bias=False)
        self.group_frames = group_frames
        self.neighbours = neighbours
        self.redundant = redundant
        self.weight = weight
        self.redundancy_weight = redundancy_weight
        self.redundancy_steps = redundancy_steps
        self.start_step = start_step

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
        """Compute what is on at a step.

        Args:
            backbone_features: ``(B, T, N, feature_dim)``, frozen.
            rebuilt_features: ``(B, T, N, feature_dim)``, of the decoder.
            encoder_features: ``(B, T, N, encoder_dim)``, what slot attention reads.
            attention: ``(B, T, S, N)`` probabilities over slots.
            masks: ``(B, T, S, N)`` probabilities over slots.
            slots: ``(B, T, S, D)``.
            step: Optimizer steps taken so far.

        Returns:
            Losses; those that are off are 0.

        Raises:
            ShapeError: Shapes do not fit, or ``group_frames`` does not divide T.
        """
        off = rebuilt_features.new_zeros(())
        decoder = encoder = redundancy = off
        if step >= self.start_step and self.weight > 0:
            decoder = decoder_consistency(
                self.decoder_projection(rebuilt_features),
                self.decoder_projection(backbone_features),
                attention.detach().max(2).indices,
                group_frames=self.group_frames,
            )
            encoder = encoder_consistency(
                self.encoder_projection(encoder_features),
                backbone_features,
                masks.detach().max(2).indices,
                group_frames=self.group_frames,
                neighbours=self.neighbours,
            )
        if step < self.redundancy_steps and self.redundancy_weight > 0:
            share = attention + _EPSILON
            redundancy = slot_redundancy(share / share.sum(-1, keepdim=True), slots, self.redundant)
        loss = self.weight * (decoder + encoder) + self.redundancy_weight * redundancy
        return DenseAlignmentOutput(loss, decoder, encoder, redundancy)


def _groups(features: Tensor, group_frames: int, name: str) -> Tensor:
    """``(groups, patches of a group, C)``, each patch of length 1."""
    if features.ndim != 4:
        raise ShapeError(f"Expected argument `{name}` to be (B, T, N, C), but got {tuple(features.shape)}.")
    if group_frames < 1 or features.shape[1] % group_frames:
        raise ShapeError(
            f"Expected argument `group_frames` to divide the {features.shape[1]} frames of a clip, but got "
            f"{group_frames}."
        )
    unit = normalize(features, dim=-1)
    return unit.reshape(-1, group_frames * features.shape[2], features.shape[3])


def _check_same_patches(student: Tensor, other: Tensor) -> None:
    if student.shape[:3] != other.shape[:3]:
        raise ShapeError(
            "Expected both features to be of the same videos, frames and patches, but got "
            f"{tuple(student.shape)} and {tuple(other.shape)}."
        )


def _group_labels(labels: Tensor, features: Tensor, group_frames: int, name: str) -> Tensor:
    if labels.shape != features.shape[:3]:
        raise ShapeError(
            f"Expected argument `{name}` to be (B, T, N) = {tuple(features.shape[:3])}, but got {tuple(labels.shape)}."
        )
    return labels.reshape(-1, group_frames * labels.shape[2])


def _check_temperatures(temperature: float, base_temperature: float) -> None:
    if not (temperature > 0 and base_temperature > 0):
        raise ConfigError(f"Expected temperatures above 0, but got {temperature} and {base_temperature}.")


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index.unsqueeze(1)).squeeze(1)
