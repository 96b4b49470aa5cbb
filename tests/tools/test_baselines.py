"""Baselines: layouts by hand, k-means against scikit-learn, scores and cache."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.metrics.functional import labels_to_masks
from ssync_pl.tools import baselines
from ssync_pl.tools.baselines import cached_baselines, grid_partition, score_baselines
from ssync_pl.tools.kmeans import kmeans


@pytest.mark.parametrize(
    ("cells", "size", "rows"),
    [
        (1, (5, 7), [1]),
        (8, (64, 64), [4, 4]),
        (4, (64, 64), [2, 2]),
        (6, (40, 60), [3, 3]),
        (6, (60, 40), [2, 2, 2]),
        (11, (64, 64), [4, 4, 3]),
        (7, (64, 64), [3, 2, 2]),
        (24, (336, 336), [6, 6, 6, 6]),
    ],
)
def test_grid_has_the_layout_closest_to_squares(cells, size, rows):
    labels = grid_partition(cells, size)
    assert labels.shape == size
    assert labels.dtype == torch.long
    assert labels.unique().tolist() == list(range(cells))
    first = 0
    found = []
    for count in rows:
        band = (labels >= first) & (labels < first + count)
        assert band.any(dim=1).equal(band.all(dim=1))
        found.append(labels[band].unique().numel())
        first += count
    assert found == rows
    for cell in range(cells):
        places = (labels == cell).nonzero()
        extent = places.amax(dim=0) - places.amin(dim=0) + 1
        assert int(extent.prod()) == len(places)
        assert abs(len(places) / (size[0] * size[1] / cells) - 1) < 0.15


def test_grid_refuses_what_does_not_fit():
    with pytest.raises(ShapeError, match="room for 9 cells"):
        grid_partition(9, (2, 2))
    with pytest.raises(ShapeError, match="num_cells=0"):
        grid_partition(0, (2, 2))


def coloured_video(seed: int, colours: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Video (2, 10, 12, 3) of well separated colours with noise, and its labels."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])[:colours]
    labels = torch.randint(0, colours, (2, 10, 12), generator=generator)
    return corners[labels] + 0.03 * torch.randn(2, 10, 12, 3, generator=generator), labels


def as_points(video: torch.Tensor) -> torch.Tensor:
    """Points (1, T, H * W, 3) of a video (T, H, W, 3)."""
    return video.flatten(1, 2)[None]


def test_kmeans_finds_colours():
    video, labels = coloured_video(0)
    found = kmeans(as_points(video), 4)
    assert found.shape == (1, 2, 120)
    assert adjusted_rand_score(labels.flatten(), found.flatten()) == 1.0


def test_kmeans_reaches_the_inertia_of_sklearn():
    points = torch.rand(1, 2, 256, 3, generator=torch.Generator().manual_seed(3))
    labels, flat = kmeans(points, 5, iterations=100).flatten(), points.reshape(-1, 3)
    inertia = sum((flat[labels == k] - flat[labels == k].mean(0)).square().sum().item() for k in range(5))
    assert inertia < 1.1 * KMeans(5, n_init=5, random_state=0).fit(flat.numpy()).inertia_
    # A fixed point: every pixel is with the nearest mean.
    means = torch.stack([flat[labels == k].mean(0) for k in range(5)])
    assert torch.equal(torch.cdist(flat, means).argmin(1), labels)


def test_kmeans_of_a_batch_equals_each_video_apart(monkeypatch):
    videos = torch.cat([as_points(coloured_video(seed, 5)[0]) for seed in range(3)])
    apart = torch.cat([kmeans(video[None], 6, seed=1) for video in videos])
    assert torch.equal(kmeans(videos, 6, seed=1), apart)
    monkeypatch.setattr("ssync_pl.tools.kmeans._GROUP_ELEMENTS", 1)
    assert torch.equal(kmeans(videos, 6, seed=1), apart)


def test_kmeans_padded_frames_do_not_shape_the_clusters():
    points = as_points(coloured_video(2)[0])
    padded = torch.cat([points, torch.full_like(points, 50.0)], dim=1)
    found = kmeans(padded, 4, frame_mask=torch.tensor([[True, True, False, False]]))
    assert torch.equal(found[:, :2], kmeans(points, 4))


@pytest.mark.parametrize(
    ("points", "settings", "error", "message"),
    [
        (torch.zeros(1, 1, 1, 3), {}, ShapeError, "at least 2 points"),
        (torch.zeros(1, 2, 16, 3), {"iterations": -1}, ConfigError, "iterations"),
        (torch.zeros(1, 2, 16, 3), {"frame_mask": torch.ones(1, 2)}, ShapeError, "frame_mask"),
        (torch.zeros(1, 2, 16, 3), {"frame_mask": torch.ones(1, 3, dtype=torch.bool)}, ShapeError, "frame_mask"),
    ],
)
def test_kmeans_refuses_bad_inputs(points, settings, error, message):
    with pytest.raises(error, match=message):
        kmeans(points, 2, **settings)


def baseline_batch(seed: int) -> dict[str, torch.Tensor]:
    video, labels = coloured_video(seed, 3)
    return {"video": video[None].movedim(-1, 2), "segmentations": labels_to_masks(labels[None], 3)}


def test_scores_of_separable_colours():
    scores = score_baselines([baseline_batch(0), baseline_batch(1)], num_slots=3, has_background=True)
    assert list(scores) == ["grid", "k-means RGB"]
    for name in ("video_fg_ari", "video_ari", "video_mbo", "video_miou", "image_fg_ari", "image_mbo"):
        assert scores["k-means RGB"][name] == pytest.approx(1.0)
        assert scores["grid"][name] < 0.5
    json.dumps(scores)


def test_scores_skip_padding_and_shrink_large_frames(monkeypatch):
    batch = baseline_batch(0)
    expected = score_baselines([batch], num_slots=3, has_background=True)
    junk = {"video": torch.rand(1, 2, 3, 10, 12), "segmentations": batch["segmentations"].roll(1, 2)}
    doubled = {name: torch.cat([batch[name], junk[name]]) for name in batch}
    padded = {name: torch.cat([value, junk[name].expand_as(value)], dim=1) for name, value in doubled.items()}
    padded["batch_padding_mask"] = torch.tensor([True, False])
    padded["frame_mask"] = torch.tensor([[True, True, False, False]] * 2)
    found = score_baselines([padded], num_slots=3, has_background=True)
    for row in expected:
        assert found[row] == pytest.approx(expected[row])
    large = {name: value.repeat_interleave(4, -1).repeat_interleave(4, -2) for name, value in batch.items()}
    monkeypatch.setattr(baselines, "_KMEANS_SIZE", 12)
    shrunk = score_baselines([large], num_slots=3, has_background=True)
    assert shrunk["k-means RGB"]["video_ari"] == pytest.approx(1.0)


def test_scores_need_true_masks():
    with pytest.raises(ShapeError, match=r"got \['video'\]. Use the validation split"):
        score_baselines([{"video": torch.zeros(1, 1, 3, 4, 4)}], 2, True)


class Counter:
    """Counts how often the scores are computed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, dict[str, float]]:
        self.calls += 1
        return {"grid": {"video_mbo": float(self.calls), "video_ari": float("nan")}}


