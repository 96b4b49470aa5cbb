import numpy as np
import pytest
import torch
from metric_helpers import SCENE, items
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from ssync_pl.errors import ShapeError
from ssync_pl.metrics.functional import Contingency, boundary_f, contingency, labels_to_masks, read_scene
from ssync_pl.metrics.functional.segmentation import adjusted_rand_index, mean_best_overlap, mean_iou
from ssync_pl.metrics.functional.slots import slot_identity, slots_per_object

SCORES = (adjusted_rand_index, mean_best_overlap, mean_iou, slots_per_object)


def count(pred: Tensor, true: Tensor) -> Contingency:
    return contingency(read_scene(pred, true))


def one_row(labels: list[int], truth: list[int], channels: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(labels)[None, None, None], labels_to_masks(torch.tensor(truth)[None, None, None], channels)


def naive_iou(pred: np.ndarray, masks: list[np.ndarray], matched: bool) -> float:
    slots = [set(np.flatnonzero(pred == slot)) for slot in np.unique(pred)]
    objects = [set(np.flatnonzero(mask)) for mask in masks if mask.any()]
    iou = np.array([[len(o & s) / len(o | s) for s in slots] for o in objects])
    best = iou[linear_sum_assignment(-iou)].sum() if matched else iou.max(axis=1).sum()
    return float(best / len(objects))


@pytest.mark.parametrize(("level", "number"), [("video", 3), ("image", 6)])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_scores_equal_scikit_learn_and_sets_of_pixels(seed, level, number, background):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0 if background else -1, 4, (3, 2, 6, 5), generator=generator)
    noise = torch.randint(0, 7, truth.shape, generator=generator)
    pred = torch.where(torch.rand(truth.shape, generator=generator) < 0.5, truth + 1, noise)
    true, options = labels_to_masks(truth, 4), {"level": level, "background": background}
    got = [items(score, pred, true, **options) for score in (adjusted_rand_index, mean_best_overlap, mean_iou)]
    for i, (t, p) in enumerate(zip(truth.reshape(number, -1).numpy(), pred.reshape(number, -1).numpy(), strict=True)):
        counted, masks = t >= background, [t == channel for channel in range(int(background), 4)]
        ari = adjusted_rand_score(t[counted], p[counted])
        expected = [ari, naive_iou(p, masks, matched=False), naive_iou(p, masks, matched=True)]
        assert [float(one.flatten()[i]) for one in got] == pytest.approx(expected, abs=1e-12)


def test_items_that_count_by_hand():
    pred, true = one_row([0, 0, 0, 0], [1, 1, 0, 0], 2)
    assert items(mean_best_overlap, pred, true, background=True).item() == 0.5  # unions include the background
    assert items(adjusted_rand_index, *one_row([2, 2, 2], [0, 0, 0], 1)).item() == 1.0
    # Frames with background only count 1 in FG-ARI and not at all in IoU; those without any truth nowhere.
    truth = torch.tensor([[[[1, 2]], [[0, 0]], [[-1, -1]]]])
    pred, true = torch.zeros_like(truth), labels_to_masks(truth, 3)
    options = {"level": "image", "background": True}
    ari = items(adjusted_rand_index, pred, true, **options)
    assert ari[0, :2].tolist() == [0.0, 1.0]
    assert ari[0, 2].isnan()
    assert items(mean_best_overlap, pred, true, **options).isnan().tolist() == [[False, True, True]]


def test_overlaps_are_refused_or_left_out():
    true = torch.tensor([[[[[1, 1, 1, 0]], [[0, 0, 1, 1]]]]], dtype=torch.bool)
    pred = torch.tensor([[[[0, 0, 0, 1]]]])
    with pytest.raises(ShapeError, match="1 pixels with several masks"):
        items(adjusted_rand_index, pred, true)
    for function in SCORES:  # without pixel 2 the slots equal the objects: the slot's union loses it as well
        assert items(function, pred, true, overlaps=True).item() == 1.0


@pytest.mark.parametrize("level", ["video", "image"])
def test_padding_is_not_even_read(level):
    pred, true = SCENE
    damaged_pred, damaged_true = pred.clone(), true.clone()
    valid = torch.zeros(3, 4, dtype=torch.bool)
    valid[:2, :3] = True
    damaged_pred[~valid] = -7
    damaged_true.transpose(1, 2)[~valid[:, None].expand(-1, 4, -1)] = True
    for function in SCORES:
        got = items(function, damaged_pred, damaged_true, valid, level=level)
        expected = items(function, pred[:2, :3], true[:2, :3], level=level)
        torch.testing.assert_close(got[~got.isnan()], expected.flatten())
        assert items(function, pred, true, torch.zeros(3, dtype=torch.bool), level=level).isnan().all()
    got = boundary_f(read_scene(damaged_pred, damaged_true, valid))
    assert torch.equal(got[:2, :3], boundary_f(read_scene(*SCENE))[:2, :3])
    got = items(slot_identity, damaged_pred, damaged_true, valid, level="image")[:2]
    assert torch.equal(got, items(slot_identity, pred[:2, :3], true[:2, :3], level="image"))


