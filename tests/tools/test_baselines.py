"""Baselines: layouts by hand, k-means that finds what is there, and scores."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from ssync_pl.errors import ShapeError
from ssync_pl.metrics.functional import labels_to_masks
from ssync_pl.tools import summary
from ssync_pl.tools.summary import grid_partition, kmeans, kmeans_features, score_baselines


@pytest.mark.parametrize(
    ("cells", "size", "rows"),
    [
        (1, (5, 7), [1]),
        (8, (64, 64), [4, 4]),
        (6, (40, 60), [3, 3]),
        (6, (60, 40), [2, 2, 2]),
        (11, (64, 64), [4, 4, 3]),
        (7, (64, 64), [3, 2, 2]),
        (24, (336, 336), [6, 6, 6, 6]),
    ],
)
def test_grid_has_the_layout_closest_to_squares(cells, size, rows):
    labels = grid_partition(cells, size)
    assert labels.unique().tolist() == list(range(cells))
    first, found = 0, []
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


def coloured_video(seed: int, colours: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Video (2, 10, 12, 3) of well separated colours with noise, and its labels."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])[:colours]
    labels = torch.randint(0, colours, (2, 10, 12), generator=generator)
    return corners[labels] + 0.03 * torch.randn(2, 10, 12, 3, generator=generator), labels


def test_kmeans_finds_colours_and_padding_shapes_no_cluster():
    video, labels = coloured_video(0)
    points = video.flatten(1, 2)[None]
    found = kmeans(points, 4, torch.ones(1, 2, dtype=torch.bool))
    assert (found.shape, found.dtype) == ((1, 2, 120), torch.int64)
    assert adjusted_rand_score(labels.flatten(), found.flatten()) == 1.0
    padded = torch.cat([points, torch.full((1, 2, 120, 3), 50.0)], dim=1)
    assert torch.equal(kmeans(padded, 4, torch.tensor([[True, True, False, False]]))[:, :2], found)
    assert not kmeans(padded, 4, torch.zeros(1, 4, dtype=torch.bool)).any()


def test_kmeans_depends_on_the_video_and_the_seed_alone():
    videos = torch.rand(3, 2, 50, 3, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(3, 2, dtype=torch.bool)
    together = kmeans(videos, 6, valid, seed=1)
    assert torch.equal(together, torch.cat([kmeans(video[None], 6, valid[:1], seed=1) for video in videos]))
    assert not torch.equal(together, kmeans(videos, 6, valid, seed=2))


def test_kmeans_of_features_weighs_places():
    features = torch.zeros(1, 1, 12, 4)
    features[:, :, ::2, 0] = 1.0  # stripes, of columns 0 and 2
    valid = torch.ones(1, 1, dtype=torch.bool)
    assert kmeans_features(features, (3, 4), 2, valid, 0.0)[0, 0].diff(dim=1).abs().sum() == 9
    halves = kmeans_features(features, (3, 4), 2, valid, 50.0)[0, 0]
    assert torch.equal(halves[:, :2], halves[:1, :1].expand(3, 2))
    assert torch.equal(halves[:, 2:], 1 - halves[:, :2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kmeans(torch.zeros(1, 1, 1, 3), 2, torch.ones(1, 1, dtype=torch.bool)), "2 points"),
        (lambda: kmeans_features(torch.zeros(1, 2, 10, 3), (3, 3), 2, torch.ones(1, 2)), "grid of 3 x 3"),
        (lambda: grid_partition(9, (2, 2)), "room for 9 cells"),
        (lambda: score_baselines([{"video": torch.zeros(1, 1, 3, 4, 4)}], 2), r"got \['video'\]"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ShapeError, match=message):
        call()


def baseline_batch(seed: int) -> dict[str, torch.Tensor]:
    video, labels = coloured_video(seed, 3)
    return {"video": video[None].movedim(-1, 2), "segmentations": labels_to_masks(labels[None], 3)}


def scores(batches: list[dict[str, torch.Tensor]]) -> dict[str, dict[str, float]]:
    found = score_baselines(batches, num_slots=3)
    return {row: {name: float(value) for name, value in metric.compute().items()} for row, metric in found.items()}


def test_scores_of_separable_colours():
    found = scores([baseline_batch(0), baseline_batch(1)])
    assert list(found) == ["grid", "k-means RGB"]
    for name in ("video_fg_ari", "video_ari", "video_mbo", "video_miou", "image_fg_ari", "image_mbo"):
        assert found["k-means RGB"][name] == pytest.approx(1.0)
        assert found["grid"][name] < 0.5


def test_cached_features_have_a_row():
    batch = baseline_batch(0)
    batch["segmentations"] = batch["segmentations"][..., :5, ::2].repeat_interleave(2, -2).repeat_interleave(2, -1)
    ids = batch["segmentations"][..., ::2, ::2].int().argmax(2)
    batch["features"] = 100 * torch.nn.functional.one_hot(ids, 8).flatten(2, 3).float()
    found = scores([batch])
    assert list(found) == ["grid", "k-means RGB", "k-means features"]
    assert found["k-means features"]["video_ari"] == pytest.approx(1.0)


def test_scores_skip_padding_and_shrink_large_frames(monkeypatch):
    batch = baseline_batch(0)
    expected = scores([batch])
    junk = {"video": torch.rand(1, 2, 3, 10, 12), "segmentations": batch["segmentations"].roll(1, 2)}
    doubled = {name: torch.cat([batch[name], junk[name]]) for name in batch}
    padded = {name: torch.cat([value, junk[name].expand_as(value)], dim=1) for name, value in doubled.items()}
    padded["batch_padding_mask"] = torch.tensor([True, False])
    padded["frame_mask"] = torch.tensor([[True, True, False, False]] * 2)
    found = scores([padded])
    for row in expected:
        assert found[row] == pytest.approx(expected[row])
    large = {name: value.repeat_interleave(4, -1).repeat_interleave(4, -2) for name, value in batch.items()}
    monkeypatch.setattr(summary, "_LONGER_SIDE", 12)
    assert scores([large])["k-means RGB"]["video_ari"] == pytest.approx(1.0)
