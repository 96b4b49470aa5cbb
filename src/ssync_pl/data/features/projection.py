"""Standardised features on their principal components: fewer channels of comparable size.

Channels of a backbone differ in scale by orders of magnitude, and stages in their number. Slots, and the mean squared
error that hosts train with, then see little but the largest channels. A projection is fitted to a sample of frames once
and kept beside the features, so that every later shard gets the same one.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssync_pl.errors import ConfigError, ShardError

__all__ = ["PROJECTION_FILE", "Moments", "Projection", "describe_projection", "fit_projection", "read_projection"]

PROJECTION_FILE = "projection.npz"
"""Name of the projection in a folder of features."""

_FORMAT = "ssync_pl.projection"
_VERSION = 1
# Below these shares of the largest value a channel or component is rounding error.
_CONSTANT = 1e-12
_RANK = 1e-9


@dataclass(frozen=True)
class Projection:
    """An affine map of features: `(feature - mean) @ matrix`.

    Args:
        mean: (D,) float32, mean of each channel.
        matrix: (D, K) float32.
        info: What it was fitted to, as JSON values; not part of the map.
    """

    mean: Tensor
    matrix: Tensor
    info: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, features: Tensor) -> Tensor:
        """Project features."""
        return (features.float() - self.mean) @ self.matrix

    @property
    def components(self) -> int:
        """K with a PCA; 0 where channels are standardised only."""
        return int(self.info.get("components", 0))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of mean and matrix."""
        digest = hashlib.sha256(f"{tuple(self.matrix.shape)}".encode())
        for part in (self.mean, self.matrix):
            digest.update(part.cpu().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Projection:
        """Move it."""
        return Projection(self.mean.to(device), self.matrix.to(device), self.info)


class Moments:
    """Mean and covariance of features that come in batches, in float64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Take features in."""
        values = features.detach().cpu().double().flatten(0, -2)
        count, mean = len(values), values.mean(0)
        centred = values - mean
        # Scatters of two sets add up, plus that of their means: no difference of large sums is taken.
        gap, total = mean - self.mean, self.count + count
        self._scatter += centred.mT @ centred + torch.outer(gap, gap) * (self.count * count / total)
        self.mean += gap * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """Covariance over all features so far."""
        return self._scatter / max(self.count, 1)


def fit_projection(moments: Moments, layer_dims: Sequence[int], components: int) -> Projection:
    """Fit a projection to the mean and covariance of features.

    Each channel is centred and divided by its standard deviation, and each layer by the square root of its number of
    channels, so that all layers weigh the same. These are turned to their principal components, largest first. In the
    end one factor brings the mean square over everything to 1. Channels that do not vary are dropped from the map. The
    covariance is gathered batch by batch, since the frames of a fit take gigabytes.

    Args:
        moments: Mean and covariance.
        layer_dims: Channels of each layer, in their order along D.
        components: K, how many principal components are kept.

    Returns:
        The projection; `info` says `components` and `explained`, the share of the variance that is kept.

    Raises:
        ConfigError: There are fewer components, or the features do not vary.
    """
    covariance = moments.covariance()
    dim = len(covariance)
    if not 1 <= components <= dim:
        raise ConfigError(f"Expected argument `components` to be from 1 to the {dim} channels, but got {components}.")
    variance = covariance.diagonal()
    varies = variance > _CONSTANT * (variance.max() + moments.mean.square())
    if not bool(varies.any()):
        raise ConfigError(
            "Expected features that vary, to fit a projection to, but they are the same everywhere. Check the videos "
            "and the weights of the backbone."
        )
    weights = torch.cat([torch.full((int(size),), 1.0 / math.sqrt(size), dtype=torch.float64) for size in layer_dims])
    scale = torch.where(varies, weights / variance.clamp_min(1e-300).sqrt(), 0.0)
    standard = covariance * torch.outer(scale, scale)
    values, vectors = torch.linalg.eigh(standard)
    rank = int((values > _RANK * values[-1]).sum())
    if components > rank:
        raise ConfigError(
            f"Expected argument `components` to be at most {rank}, as the sampled features vary in no more "
            f"directions, but got {components}. Lower it, or fit to more videos."
        )
    kept, vectors = values.flip(0)[:components], vectors.flip(1)[:, :components]
    # A component's sign is arbitrary: its largest entry becomes positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    matrix = scale[:, None] * vectors * largest.sign()
    matrix = matrix / kept.mean().sqrt()
    info = {"components": components, "explained": float(kept.sum() / standard.diagonal().sum())}
    return Projection(moments.mean.float(), matrix.float(), info)


def pack_projection(projection: Projection) -> bytes:
    """Write the content of a projection's file."""
    content = {"format": _FORMAT, "version": _VERSION, "info": dict(projection.info)}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mean=projection.mean.cpu().numpy().astype("<f4"),
        matrix=projection.matrix.cpu().numpy().astype("<f4"),
        info=np.frombuffer(json.dumps(content, sort_keys=True).encode(), np.uint8),
    )
    return buffer.getvalue()


def read_projection(path: str | os.PathLike[str]) -> Projection:
    """Read a projection's file."""
    try:
        with np.load(Path(path), allow_pickle=False) as content:
            head = json.loads(content["info"].tobytes())
            if head["format"] != _FORMAT or head["version"] != _VERSION:
                raise ValueError(f"format {head['format']!r}, version {head['version']!r}")
            mean, matrix, info = content["mean"], content["matrix"], head["info"]
        if not isinstance(info, dict) or mean.dtype != np.float32 or matrix.dtype != np.float32:
            raise ValueError(f"types {mean.dtype} and {matrix.dtype}")
        if mean.ndim != 1 or matrix.ndim != 2 or len(mean) != len(matrix) or not np.isfinite(matrix).all():
            raise ValueError(f"shapes {mean.shape} and {matrix.shape}")
    except FileNotFoundError as error:
        raise ConfigError(
            f"Expected a projection at {path}, but there is no such file. Give the {PROJECTION_FILE} of a folder that "
            "`ssync-pl data cache-features --components` wrote."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ShardError(
            f"Expected {path} to be a projection of features ({_FORMAT}, version {_VERSION}), but it is not ({error}). "
            "Delete its folder and make the features again."
        ) from error
    return Projection(torch.from_numpy(mean), torch.from_numpy(matrix), info)


def describe_projection(projection: Projection) -> str:
    """Say in a line how large a projection is and what it was fitted to."""
    (channels, kept), info = projection.matrix.shape, projection.info
    text = f"{kept} components of {channels} channels" if projection.components else f"{kept} standardised channels"
    if projection.components and "explained" in info:
        text += f", {info['explained']:.1%} of the variance"
    if info.get("sources"):
        text += f", fitted to {info.get('frames')} frames of {info['sources'][0]['name']}"
        text += f" … ({len(info['sources'])} shards)" if len(info["sources"]) > 1 else ""
    return text
