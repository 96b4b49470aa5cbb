"""Baselines: layouts by hand, k-means against scikit-learn, scores, table and cache."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.metrics.functional import labels_to_masks
from ssync_pl.tools.baselines import cached_baselines, format_table, grid_partition, kmeans_rgb, score_baselines


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


def test_kmeans_finds_colours():
    video, labels = coloured_video(0)
    found = kmeans_rgb(video, 4)
    assert found.shape == (2, 10, 12)
    assert adjusted_rand_score(labels.flatten(), found.flatten()) == 1.0
    again = kmeans_rgb(((video + 0.2).clamp(0, 1.3) / 1.3 * 255).to(torch.uint8), 4)
    assert adjusted_rand_score(labels.flatten(), again.flatten()) > 0.9


def test_kmeans_reaches_the_inertia_of_sklearn():
    generator = torch.Generator().manual_seed(3)
    video = torch.rand(2, 16, 16, 3, generator=generator)
    labels = kmeans_rgb(video, 5, iterations=100).flatten()
    points = video.reshape(-1, 3)
    inertia = sum((points[labels == k] - points[labels == k].mean(0)).square().sum().item() for k in range(5))
    reference = KMeans(5, n_init=5, random_state=0).fit(points.numpy()).inertia_
    assert inertia < 1.1 * reference
    # A fixed point: every pixel is with the nearest mean.
    means = torch.stack([points[labels == k].mean(0) for k in range(5)])
    assert torch.equal(torch.cdist(points, means).argmin(1), labels)


def test_kmeans_of_a_batch_equals_each_video_apart():
    videos = torch.stack([coloured_video(seed, 5)[0] for seed in range(3)])
    batch = kmeans_rgb(videos.movedim(-1, 2), 6, seed=1)
    assert batch.shape == (3, 2, 10, 12)
    for video, labels in zip(videos, batch, strict=True):
        assert torch.equal(kmeans_rgb(video, 6, seed=1), labels)


def test_kmeans_position_weight_splits_by_place():
    video = torch.zeros(1, 4, 40, 3)
    found = kmeans_rgb(video, 2, position_weight=1.0)[0]
    assert found.unique().numel() == 2
    assert (found == found[:1]).all()
    assert (found[0, 1:] != found[0, :-1]).sum() == 1
    assert kmeans_rgb(video, 2).unique().numel() == 1


def test_kmeans_padded_frames_do_not_shape_the_clusters():
    video, _ = coloured_video(2)
    padding = torch.full_like(video, 50.0)
    found = kmeans_rgb(torch.cat([video, padding]), 4, frame_mask=torch.tensor([True, True, False, False]))
    assert torch.equal(found[:2], kmeans_rgb(video, 4))


@pytest.mark.parametrize(
    ("video", "settings", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 4), {}, ShapeError, r"\(T, H, W, 3\) or \(B, T, 3, H, W\), but got \(2, 3, 4, 4\)"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.long), {}, ShapeError, "uint8 or float, but got torch.int64"),
        (torch.zeros(1, 1, 1, 3), {}, ShapeError, "at least 2 points a video, but got 1"),
        (torch.zeros(2, 4, 4, 3), {"iterations": -1}, ConfigError, "iterations >= 0"),
        (torch.zeros(2, 4, 4, 3), {"frame_mask": torch.ones(2)}, ShapeError, "bool with a value for each of 1 x 2"),
    ],
)
def test_kmeans_refuses_bad_inputs(video, settings, error, message):
    with pytest.raises(error, match=message):
        kmeans_rgb(video, 2, **settings)


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


def test_scores_skip_padding_and_shrink_large_frames():
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
    shrunk = score_baselines([large], num_slots=3, has_background=True, max_size=12)
    assert shrunk["k-means RGB"]["video_ari"] == pytest.approx(1.0)


def test_scores_need_true_masks():
    with pytest.raises(ShapeError, match=r"got \['video'\]. Use the validation split"):
        score_baselines([{"video": torch.zeros(1, 1, 3, 4, 4)}], 2, True)


def test_table_shows_the_columns_that_are_there_and_told():
    table = format_table({"grid": {"video_fg_ari": 0.29, "image_mbo": 0.1084}, "SAVi": {"val/video_ari": float("nan")}})
    lines = table.splitlines()
    titles = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert titles == ["", "video FG-ARI", "video ARI"]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["grid", "0.290", "-"]
    assert lines[3].split("|")[3].strip() == "nan"
    assert len({len(line) for line in lines}) == 1
    assert "0.29 |" in format_table({"grid": {"video_fg_ari": 0.29}}, digits=2)


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


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'{"baselines": 3}', b'{"baselines": {"x": [1]}}', b""])
def test_cache_survives_a_damaged_file(tmp_path: Path, content: bytes):
    path, compute = tmp_path / "baselines.json", Counter()
    path.write_bytes(content)
    for _ in range(2):
        assert cached_baselines(path, {"slots": 8}, compute)["grid"]["video_mbo"] == 1.0
    assert compute.calls == 1


def test_cache_replaces_damaged_scores(tmp_path: Path):
    path, compute = tmp_path / "baselines.json", Counter()
    cached_baselines(path, {"slots": 8}, compute)
    content = json.loads(path.read_text())
    content["baselines"] = {key: {"grid": {"video_mbo": "high"}} for key in content["baselines"]}
    path.write_text(json.dumps(content))
    assert cached_baselines(path, {"slots": 8}, compute)["grid"]["video_mbo"] == 2.0


def test_cache_without_a_writable_folder_computes_each_time(tmp_path: Path, monkeypatch, caplog):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only file system")

    # Permissions do not bind the superuser, so the refusal is played.
    monkeypatch.setattr("ssync_pl.tools.baselines.tempfile.mkstemp", refuse)
    compute = Counter()
    with caplog.at_level(logging.INFO, logger="ssync_pl.tools.baselines"):
        for expected in (1.0, 2.0):
            assert cached_baselines(tmp_path / "b.json", {"slots": 8}, compute)["grid"]["video_mbo"] == expected
    assert "read-only file system" in caplog.text
    assert cached_baselines(tmp_path / "absent" / "b.json", {}, compute)["grid"]["video_mbo"] == 3.0
    assert os.listdir(tmp_path) == []


def test_cache_leaves_no_temporary_file_when_replacing_fails(tmp_path: Path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("ssync_pl.tools.baselines.os.replace", refuse)
    cached_baselines(tmp_path / "b.json", {}, Counter())
    assert os.listdir(tmp_path) == []


def test_cache_refuses_keys_that_json_cannot_hold(tmp_path: Path):
    with pytest.raises(ConfigError, match="JSON values only"):
        cached_baselines(tmp_path / "b.json", {"when": object()}, Counter())
