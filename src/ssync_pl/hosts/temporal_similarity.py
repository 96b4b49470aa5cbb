"""VideoSAUR's loss: predict where in a later frame the features of a patch are found again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.method.labels import compute_dtype

__all__ = ["temporal_similarity", "temporal_similarity_loss"]


@torch.no_grad()
def temporal_similarity(
    features: Tensor, *, shift: int = 1, temperature: float = 0.075, threshold: float | None = 0.0
) -> Tensor:
    """How each patch's features are spread over the patches of a later frame: the target of the loss.

    Cosine similarities below the threshold are left out, the others divided by the temperature and put through a
    softmax over the later frame's patches. A patch that resembles nothing there is spread evenly.

    Args:
        features: `(B, T, N, K)` frozen features, published ones are a ViT's keys.
        shift: frames between the two.
        temperature: divides the similarities.
        threshold: smallest similarity that counts; None counts all.

    Returns:
        `(B, T - shift, N, N)` without gradient: row = patch in the earlier frame, probabilities over the later one.

    Raises:
        ShapeError: `features` is not 4-D, or too short for the shift.
        ConfigError: `shift` or `temperature` is out of range.

    Example:
        >>> features = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [3.0, 0.0]]]])
        >>> temporal_similarity(features, temperature=1.0, threshold=0.5)
        tensor([[[[0., 1.],
                  [1., 0.]]]])

    Source: VideoSAUR (arXiv 2306.04829), section 3, the temporal feature similarities.
    """
    if shift < 1 or temperature <= 0:
        raise ConfigError(
            f"Expected arguments `shift` to be at least 1 and `temperature` to be above 0, but got {shift} and "
            f"{temperature}. Use 1 and 0.075."
        )
    if features.ndim != 4 or features.shape[1] <= shift:
        raise ShapeError(
            f"Expected argument `features` to be (B, T, N, K) with T > {shift}, but got {tuple(features.shape)}. Raise "
            "`clip_length`: the loss compares frames that are `shift` apart."
        )
    with torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(features.to(compute_dtype(features.dtype)), dim=-1)
        similarity = torch.einsum("btnk,btmk->btnm", unit[:, :-shift], unit[:, shift:])
    if threshold is not None:
        kept = similarity >= threshold
        # Where nothing is kept, equal logits spread the patch evenly; a softmax of -inf alone would be NaN.
        similarity = torch.where(kept.any(dim=-1, keepdim=True), similarity.masked_fill(~kept, -torch.inf), 0.0)
    return (similarity / temperature).softmax(dim=-1)


def temporal_similarity_loss(prediction: Tensor, target: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cross-entropy between predicted logits and the target's distribution over a later frame's patches.

    Args:
        prediction: `(B, T - shift, N, N)` logits, of the earlier frames. Gradient flows.
        target: the same shape, from `temporal_similarity`.
        valid: bool `(B, T - shift)`, pairs of frames that count; None counts all.

    Returns:
        0-dim mean over patches of frames that count; 0 when none does.

    Raises:
        ShapeError: The shapes differ.

    Example:
        >>> target = torch.eye(4).expand(1, 1, 4, 4)
        >>> round(temporal_similarity_loss(torch.zeros(1, 1, 4, 4), target).item(), 4)  # log 4
        1.3863

    Source: VideoSAUR (arXiv 2306.04829), section 3, the temporal feature similarity loss.
    """
    if prediction.shape != target.shape:
        raise ShapeError(
            f"Expected argument `prediction` to have the shape of the target, {tuple(target.shape)}, but got "
            f"{tuple(prediction.shape)}. Leave out the last `shift` frames of the prediction."
        )
    # Distributions and not classes: PyTorch takes both, the classes' axis being the second.
    logits = prediction.flatten(0, 2).to(compute_dtype(prediction.dtype))
    per_patch = F.cross_entropy(logits, target.flatten(0, 2).to(logits.dtype), reduction="none")
    per_frame = per_patch.view(prediction.shape[:3]).mean(dim=-1)
    if valid is None:
        return per_frame.mean()
    weights = valid.to(per_frame.dtype)
    return (per_frame * weights).sum() / weights.sum().clamp(min=1.0)
