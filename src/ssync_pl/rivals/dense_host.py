"""What dense alignment needs of a host: a family that it knows, its encoder, and the losses of a forward pass."""

from __future__ import annotations

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from ssync_pl.errors import HostError, ShapeError
from ssync_pl.hosts.nn.feature_encoder import FeatureEncoder
from ssync_pl.hosts.videosaur import FeatureHost, FeatureHostOutput
from ssync_pl.method.labels import compute_dtype
from ssync_pl.rivals.dense_alignment import DenseAlignment, DenseAlignmentOutput

__all__ = ["checked_host", "dense_losses", "encoder_of", "frames_of_group"]

_PUBLISHED_FRAMES = 4


def frames_of_group(frames: int, wanted: int | None) -> int:
    """Frames that are compared with each other.

    Args:
        frames: Frames of a clip, at least 1.
        wanted: None takes 4, as published, or the largest number below that divides ``frames``.

    Returns:
        A divisor of ``frames``.

    Raises:
        ShapeError: ``wanted`` does not divide ``frames``.

    Example:
        >>> [frames_of_group(frames, None) for frames in (1, 2, 3, 4, 6, 7, 8)]
        [1, 2, 3, 4, 3, 1, 4]
    """
    if wanted is None:
        return max(size for size in range(1, _PUBLISHED_FRAMES + 1) if frames % size == 0)
    if frames % wanted:
        raise ShapeError(
            f"Expected argument `group_frames` to divide the {frames} frames of a clip, but got {wanted}. Leave it out "
            "to take what fits."
        )
    return wanted


def dense_losses(
    losses: DenseAlignment, output: FeatureHostOutput, features: Tensor, step: int
) -> DenseAlignmentOutput:
    """Dense alignment of one forward pass of a host, in single precision at least.

    Args:
        losses: The module.
        output: Of the host, for clips ``(B, T, ...)``.
        features: ``(B, T, N, C)`` or, of images, ``(B * T, N, C)``: what slot attention reads.
        step: Optimizer steps taken so far.

    Returns:
        Losses, attached to the graph.

    Example:
        >>> from ssync_pl.hosts import SlotContrast
        >>> sizes = {"backbone": None, "feature_dim": 12, "grid": (2, 3), "decoder_hidden": (8,)}
        >>> host = SlotContrast(num_slots=3, slot_dim=8, **sizes)
        >>> losses = DenseAlignment(12, 8, neighbours=2, group_frames=2, start_step=0)
        >>> clips = torch.randn(1, 2, 6, 12)
        >>> bool(dense_losses(losses, host(clips), host.encoder(clips)["features"], step=0).loss > 0)
        True
    """
    clips = output.targets.shape[:2]
    features = features if features.ndim == 4 else features.unflatten(0, clips)
    rebuilt = output.reconstruction[..., : output.targets.shape[-1]]
    with torch.autocast(output.targets.device.type, enabled=False):
        logits = (output.attention_logits, output.mask_logits.flatten(3))
        attention, masks = (value.to(compute_dtype(value.dtype)).softmax(2) for value in logits)
        wide = [value.to(compute_dtype(value.dtype)) for value in (output.targets, rebuilt, features)]
        return losses(*wide, attention, masks, output.slots.to(compute_dtype(output.slots.dtype)), step)


def checked_host(trainer: L.Trainer, host: L.LightningModule) -> FeatureHost:
    """Refuse hosts that dense alignment cannot serve.

    Args:
        trainer: The trainer.
        host: The host.

    Returns:
        The host.

    Raises:
        HostError: It is of another family, uses manual optimization, rebuilds no features, or is trained by a strategy
            that splits parameters.

    Example:
        >>> from ssync_pl.hosts import SAVi
        >>> checked_host(None, SAVi(num_slots=2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ssync_pl.errors.HostError: Expected a host of ssync_pl.hosts that rebuilds features (VideoSAUR, ...
    """
    if not isinstance(host, FeatureHost):
        raise HostError(
            "Expected a host of ssync_pl.hosts that rebuilds features (VideoSAUR, SlotContrast, DINOSAUR), but got "
            f"{type(host).__name__}. Use ssync_pl.rivals.dense_alignment inside your own training step."
        )
    if not host.automatic_optimization:
        raise HostError(
            f"Expected {type(host).__name__} to use automatic optimization, but it sets automatic_optimization=False: "
            "it calls backward itself, so a loss added by a callback would have no effect."
        )
    if getattr(host, "reconstruction_weight", 1.0) == 0:
        raise HostError(
            f"Expected {type(host).__name__} to rebuild features, but it has reconstruction_weight=0, so that its "
            "decoder gives none. Set it above 0."
        )
    if trainer.strategy.restore_checkpoint_after_setup:
        raise HostError(
            f"Expected a training on one device or with DDP, but got {type(trainer.strategy).__name__}, which splits "
            "parameters. Use strategy='ddp'."
        )
    return host


def encoder_of(host: FeatureHost) -> FeatureEncoder:
    """The host's encoder, which may be wrapped, over time or by `torch.compile`.

    Args:
        host: The host.

    Returns:
        The encoder.

    Raises:
        HostError: There is none.

    Example:
        >>> from ssync_pl.hosts import VideoSAUR
        >>> host = VideoSAUR(4, slot_dim=16, backbone=None, feature_dim=24, grid=(3, 5), decoder_hidden=(32,))
        >>> encoder_of(host).feature_dim
        24
    """
    encoders: list[nn.Module] = [module for module in host.encoder.modules() if isinstance(module, FeatureEncoder)]
    if not encoders:
        raise HostError(
            f"Expected a FeatureEncoder in {type(host).__name__}.encoder, but there is none. Use the module "
            "ssync_pl.rivals.dense_alignment inside your own training step."
        )
    return encoders[0]  # type: ignore[return-value]
