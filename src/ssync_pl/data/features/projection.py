"""Standardised features on their principal components: fewer channels of comparable size.

Channels of a backbone differ in scale by orders of magnitude, and stages in their number. Slots, and the mean squared
error that hosts train with, then see little but the largest channels.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssync_pl.data.decode import MAX_MEMBER_BYTES, require_size
from ssync_pl.errors import explained, require

PROJECTION_FILE = "projection.npz"  # beside the features
_HEAD = {"format": "ssync_pl.projection", "version": 1}
# Below these shares of the largest value a channel or component is rounding error.
_CONSTANT, _RANK = 1e-12, 1e-9


@dataclass(frozen=True)
class Projection:
    """An affine map of features, `(feature - mean) @ matrix`."""

    mean: Tensor  # (D,) float32
    matrix: Tensor  # (D, K) float32
    info: Mapping[str, Any]  # what it was fitted to, as JSON values

    def __call__(self, features: Tensor) -> Tensor:
        """Project features (..., D) to (..., K), on their device."""
        return (features.float() - self.mean.to(features.device)) @ self.matrix.to(features.device)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of mean and matrix."""
        digest = hashlib.sha256(f"{tuple(self.matrix.shape)}".encode())
        for part in (self.mean, self.matrix):
            digest.update(part.cpu().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def pack(self) -> bytes:
        """Write the content of the projection's file."""
        info = np.frombuffer(json.dumps({**_HEAD, "info": dict(self.info)}, sort_keys=True).encode(), np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, mean=self.mean.cpu().numpy(), matrix=self.matrix.cpu().numpy(), info=info)
        return buffer.getvalue()


def fit_projection(batches: Iterable[Tensor], layer_dims: Sequence[int], components: int) -> Projection:
    """Fit a projection to the features (M, N, D) of some frames, whose layers have `layer_dims` channels along D.

    Channels are standardised, so that each layer weighs the same; components come largest first, and one factor brings
    the mean square over everything to 1. Channels that do not vary are dropped.
    """
    dim, count, frames = sum(layer_dims), 0, 0
    mean, scatter = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    for features in batches:
        values = features.detach().cpu().double().flatten(0, -2)
        centred, gap = values - values.mean(0), values.mean(0) - mean
        # Scatters of two sets add up, plus that of their means: no difference of large sums is taken.
        scatter += centred.mT @ centred + torch.outer(gap, gap) * (count * len(values) / (count + len(values)))
        count, frames = count + len(values), frames + len(features)
        mean += gap * (len(values) / count)
    variance = scatter.diagonal() / max(count, 1)
    varies = variance > _CONSTANT * (variance.max() + mean.square())
    layers = torch.cat([torch.full((size,), size**-0.5, dtype=torch.float64) for size in layer_dims])
    scale = torch.where(varies, layers / variance.clamp_min(1e-300).sqrt(), 0.0)
    standard = scatter / max(count, 1) * torch.outer(scale, scale)
    values, vectors = torch.linalg.eigh(standard)
    rank = int((values > _RANK * values[-1]).sum()) if bool(varies.any()) else 0
    expected = f"argument `components` to be from 1 to {rank}, the directions in which the sampled features vary"
    require(1 <= components <= rank, expected, components, advice="Lower it, or fit to more videos.")
    kept, vectors = values.flip(0)[:components], vectors.flip(1)[:, :components]
    # A component's sign is arbitrary: its largest entry becomes positive.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    matrix = scale[:, None] * vectors * largest.sign() / kept.mean().sqrt()
    explained = float(kept.sum() / standard.diagonal().sum())
    info = {"components": components, "explained": explained, "frames": frames}
    return Projection(mean.float(), matrix.float(), info)


def read_projection(path: str | os.PathLike[str]) -> Projection:
    """Read a projection's file; `ShardError` when it is none."""
    made = f"a {PROJECTION_FILE} of `ssync-pl data cache-features --components`"
    advice = "Give that file, or make the features again."
    with explained(f"{path} to be {made}", Exception, advice=advice):  # NumPy raises almost anything on damaged files
        with np.load(path, allow_pickle=False) as content:
            require_size(sum(one.file_size for one in content.zip.infolist()), f"{path}", MAX_MEMBER_BYTES)
            head, mean, matrix = json.loads(content["info"].tobytes()), content["mean"], content["matrix"]
        if {**head, **_HEAD} != head or matrix.ndim != 2 or mean.shape != matrix.shape[:1]:
            raise ValueError(f"format {head['format']!r}, version {head['version']!r}, shape {matrix.shape}")
        return Projection(torch.from_numpy(mean), torch.from_numpy(matrix), dict(head["info"]))


def describe_projection(projection: Projection) -> str:
    """Say in a line how large a projection is and what it was fitted to."""
    (channels, kept), info = projection.matrix.shape, projection.info
    names = ", ".join(source["name"] for source in info.get("sources", ())[:2])
    fitted = f"fitted to {info.get('frames')} frames of {names}"
    return f"{kept} components of {channels} channels, {info.get('explained', 0):.1%} of the variance, {fitted}"
