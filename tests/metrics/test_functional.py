"""Every score against an independent reference: scikit-learn, SciPy, and sets of pixels counted by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.metrics.functional import (
    adjusted_rand_index,
    contingency,
    labels_to_masks,
    linear_assignment,
    mean_best_overlap,
    mean_iou,
)


def one_row(labels: list[int], truth: list[int], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A video of one frame of one row; a truth of -1 is an unlabelled pixel."""
    return torch.tensor(labels)[None, None, None], labels_to_masks(torch.tensor(truth)[None, None, None], channels)


def naive_iou(pred: np.ndarray, true: np.ndarray, matched: bool) -> float:
    """One item: labels (P,) and masks (C, P), with sets and SciPy."""
    from scipy.optimize import linear_sum_assignment

    slots = [set(np.flatnonzero(pred == slot)) for slot in np.unique(pred)]
    objects = [set(np.flatnonzero(mask)) for mask in true if mask.any()]
    iou = np.array([[len(o & s) / len(o | s) for s in slots] for o in objects])
    if not matched:
        return float(iou.max(axis=1).mean())
    rows, columns = linear_sum_assignment(-iou)
    return float(iou[rows, columns].sum() / len(objects))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("level", ["video", "image"])
def test_ari_equals_sklearn(seed, level):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(-1, 4, (3, 2, 6, 5), generator=generator)
    pred = torch.where(
        torch.rand(truth.shape, generator=generator) < 0.5,
        truth + 1,
        torch.randint(0, 7, truth.shape, generator=generator),
    )
    ours = adjusted_rand_index(pred, labels_to_masks(truth, 4), level=level, reduction="none").flatten()
    items = (
        zip(pred.flatten(0, 1), truth.flatten(0, 1), strict=True) if level == "image" else zip(pred, truth, strict=True)
    )
    theirs = [adjusted_rand_score(t[t >= 0], p[t >= 0]) for p, t in items]
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-12)


def test_fg_ari_equals_sklearn_on_the_foreground(scene):
    pred, true = scene
    ours = adjusted_rand_index(pred, true, ignore_background=True, reduction="none")
    truth = true.int().argmax(dim=2)
    theirs = [adjusted_rand_score(t[t > 0], p[t > 0]) for t, p in zip(truth, pred, strict=True)]
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-12)


@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("level", ["video", "image"])
@pytest.mark.parametrize("background", [False, True])
def test_iou_equals_sets_of_pixels(scene, matched, level, background):
    pred, true = scene
    function = mean_iou if matched else mean_best_overlap
    ours = function(pred, true, level=level, ignore_background=background, reduction="none").flatten()
    labels = pred.flatten(1) if level == "video" else pred.flatten(0, 1).flatten(1)
    masks = true.movedim(2, 1).flatten(2) if level == "video" else true.flatten(0, 1).flatten(2)
    masks = masks[:, int(background) :]
    theirs = [naive_iou(p.numpy(), t.numpy(), matched) for p, t in zip(labels, masks, strict=True)]
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (4, 7), (9, 5), (12, 12), (0, 3)])
def test_assignment_equals_scipy(shape):
    from scipy.optimize import linear_sum_assignment

    generator = np.random.default_rng(sum(shape))
    for _ in range(40):
        # Whole numbers make many ties.
        cost = (
            generator.integers(-4, 5, shape).astype(float) if generator.random() < 0.5 else generator.normal(size=shape)
        )
        rows, columns = linear_assignment(cost)
        expected_rows, expected_columns = linear_sum_assignment(cost)
        assert rows.tolist() == expected_rows.tolist()
        assert len(set(columns.tolist())) == len(columns)
        assert cost[rows, columns].sum() == pytest.approx(cost[expected_rows, expected_columns].sum(), abs=1e-9)


def test_assignment_refuses_bad_costs():
    with pytest.raises(ShapeError, match="finite"):
        linear_assignment([[1.0, float("nan")]])
    with pytest.raises(ShapeError, match=r"shape \(n, m\)"):
        linear_assignment([1.0, 2.0])


def test_matching_is_not_greedy():
    # Object 0 prefers slot 0 (IoU 3/7 against 2/5); object 1 has slot 0 alone. Greedy would give 3/7 + 0.
    pred, true = one_row([0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1], 2)
    assert mean_iou(pred, true).item() == pytest.approx((2 / 5 + 2 / 5) / 2)
    assert mean_best_overlap(pred, true).item() == pytest.approx((3 / 7 + 2 / 5) / 2)


def test_unions_include_background_pixels():
    pred, true = one_row([0, 0, 0, 0], [1, 1, 0, 0], 2)
    assert mean_best_overlap(pred, true, ignore_background=True).item() == 0.5