def test_cache_computes_once_a_key(tmp_path: Path):
    path, compute = tmp_path / "baselines.json", Counter()
    first = cached_baselines(path, {"slots": 8, "size": (64, 64)}, compute)
    again = cached_baselines(path, {"size": [64, 64], "slots": 8}, compute)
    assert again["grid"]["video_mbo"] == first["grid"]["video_mbo"] == 1.0
    assert np.isnan(again["grid"]["video_ari"])
    assert cached_baselines(path, {"slots": 4}, compute)["grid"]["video_mbo"] == 2.0
    assert cached_baselines(path, {"slots": 8, "size": [64, 64]}, compute)["grid"]["video_mbo"] == 1.0
    assert os.listdir(tmp_path) == ["baselines.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[]", b'{"baselines": {}}', b'{"written_by": "someone", "grid": 3}']
)
def test_a_file_that_is_not_ours_is_left_alone_and_named(tmp_path: Path, content: bytes):
    path, compute = tmp_path / "baselines.json", Counter()
    path.write_bytes(content)
    for expected in (1.0, 2.0):
        with pytest.warns(UserWarning, match=r"baselines\.json.*Move it away"):
            assert cached_baselines(path, {"slots": 8}, compute)["grid"]["video_mbo"] == expected
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["baselines.json"]


def test_cache_without_a_writable_folder_computes_each_time(tmp_path: Path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    # Permissions do not bind the superuser, so the refusal is played.
    monkeypatch.setattr("ssync_pl.tools.owned.write_bytes", refuse)
    compute = Counter()
    for expected in (1.0, 2.0):
        with pytest.warns(UserWarning, match="read-only file system"):
            assert cached_baselines(tmp_path / "b.json", {"slots": 8}, compute)["grid"]["video_mbo"] == expected
    assert os.listdir(tmp_path) == []
