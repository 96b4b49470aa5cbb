"""The torchmetrics shells: equal to the functions, over batches, devices' casts, ranks and inside Lightning."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from metric_workers import given, metrics_by_name, rank_main, second_rank
from torch import nn

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.metrics import (
    ImageARI,
    ImageMBO,
    ImageMIoU,
    MaskMetric,
    SegmentationMetrics,
    VideoARI,
    VideoMBO,
    VideoMIoU,
)
from ssync_pl.metrics.functional import adjusted_rand_index, labels_to_masks, mean_best_overlap, mean_iou

CLASSES = {
    VideoARI: (adjusted_rand_index, "video"),
    ImageARI: (adjusted_rand_index, "image"),
    VideoMBO: (mean_best_overlap, "video"),
    ImageMBO: (mean_best_overlap, "image"),
    VideoMIoU: (mean_iou, "video"),
    ImageMIoU: (mean_iou, "image"),
}
NAMES = ["fg_ari", "ari", "mbo", "miou"]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("metric_class", CLASSES)
def test_class_equals_function(scene, metric_class, background):
    pred, true = scene
    function, level = CLASSES[metric_class]
    valid = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])
    metric = metric_class(ignore_background=background)
    for video in range(3):
        metric.update(pred[video : video + 1], true[video : video + 1], valid[video : video + 1])
    expected = function(pred, true, valid, level=level, ignore_background=background)
    assert metric.compute().item() == pytest.approx(expected.item(), abs=1e-12)
    assert metric.compute().dtype == torch.float64
    metric.reset()
    assert metric.count.item() == 0


@pytest.mark.parametrize("metric_class", CLASSES)
def test_flags_of_torchmetrics(metric_class):
    metric = metric_class()
    assert metric.higher_is_better is True
    assert metric.full_state_update is False
    assert metric.is_differentiable is False
    assert pickle.loads(pickle.dumps(metric)).level == metric.level


def test_forward_gives_the_batch_and_keeps_the_sum(scene):
    pred, true = scene
    metric = VideoMBO()
    first = metric(pred[:1], true[:1])
    second = metric(pred[1:], true[1:])
    assert metric.compute().item() == pytest.approx((first.item() + 2 * second.item()) / 3)


def test_base_needs_item_values():
    with pytest.raises(TypeError, match="item_values"):
        MaskMetric()


@pytest.mark.parametrize("resolution", [(4,), (0, 3), (2.5, 3)])
def test_bad_resolution_is_refused(resolution):
    with pytest.raises(ConfigError, match="two positive sizes"):
        VideoARI(resolution=resolution)
    with pytest.raises(ConfigError, match="two positive sizes"):
        SegmentationMetrics(resolution=resolution)


@pytest.mark.parametrize("has_background", [True, False])
def test_collection_equals_single_metrics(scene, has_background):
    pred, true = scene
    truth = true if has_background else true[:, :, 1:]
    metrics = SegmentationMetrics("val/", has_background, skip_empty=True, resolution=(8, 8))
    singles = {}
    for level, kinds in (("video", (VideoARI, VideoMBO, VideoMIoU)), ("image", (ImageARI, ImageMBO, ImageMIoU))):
        ari, mbo, miou = kinds
        singles[f"val/{level}_fg_ari"] = ari(has_background, skip_empty=True, resolution=(8, 8))
        if has_background:
            singles[f"val/{level}_ari"] = ari(resolution=(8, 8))
        singles[f"val/{level}_mbo"] = mbo(has_background, resolution=(8, 8))
        singles[f"val/{level}_miou"] = miou(has_background, resolution=(8, 8))
    for metric in (metrics, *singles.values()):
        metric.update(pred[:2], truth[:2])
        metric.update(pred[2:], truth[2:])
    scores = metrics.compute()
    assert list(scores) == metrics.keys() == list(singles)
    for name, single in singles.items():
        assert scores[name].item() == pytest.approx(single.compute().item(), abs=1e-12), name


def test_collection_names_and_clone(scene):
    metrics = SegmentationMetrics(prefix="val/")
    assert metrics.keys() == [f"val/{level}_{name}" for level in ("video", "image") for name in NAMES]
    metrics.update(*scene)
    copy = metrics.clone(prefix="test/")
    copy.reset()
    assert metrics.counts.tolist() == [3.0] * 4 + [12.0] * 4
    assert copy.counts.sum() == 0
    assert copy.keys()[0] == "test/video_fg_ari"
    assert metrics.clone().keys() == metrics.keys()


def test_collection_refuses_overlaps_and_missing_background(scene):
    pred, true = scene
    with pytest.raises(ShapeError, match="has_background=False"):
        SegmentationMetrics().update(pred, true[:, :, 1:])
    doubled = true.clone()
    doubled[:, :, 1] = True
    with pytest.raises(ShapeError, match="ignore_overlaps=True"):
        SegmentationMetrics().update(pred, doubled)
    SegmentationMetrics(ignore_overlaps=True).update(pred, doubled)


def test_empty_collection_is_nan_not_zero():
    metrics = SegmentationMetrics()
    metrics.update(torch.zeros(1, 1, 2, 2, dtype=torch.long), torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool))
    assert all(value.isnan() for value in metrics.compute().values())


class _Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.metrics = SegmentationMetrics()
        self.single = VideoARI()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_hosts_keep_float64_sums(scene, dtype):
    host = _Host().to(dtype)
    reference = _Host()
    for model in (host, reference):
        for _ in range(2):
            model.metrics.update(*scene)
            model.single.update(*scene)
    assert host.metrics.totals.dtype == host.single.total.dtype == torch.float64
    assert host.single.compute().item() == reference.single.compute().item()
    assert torch.equal(host.metrics.totals, reference.metrics.totals)


def test_no_state_enters_checkpoints():
    assert _Host().state_dict() == {}


def test_logs_inside_lightning(scene, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    pred, true = scene

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.metrics = SegmentationMetrics(prefix="val/")

        def validation_step(self, batch: int, batch_idx: int) -> None:
            index = int(batch)
            self.metrics.update(pred[index : index + 1], true[index : index + 1])

        def on_validation_epoch_end(self) -> None:
            self.log_dict(self.metrics.compute())
            self.metrics.reset()

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader([0, 1, 2], batch_size=1)
    results = trainer.validate(Model(), loader, verbose=False)[0]
    expected = adjusted_rand_index(pred, true, ignore_background=True).item()
    assert results["val/video_fg_ari"] == pytest.approx(expected, abs=1e-6)
    assert len(results) == 8


def test_two_ranks_equal_one_process(scene, tmp_path: Path):
    pred, true = scene
    truth = labels_to_masks(true.int().argmax(dim=2), 4)
    # This process is rank 0: starting one more takes half as long as starting two.
    child = mp.spawn(second_rank, args=(str(tmp_path), pred, truth), nprocs=1, join=False)
    threads = torch.get_num_threads()
    try:
        rank_main(0, str(tmp_path), pred, truth)
    finally:
        torch.set_num_threads(threads)
        while not child.join():
            pass
    expected = {}
    for name, metric in metrics_by_name().items():
        metric.update(*given(name, pred, truth))
        value = metric.compute()
        expected[name] = value if isinstance(value, dict) else {"value": value}
    for rank in range(2):
        results = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert results.keys() == expected.keys()
        for name, values in expected.items():
            assert results[name].keys() == values.keys()
            for score, value in values.items():
                assert results[name][score].item() == pytest.approx(value.item(), abs=1e-12), (name, score)