def test_ari_of_a_single_cluster_on_both_sides_is_one():
    pred, true = one_row([2, 2, 2], [0, 0, 0], 1)
    assert adjusted_rand_index(pred, true).item() == 1.0


def test_frames_with_background_only_count_one_in_fg_ari_and_not_at_all_in_iou():
    truth = torch.tensor([[[[1, 2]], [[0, 0]]]])
    pred, true = torch.zeros_like(truth), labels_to_masks(truth, 3)
    settings = {"level": "image", "ignore_background": True}
    frames = adjusted_rand_index(pred, true, reduction="none", **settings)
    assert frames.tolist() == [[0.0, 1.0]]
    assert adjusted_rand_index(pred, true, **settings).item() == 0.5
    assert adjusted_rand_index(pred, true, skip_empty=True, **settings).item() == 0.0
    assert mean_best_overlap(pred, true, reduction="none", **settings).isnan().tolist() == [[False, True]]
    assert mean_best_overlap(pred, true, **settings).item() == 0.5


def test_items_without_truth_are_skipped():
    truth = torch.tensor([[[[0, 1]]], [[[-1, -1]]]])
    pred, true = torch.tensor([[[[0, 1]]], [[[0, 1]]]]), labels_to_masks(truth, 2)
    for function in (adjusted_rand_index, mean_best_overlap, mean_iou):
        assert function(pred, true, reduction="none").isnan().tolist() == [False, True]
        assert function(pred, true).item() == 1.0
        assert function(pred[1:], true[1:]).isnan()


def test_overlaps_are_refused_or_left_out():
    true = torch.tensor([[[[[1, 1, 1, 0]], [[0, 0, 1, 1]]]]], dtype=torch.bool)
    pred = torch.tensor([[[[0, 0, 0, 1]]]])
    with pytest.raises(ShapeError, match=r"1 pixels with several masks. Do `ignore_overlaps=True`"):
        adjusted_rand_index(pred, true)
    # Without pixel 2 the slots equal the objects: the slot's union loses it as well.
    for function in (adjusted_rand_index, mean_best_overlap, mean_iou):
        assert function(pred, true, ignore_overlaps=True).item() == 1.0


def test_missing_background_is_refused():
    pred, true = one_row([0, 0, 1, 1], [0, 0, 1, -1], 2)
    with pytest.raises(ShapeError, match=r"1 pixels without one. Do `ignore_background=False`"):
        adjusted_rand_index(pred, true, ignore_background=True)
    assert adjusted_rand_index(pred, true).item() == 1.0


@pytest.mark.parametrize("function", [adjusted_rand_index, mean_best_overlap, mean_iou])
@pytest.mark.parametrize("level", ["video", "image"])
def test_padding_is_not_even_read(scene, function, level):
    pred, true = scene
    expected = function(pred[:2, :3], true[:2, :3], level=level)
    damaged_pred, damaged_true = pred.clone(), true.clone()
    damaged_pred[2] = -7
    damaged_pred[:, 3] = -7
    damaged_true[2] = True
    damaged_true[:, 3] = True
    valid = torch.zeros(3, 4, dtype=torch.bool)
    valid[:2, :3] = True
    assert function(damaged_pred, damaged_true, valid, level=level).item() == pytest.approx(expected.item(), abs=1e-12)
    videos = torch.tensor([True, False, True])
    assert function(pred, true, videos, level=level).item() == pytest.approx(
        function(pred[videos], true[videos], level=level).item(), abs=1e-12
    )
    assert function(pred, true, torch.zeros(3, dtype=torch.bool), level=level).isnan()


def test_soft_masks_are_resized_bilinearly_before_argmax():
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(2, 3, 4, 5, 6, generator=generator).softmax(dim=2)
    truth = torch.randint(0, 3, (2, 3, 10, 18), generator=generator)
    true = labels_to_masks(truth, 3)
    resized = torch.nn.functional.interpolate(masks.flatten(0, 1), size=(10, 18), mode="bilinear", align_corners=False)
    labels = resized.argmax(dim=1).unflatten(0, (2, 3))
    assert not torch.equal(
        labels, torch.nn.functional.interpolate(masks.flatten(0, 1), size=(10, 18)).argmax(1).unflatten(0, (2, 3))
    )
    torch.testing.assert_close(adjusted_rand_index(masks, true), adjusted_rand_index(labels, true))
    assert contingency(masks, true).table.shape == (2, 3, 3, 4)
    assert torch.equal(contingency(masks.half(), true).table.sum((-2, -1)), torch.full((2, 3), 180.0).double())