def test_soft_masks_are_resized_bilinearly_before_argmax():
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(2, 3, 4, 5, 6, generator=generator).softmax(dim=2)
    true = labels_to_masks(torch.randint(0, 3, (2, 3, 10, 18), generator=generator), 3)
    resized = torch.nn.functional.interpolate(masks.flatten(0, 1), size=(10, 18), mode="bilinear", align_corners=False)
    labels = resized.argmax(dim=1).unflatten(0, (2, 3))
    nearest = torch.nn.functional.interpolate(masks.flatten(0, 1), size=(10, 18)).argmax(1).unflatten(0, (2, 3))
    assert not torch.equal(labels, nearest)
    assert torch.equal(read_scene(masks, true).slots, read_scene(labels, true).slots)
    assert torch.equal(count(masks.half(), true).table.sum((-2, -1)), torch.full((2, 3), 180.0).double())


def test_groups_of_frames_names_of_slots_and_autocast_do_not_change_counts(monkeypatch):
    pred, true = SCENE
    expected, borders, masks = count(pred, true).table, boundary_f(read_scene(*SCENE)), labels_to_masks(pred, 5)
    for same in (masks, masks.float(), pred.to(torch.int8), pred * 1_000_003):
        assert torch.equal(count(same, true).table, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which holds whole numbers up to 256 only
        truth = torch.zeros(1, 1, 17, 17, dtype=torch.long)
        assert count(truth, labels_to_masks(truth, 1)).table.item() == 289
    monkeypatch.setattr("ssync_pl.metrics.functional.scene._GROUP_ELEMENTS", 1)
    monkeypatch.setattr("ssync_pl.metrics.functional.boundary._GROUP_ELEMENTS", 1)
    assert torch.equal(count(masks.float(), true).table, expected)
    assert torch.equal(boundary_f(read_scene(*SCENE)), borders)


def test_labels_of_another_size_take_the_nearest_pixels_and_an_empty_batch_counts_nothing():
    pred = SCENE[0]
    small = torch.nn.functional.interpolate(pred.to(torch.uint8), size=(7, 5), mode="nearest-exact").long()
    masks = torch.ones(3, 4, 1, 7, 5, dtype=torch.bool)
    assert torch.equal(count(pred, masks).table, count(small, masks).table)
    for pred in (SCENE[0][:0], labels_to_masks(SCENE[0], 5).float()[:0]):
        assert count(pred, SCENE[1][:0]).table.shape[:3] == (0, 4, 4)
        assert boundary_f(read_scene(pred, SCENE[1][:0])).shape == (0, 4)


PRED, TRUE = torch.zeros(2, 3, 4, 4, dtype=torch.long), torch.ones(2, 3, 1, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("pred", "true", "valid", "message"),
    [
        (PRED, TRUE[:, :, 0], None, "`true`"),
        (PRED, TRUE.float(), None, "`true`.*float32"),
        (PRED, TRUE[:, :, :0], None, "`true`"),
        (PRED[0], TRUE, None, "`pred`"),
        (PRED.float(), TRUE, None, "integer labels.*float32"),
        (PRED[:, :, None], TRUE, None, "`pred`.*int64"),
        (PRED[:, :2], TRUE, None, "same videos and frames"),
        (PRED - 1, TRUE, None, "-1"),
        (torch.full((2, 3, 2, 4, 4), float("nan")), TRUE, None, "NaN"),
        (torch.ones(2, 3, 2, 4, 4, dtype=torch.bool), TRUE, None, "one-hot"),
        (torch.ones(2, 3, 0, 4, 4), TRUE, None, "`pred`"),
        (PRED, TRUE, torch.ones(2), "`valid`"),
        (PRED, TRUE, torch.ones(3, dtype=torch.bool), "`valid`"),
    ],
)
def test_bad_inputs_are_refused(pred, true, valid, message):
    with pytest.raises(ShapeError, match=message):
        read_scene(pred, true, valid)


def test_bad_labels_and_sizes_are_refused():
    with pytest.raises(ShapeError, match="num_classes=2"):
        labels_to_masks(torch.tensor([[2]]), 2)
    with pytest.raises(ShapeError, match="integers"):
        labels_to_masks(torch.tensor([[0.5]]), 2)
