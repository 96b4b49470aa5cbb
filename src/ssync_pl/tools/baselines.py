"""What a model must beat: partitions without any learning, scored like a model's.

A fixed grid of rectangles already reaches a fair FG-ARI, since an object mostly lies in one cell. A score means
something only beside these rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.metrics import SegmentationMetrics
from ssync_pl.metrics.table import METRICS, metric_names

__all__ = ["BASELINES_VERSION", "cached_baselines", "format_table", "grid_partition", "kmeans_rgb", "score_baselines"]

BASELINES_VERSION = 1
"""Raised whenever the same videos would get other scores, so that kept ones are computed anew."""

_log = logging.getLogger(__name__)

# Distances of points to centres are held for a group of videos: 2**25 floats are 128 MiB.
_GROUP_ELEMENTS = 2**25


def grid_partition(num_cells: int, size: tuple[int, int]) -> Tensor:
    """Cut a frame into `num_cells` rectangles that are as close to squares as can be.

    Rows times columns where that gives cells at most twice as long as wide (8 cells: 2 rows of 4). Otherwise (11
    cells, a prime) the rows hold unequal numbers of cells, and rows with more cells are higher, so that all cells have
    about the same area (11 cells: rows of 4, 4 and 3).

    Args:
        num_cells: number of cells, usually the number of slots.
        size: `(H, W)` in pixels.

    Returns:
        Long labels `(H, W)` in `[0, num_cells)`, row by row.

    Raises:
        ShapeError: if `num_cells` is below 1 or does not fit into the frame.

    Example:
        >>> grid_partition(2, (2, 4)).tolist()
        [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    height, width = size
    if num_cells < 1 or height < 1 or width < 1:
        raise ShapeError(f"Expected at least one cell and pixel, but got num_cells={num_cells} and size={size}.")
    exact = [[num_cells // rows] * rows for rows in range(1, num_cells + 1) if num_cells % rows == 0]
    ragged = [[num_cells // rows + (row < num_cells % rows) for row in range(rows)] for rows in range(1, num_cells + 1)]
    layout = min(exact, key=lambda rows: _elongation(rows, size))
    if _elongation(layout, size) > math.log(2) + 1e-9:
        layout = min(ragged, key=lambda rows: _elongation(rows, size))
    labels = torch.empty(height, width, dtype=torch.long)
    first = 0
    for columns in layout:
        top, bottom = (round(height * cells / num_cells) for cells in (first, first + columns))
        places = torch.arange(width) * columns // width
        labels[top:bottom] = first + places
        first += columns
    if labels.unique().numel() != num_cells:
        raise ShapeError(f"Expected a frame with room for {num_cells} cells, but got size={size}. Use fewer cells.")
    return labels


def _elongation(rows: list[int], size: tuple[int, int]) -> float:
    """Mean over the cells of |log(height / width)|, 0 for squares."""
    cells = sum(rows)
    return sum(n * abs(math.log(size[0] * n / cells / (size[1] / n))) for n in rows) / cells


def kmeans_rgb(
    video: Tensor,
    num_clusters: int,
    iterations: int = 20,
    position_weight: float = 0.0,
    seed: int = 0,
    frame_mask: Tensor | None = None,
) -> Tensor:
    """Cluster the pixels of each video by colour: Lloyd's k-means over the whole clip, k-means++ start.

    The start of a video depends on the seed alone, not on the other videos of the batch. Source of the start:
    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.

    Args:
        video: `(T, H, W, 3)` or `(B, T, 3, H, W)`, uint8 (divided by 255) or float (taken as it is).
        num_clusters: number of clusters, usually the number of slots.
        iterations: Lloyd steps at most; ends early when no centre moves.
        position_weight: appends y and x, in units of the longer side, times this weight; 0 = colour only.
        seed: of the k-means++ start.
        frame_mask: bool `(T,)` or `(B, T)`, False for padded frames, which do not shape the clusters.

    Returns:
        Long labels `(T, H, W)` or `(B, T, H, W)` in `[0, num_clusters)`.

    Raises:
        ShapeError: if the shape or dtype does not fit, or there are fewer pixels than clusters.
        ConfigError: if a setting is out of range.

    Example:
        >>> import torch
        >>> video = torch.zeros(1, 2, 4, 3)
        >>> video[:, :, 2:] = 1.0
        >>> labels = kmeans_rgb(video, 2)
        >>> bool((labels[..., :2] == 1 - labels[..., 2:]).all())
        True
    """
    single = video.ndim == 4 and video.shape[-1] == 3
    if not single and not (video.ndim == 5 and video.shape[2] == 3):
        raise ShapeError(
            f"Expected argument `video` to have shape (T, H, W, 3) or (B, T, 3, H, W), but got {tuple(video.shape)}."
        )
    if not (video.is_floating_point() or video.dtype == torch.uint8):
        raise ShapeError(f"Expected argument `video` to be uint8 or float, but got {video.dtype}.")
    check_settings(num_clusters, iterations, position_weight)
    pixels = video.unsqueeze(0) if single else video.movedim(2, -1)
    batch, frames, height, width = pixels.shape[:4]
    pixels = pixels.float() / 255 if video.dtype == torch.uint8 else pixels.float()
    if position_weight > 0:
        pixels = torch.cat([pixels, position_weight * _positions(pixels)], dim=-1)
    result = cluster(pixels.flatten(2, 3), num_clusters, iterations, seed, frame_mask).view(
        batch, frames, height, width
    )
    return result[0] if single else result


def check_settings(num_clusters: int, iterations: int, position_weight: float) -> None:
    """Refuse settings of k-means that are out of range.

    Args:
        num_clusters: At least 1.
        iterations: At least 0.
        position_weight: At least 0.

    Raises:
        ConfigError: One is not.

    Example:
        >>> check_settings(2, 20, 0.0)
    """
    if num_clusters < 1 or iterations < 0 or position_weight < 0:
        raise ConfigError(
            "Expected num_clusters >= 1, iterations >= 0 and position_weight >= 0, "
            f"but got {num_clusters}, {iterations} and {position_weight}."
        )


def cluster(
    points: Tensor, num_clusters: int, iterations: int = 20, seed: int = 0, frame_mask: Tensor | None = None
) -> Tensor:
    """Lloyd's k-means of the points of each video, over the whole clip, with a k-means++ start.

    Args:
        points: `(B, T, P, D)`, float.
        num_clusters: Number of clusters.
        iterations: Lloyd steps at most; ends early when no centre moves.
        seed: Of the start.
        frame_mask: bool `(B, T)` or `(T,)`, False for padded frames, which do not shape the clusters.

    Returns:
        Long labels `(B, T, P)` in `[0, num_clusters)`.

    Raises:
        ShapeError: There are fewer points than clusters, or the mask does not fit.

    Example:
        >>> cluster(torch.tensor([[[[0.0], [1.0]], [[0.0], [1.0]]]]), 2).unique().tolist()
        [0, 1]
    """
    batch, frames, count = points.shape[:3]
    if frames * count < num_clusters:
        raise ShapeError(
            f"Expected at least {num_clusters} points a video, but got {frames * count}. Use fewer clusters."
        )
    mask = torch.ones(batch, frames, dtype=torch.bool) if frame_mask is None else frame_mask
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != (batch, frames) or mask.dtype != torch.bool:
        raise ShapeError(
            f"Expected argument `frame_mask` to be bool with a value for each of {batch} x {frames} frames, "
            f"but got {mask.dtype} of shape {tuple(mask.shape)}."
        )
    weights = mask.to(points.device)[:, :, None].expand(batch, frames, count).flatten(1).float()
    flat = points.flatten(1, 2)
    per_group = max(1, _GROUP_ELEMENTS // (flat.shape[1] * num_clusters))
    labels = [
        _lloyd(flat[start : start + per_group], weights[start : start + per_group], num_clusters, iterations, seed)
        for start in range(0, batch, per_group)
    ]
    return (torch.cat(labels) if labels else flat[..., 0].long()).view(batch, frames, count)


def _positions(pixels: Tensor) -> Tensor:
    height, width = pixels.shape[2:4]
    longer = max(height, width)
    rows = torch.arange(height, device=pixels.device, dtype=pixels.dtype) / longer
    columns = torch.arange(width, device=pixels.device, dtype=pixels.dtype) / longer
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    return grid.expand(*pixels.shape[:4], 2)


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """Squared distances `(B, P, K)`, up to the term that is the same for all centres."""
    return torch.baddbmm(centres.square().sum(-1)[:, None], points, centres.transpose(1, 2), alpha=-2.0)


def _lloyd(points: Tensor, weights: Tensor, clusters: int, iterations: int, seed: int) -> Tensor:
    """Labels `(B, P)` of points `(B, P, D)` with weights `(B, P)`."""
    centres = _start(points, weights, clusters, seed)
    weighted = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1) * weights[..., None]
    for _ in range(iterations):
        owners = F.one_hot(_distances(points, centres).argmin(dim=-1), clusters).to(points.dtype)
        sums = torch.bmm(owners.transpose(1, 2), weighted)
        # An empty cluster stays where it is.
        moved = torch.where(sums[..., -1:] > 0, sums[..., :-1] / sums[..., -1:].clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return _distances(points, centres).argmin(dim=-1)


def _start(points: Tensor, weights: Tensor, clusters: int, seed: int) -> Tensor:
    """k-means++: each further centre is drawn with a chance proportional to its squared distance."""
    draws = torch.rand(clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    mass = weights.double()
    nearest = torch.full_like(mass, math.inf)
    centres: list[Tensor] = []
    for draw in draws:
        cumulative = mass.cumsum(dim=-1)
        # Strictly right of the drawn mass, so that points without mass are never drawn.
        index = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True).clamp(max=mass.shape[1] - 1)
        centre = points.gather(1, index[..., None].expand(-1, -1, points.shape[-1]))
        centres.append(centre)
        nearest = torch.minimum(nearest, (points - centre).square().sum(dim=-1).double())
        mass = nearest * weights
    return torch.cat(centres, dim=1)


def score_baselines(
    batches: Iterable[Mapping[str, Any]],
    num_slots: int,
    has_background: bool,
    *,
    ignore_overlaps: bool = False,
    resolution: tuple[int, int] | None = None,
    iterations: int = 20,
    max_size: int | None = 128,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Score the grid and k-means on RGB with the same metrics and the same number of parts as a model.

    Args:
        batches: dicts with `video` `(B, T, 3, H, W)` (normalised or not), `segmentations` bool `(B, T, C, H, W)` and,
            where there is padding, `batch_padding_mask` `(B,)` and `frame_mask` `(B, T)`, True = real.
        num_slots: number of cells and clusters.
        has_background: channel 0 of `segmentations` is the background.
        ignore_overlaps: leave out pixels with several true masks instead of refusing them.
        resolution: `(h, w)` at which to evaluate; None takes the size of `segmentations`.
        iterations: Lloyd steps at most.
        max_size: larger frames are averaged down to this longer side for k-means, to bound time and memory; the
            labels go back to the true size by the nearest pixel. None = full size.
        seed: of the k-means start.

    Returns:
        `{"grid": scores, "k-means RGB": scores}`, names as in `SegmentationMetrics`, without prefix.

    Raises:
        ShapeError: if a batch has no true masks or its shapes do not fit.

    Example:
        >>> import torch
        >>> true = torch.zeros(1, 2, 3, 8, 8, dtype=torch.bool)
        >>> true[:, :, 1, :, :4] = True
        >>> true[:, :, 2, :, 4:] = True
        >>> batch = {"video": true[:, :, 1:2].float().expand(-1, -1, 3, -1, -1), "segmentations": true}
        >>> scores = score_baselines([batch], num_slots=2, has_background=True)
        >>> scores["grid"]["video_fg_ari"], scores["k-means RGB"]["video_mbo"]
        (1.0, 1.0)
    """
    settings: dict[str, Any] = {
        "has_background": has_background,
        "ignore_overlaps": ignore_overlaps,
        "resolution": resolution,
    }
    metrics = {name: SegmentationMetrics(**settings) for name in ("grid", "k-means RGB")}
    for batch in batches:
        if batch.get("segmentations") is None or batch.get("video") is None:
            raise ShapeError(
                f"Expected batches with `video` and `segmentations`, but got {sorted(batch)}. Use the validation split."
            )
        video, true = batch["video"], batch["segmentations"]
        valid = torch.ones(true.shape[:2], dtype=torch.bool, device=true.device)
        for name in ("batch_padding_mask", "frame_mask"):
            if batch.get(name) is not None:
                mask = batch[name].to(true.device)
                valid = valid & (mask[:, None] if mask.ndim == 1 else mask)
        grid = grid_partition(num_slots, (true.shape[-2], true.shape[-1])).to(true.device)
        clusters = kmeans_rgb(_shrink(video, max_size), num_slots, iterations, seed=seed, frame_mask=valid)
        metrics["grid"].to(true.device).update(grid.expand(*true.shape[:2], -1, -1), true, valid)
        metrics["k-means RGB"].to(true.device).update(clusters.to(true.device), true, valid)
    return {
        name: {score: float(value) for score, value in metric.compute().items()} for name, metric in metrics.items()
    }


def _shrink(video: Tensor, max_size: int | None) -> Tensor:
    longer = max(video.shape[-2:])
    if max_size is None or longer <= max_size or video.ndim != 5:
        return video
    size = [max(1, round(side * max_size / longer)) for side in video.shape[-2:]]
    pixels = video.float() / 255 if video.dtype == torch.uint8 else video.float()
    return F.interpolate(pixels.flatten(0, 1), size=size, mode="area").unflatten(0, video.shape[:2])


def format_table(
    rows: Mapping[str, Mapping[str, float]], columns: Mapping[str, str] | None = None, digits: int = 3
) -> str:
    """Scores as a Markdown table with aligned columns, for terminals and documents.

    Args:
        rows: name of a row to its scores; names of scores may have a prefix such as "val/".
        columns: name of a score to the title of its column; None shows what `metrics.table` shows in tables, as
            far as it is there.
        digits: decimal places.

    Returns:
        The table, without a newline at its end; scores that are absent are shown as "-".

    Example:
        >>> print(format_table({"grid": {"val/video_mbo": 0.1084}}, {"video_mbo": "video mBO"}))
        |      | video mBO |
        |------|-----------|
        | grid |     0.108 |
    """
    titles = _titles(rows) if columns is None else columns
    cells = [["", *titles.values()]]
    for name, scores in rows.items():
        plain = {score.rsplit("/", 1)[-1]: value for score, value in scores.items()}
        cells.append([name, *(f"{float(plain[key]):.{digits}f}" if key in plain else "-" for key in titles)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles) + 1)]
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _titles(rows: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    there = {name.rsplit("/", 1)[-1] for scores in rows.values() for name in scores}
    return {name: METRICS[name].title for name in metric_names(None, "headline", "table") if name in there}


def cached_baselines(
    path: str | Path, key: Mapping[str, Any], compute: Callable[[], dict[str, dict[str, float]]]
) -> dict[str, dict[str, float]]:
    """Keep scores in a JSON file beside the data, so that they are computed once a data set.

    One file holds the scores of several keys. It is replaced in one step, so a reader never sees half of it. A file
    that cannot be read or written, or is damaged, costs the computation and no more.

    Args:
        path: of the JSON file, for example `<data>/baselines.json`.
        key: all that the scores depend on (data set, split, number of slots, resolution, …), JSON values only.
        compute: called without arguments if the scores are not there.

    Returns:
        What `compute` returned, now or earlier.

    Raises:
        ConfigError: if `key` holds anything that JSON cannot.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "baselines.json"
        ...     first = cached_baselines(path, {"slots": 8}, lambda: {"grid": {"video_mbo": 0.1}})
        ...     second = cached_baselines(path, {"slots": 8}, dict)
        >>> first == second
        True
    """
    try:
        text = json.dumps(dict(key), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"Expected argument `key` to hold JSON values only, but got {dict(key)!r}: {error}."
        ) from error
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = Path(path)
    found = _read_entries(path).get(name)
    if found is not None:
        return found
    scores = compute()
    # Read again: another process may have added its scores meanwhile.
    entries = {**_read_entries(path), name: scores}
    try:
        _replace(path, json.dumps({"baselines": entries}, indent=1))
    except OSError as error:
        _log.info("Baselines are not kept, since %s cannot be written: %s", path, error)
    return scores


def _read_entries(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Scores by key, without the damaged ones; nothing where the file cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _log.warning("Baselines in %s cannot be read and are computed again: %s", path, error)
        return {}
    entries = content.get("baselines") if isinstance(content, dict) else None
    if not isinstance(entries, dict):
        return {}
    return {name: scores for name, scores in entries.items() if _is_scores(scores)}


def _is_scores(scores: Any) -> bool:
    return isinstance(scores, dict) and all(
        isinstance(row, dict) and all(isinstance(value, (int, float)) for value in row.values())
        for row in scores.values()
    )


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes private files; data folders are often shared.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
