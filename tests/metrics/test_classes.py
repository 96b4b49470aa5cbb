import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from metric_helpers import CLASSES, SCENE, items
from torch import nn

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.metrics import BoundaryF, SegmentationMetrics, UnusedSlots, VideoARI, metric_names
from ssync_pl.metrics.functional import boundary_f, labels_to_masks, read_scene


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("name", [*CLASSES, "boundary_f"])
def test_class_is_the_mean_of_the_function(name, background):
    pred, true = SCENE
    valid = torch.tensor([[True] * 4, [True, True, False, True], [False] * 4])
    if name == "boundary_f":
        metric, values = BoundaryF(), boundary_f(read_scene(pred, true, valid)).nanmean(dim=1)
    else:
        metric_class, function, level = CLASSES[name]
        metric = pickle.loads(pickle.dumps(metric_class(ignore_background=background)))
        values = items(function, pred, true, valid, level=level, background=background)
    for video in range(3):
        metric.update(pred[video : video + 1], true[video : video + 1], valid[video : video + 1])
    got = metric.compute()
    assert got.shape == ()
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(values.nanmean().item(), abs=1e-12)
    metric.reset()
    assert not metric.count.any()


def test_unknown_scores_are_refused():
    with pytest.raises(ConfigError, match="video_dice"):
        SegmentationMetrics(scores=["video_dice"])


@pytest.mark.parametrize("has_background", [True, False])
def test_collection_equals_single_metrics(has_background):
    pred, true = SCENE
    truth = true if has_background else true[:, :, 1:]
    masks = labels_to_masks(pred, 6).float()
    everything = (*metric_names("segmentation"), *metric_names("slots"))
    metrics = SegmentationMetrics("val/", has_background, scores=everything)
    singles = {name: kind(ignore_background=has_background) for name, (kind, *_) in CLASSES.items()}
    singles |= {"boundary_f": BoundaryF(), "unused_slots": UnusedSlots()}
    if has_background:
        singles["video_ari"] = VideoARI()
    for part in (slice(0, 2), slice(2, 3)):
        metrics.update(masks[part], truth[part])
        for name, single in singles.items():
            single.update(masks[part], *([] if name == "unused_slots" else [truth[part]]))
    scores = metrics.compute()
    assert list(scores) == metrics.keys()
    for name, single in singles.items():
        assert scores[f"val/{name}"].item() == pytest.approx(single.compute().item(), abs=1e-12), name
    assert scores["val/used_slots"] + scores["val/unused_slots"] == 6


def test_collection_scores_segmentation_unless_told():
    names = SegmentationMetrics().keys()
    assert names == list(metric_names("segmentation"))
    assert {f"{level}_{name}" for level in ("video", "image") for name in ("fg_ari", "ari", "mbo")} <= set(names)
    with pytest.raises(ShapeError, match="has_background=False"):
        SegmentationMetrics().update(SCENE[0], SCENE[1][:, :, 1:])
    nothing = SegmentationMetrics()
    nothing.update(torch.zeros(1, 1, 2, 2, dtype=torch.long), torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool))
    assert all(value.isnan() for value in nothing.compute().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_hosts_keep_float64_sums_and_no_state(dtype):
    hosts = [nn.ModuleList([SegmentationMetrics(), VideoARI()]) for _ in range(2)]
    for metric in (*hosts[0].to(dtype), *hosts[1]):
        metric.update(*SCENE)
        metric.update(*SCENE)
    assert torch.equal(hosts[0][0].total, hosts[1][0].total)
    assert hosts[0][1].compute().item() == hosts[1][1].compute().item()
    assert hosts[0].state_dict() == {}


GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("metrics_*.npz"))
RECORDED = {
    "VideoARI": "video_fg_ari",
    "ImageARI": "image_fg_ari",
    "VideoIoU_overlap": "video_mbo",
    "ImageIoU_overlap": "image_mbo",
    "VideoIoU_hungarian": "video_miou",
    "ImageIoU_hungarian": "image_miou",
}


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
