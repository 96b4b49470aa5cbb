"""The published metrics, recorded from the official code: totals, sums and counts of every video."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_helpers import CLASSES, items

from ssync_pl.metrics import SegmentationMetrics

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("metrics_*.npz"))
RECORDED = {
    "VideoARI": "video_fg_ari",
    "ImageARI": "image_fg_ari",
    "VideoIoU_overlap": "video_mbo",
    "ImageIoU_overlap": "image_mbo",
    "VideoIoU_hungarian": "video_miou",
    "ImageIoU_hungarian": "image_miou",
}


def test_the_recorded_cases_are_there():
    assert len(GOLDEN) == 3


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", RECORDED)
def test_equal_to_recorded_values(path, name):
    score = RECORDED[name]
    metric_class, function, level = CLASSES[score]
    with np.load(path, allow_pickle=False) as file:
        content = {name: file[name] for name in file.files}
    settings = json.loads(str(content["json"]))
    pred, true = torch.from_numpy(content["pred"]), torch.from_numpy(content["true"])
    background, overlaps = settings["ignore_background"], settings["ignore_overlaps"]
    recorded, sums, numbers = (content[name + kind] for kind in ("", "_per_sample_sum", "_per_sample_count"))
    values = items(function, pred, true, level=level, background=background, overlaps=overlaps)
    values = values.reshape(len(pred), -1)
    np.testing.assert_allclose(values.nansum(dim=1).numpy(), sums, atol=1e-6)
    np.testing.assert_array_equal((~values.isnan()).sum(dim=1), numbers)
    metric = metric_class(background, overlaps)
    together = SegmentationMetrics("val/", background, ignore_overlaps=overlaps)
    metric.update(pred[:1], true[:1])
    metric.update(pred[1:], true[1:])
    assert metric.compute().item() == pytest.approx(float(recorded), abs=1e-6)
    together.update(pred, true)
    assert together.compute()[f"val/{score}"].item() == pytest.approx(float(recorded), abs=1e-6)
