"""The published metrics, recorded from the official code: totals, sums and counts of every video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ssync_pl.metrics import ImageARI, ImageMBO, ImageMIoU, SegmentationMetrics, VideoARI, VideoMBO, VideoMIoU
from ssync_pl.metrics.functional import adjusted_rand_index, mean_best_overlap, mean_iou

RECORDED = {
    "VideoARI": (VideoARI, adjusted_rand_index, "video"),
    "ImageARI": (ImageARI, adjusted_rand_index, "image"),
    "VideoIoU_overlap": (VideoMBO, mean_best_overlap, "video"),
    "ImageIoU_overlap": (ImageMBO, mean_best_overlap, "image"),
    "VideoIoU_hungarian": (VideoMIoU, mean_iou, "video"),
    "ImageIoU_hungarian": (ImageMIoU, mean_iou, "image"),
}


def test_there_are_three_golden_cases():
    assert len(list((Path(__file__).parents[1] / "golden").glob("metrics_*.npz"))) == 3


@pytest.mark.parametrize("name", RECORDED)
def test_function_equals_recorded_values(golden_case, name):
    _, function, level = RECORDED[name]
    settings = {
        "level": level,
        "ignore_background": golden_case.ignore_background,
        "ignore_overlaps": golden_case.ignore_overlaps,
    }
    score = function(golden_case.pred, golden_case.true, **settings)
    assert score.dtype == torch.float64
    assert score.item() == pytest.approx(float(golden_case.values[name]), abs=1e-6)
    items = function(golden_case.pred, golden_case.true, reduction="none", **settings).reshape(
        len(golden_case.pred), -1
    )
    np.testing.assert_allclose(items.nansum(dim=1).numpy(), golden_case.values[f"{name}_per_sample_sum"], atol=1e-6)
    np.testing.assert_array_equal((~items.isnan()).sum(dim=1), golden_case.values[f"{name}_per_sample_count"])


@pytest.mark.parametrize("name", RECORDED)
def test_class_equals_recorded_values_over_two_batches(golden_case, name):
    metric = RECORDED[name][0](golden_case.ignore_background, golden_case.ignore_overlaps)
    metric.update(golden_case.pred[:1], golden_case.true[:1])
    metric.update(golden_case.pred[1:], golden_case.true[1:])
    assert metric.compute().item() == pytest.approx(float(golden_case.values[name]), abs=1e-6)
    assert metric.count.item() == golden_case.values[f"{name}_per_sample_count"].sum()


def test_collection_equals_recorded_values(golden_case):
    has_background = golden_case.ignore_background
    metrics = SegmentationMetrics("val/", has_background, ignore_overlaps=golden_case.ignore_overlaps)
    metrics.update(golden_case.pred, golden_case.true)
    scores = metrics.compute()
    for level in ("video", "image"):
        for ours, theirs in (("fg_ari", "ARI"), ("mbo", "IoU_overlap"), ("miou", "IoU_hungarian")):
            recorded = float(golden_case.values[level.capitalize() + theirs])
            assert scores[f"val/{level}_{ours}"].item() == pytest.approx(recorded, abs=1e-6)