def test_hard_masks_equal_labels(scene):
    pred, true = scene
    masks = labels_to_masks(pred, 5)
    assert torch.equal(contingency(masks, true).table, contingency(pred, true).table)
    assert torch.equal(contingency(masks.float(), true).table, contingency(pred.to(torch.int8), true).table)


def test_resolution_takes_the_nearest_pixels(scene):
    pred, true = scene
    small = torch.nn.functional.interpolate(
        true.flatten(0, 1).to(torch.uint8), size=(7, 5), mode="nearest-exact"
    ).bool()
    small_pred = torch.nn.functional.interpolate(pred.to(torch.uint8), size=(7, 5), mode="nearest-exact").long()
    ours = contingency(pred, true, resolution=(7, 5)).table
    assert torch.equal(ours, contingency(small_pred, small.unflatten(0, (3, 4))).table)


def test_sparse_label_values_and_renamed_slots_do_not_matter(scene):
    pred, true = scene
    renamed = pred * 1_000_003
    assert contingency(renamed, true).table.shape[-1] == pred.unique().numel()
    for function in (adjusted_rand_index, mean_best_overlap, mean_iou):
        assert function(renamed, true).item() == pytest.approx(function(pred, true).item(), abs=1e-12)


def test_groups_of_frames_and_autocast_do_not_change_counts(scene, monkeypatch):
    pred, true = scene
    expected = contingency(pred, true).table
    monkeypatch.setattr(sys.modules["ssync_pl.metrics.functional.contingency"], "_GROUP_ELEMENTS", 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grouped = contingency(pred, true).table
    assert torch.equal(grouped, expected)
    assert expected.sum() == pred.numel()


def test_counts_above_256_survive_autocast():
    # bfloat16 holds whole numbers up to 256 only.
    truth = torch.zeros(1, 1, 17, 17, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        table = contingency(truth, labels_to_masks(truth, 1)).table
    assert table.item() == 289


def test_unknown_level_and_reduction_are_refused(scene):
    with pytest.raises(ConfigError, match="'video' or 'image', but got 'clip'"):
        adjusted_rand_index(*scene, level="clip")
    with pytest.raises(ConfigError, match="'mean' or 'none', but got 'sum'"):
        mean_iou(*scene, reduction="sum")


PRED, TRUE = torch.zeros(2, 3, 4, 4, dtype=torch.long), torch.ones(2, 3, 1, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("pred", "true", "valid", "message"),
    [
        (PRED, TRUE[:, :, 0], None, r"`true` to have shape \(B, T, C, H, W\), but got \(2, 3, 4, 4\)"),
        (PRED, TRUE.float(), None, r"dtype bool, but got torch.float32. Do `true.bool\(\)`"),
        (PRED, TRUE[:, :, :0], None, "at least one channel"),
        (PRED[0], TRUE, None, r"labels \(B, T, H, W\) or masks"),
        (PRED.float(), TRUE, None, "integer labels, but got torch.float32"),
        (PRED[:, :, None], TRUE, None, "float or bool masks, but got torch.int64"),
        (PRED[:, :2], TRUE, None, r"same videos and frames, but got \(B, T\) = \(2, 2\) and \(2, 3\)"),
        (PRED - 1, TRUE, None, "labels of at least 0, but got -1"),
        (torch.full((2, 3, 2, 4, 4), float("nan")), TRUE, None, "free of NaN"),
        (torch.ones(2, 3, 2, 4, 4, dtype=torch.bool), TRUE, None, "one-hot over slots"),
        (torch.ones(2, 3, 0, 4, 4), TRUE, None, "at least one slot"),
        (PRED, TRUE, torch.ones(2), r"`valid` to be bool of shape \(2,\) \(videos\) or \(2, 3\) \(frames\)"),
        (PRED, TRUE, torch.ones(3, dtype=torch.bool), r"of shape \(3,\)"),
    ],
)
def test_bad_inputs_are_refused(pred, true, valid, message):
    with pytest.raises(ShapeError, match=message):
        mean_best_overlap(pred, true, valid)


def test_bad_labels_for_masks_are_refused():
    with pytest.raises(ShapeError, match="below num_classes=2, but got 2"):
        labels_to_masks(torch.tensor([[2]]), 2)
    with pytest.raises(ShapeError, match="integers of shape"):
        labels_to_masks(torch.tensor([[0.5]]), 2)
    with pytest.raises(ShapeError, match="two positive sizes"):
        contingency(PRED, TRUE, resolution=(0, 4))


def test_empty_batch_counts_nothing():
    assert adjusted_rand_index(PRED[:0], TRUE[:0]).isnan()
    assert contingency(PRED[:0], TRUE[:0]).table.shape[:3] == (0, 3, 1)
