from __future__ import annotations

import pytest
import torch

from ssync_pl.errors import ShapeError
from ssync_pl.hosts.evaluation import SlotEvaluation, count_used_slots, frame_validity, mean_over_frames, resize_masks


def test_frame_validity_joins_both_masks() -> None:
    batch = {
        "video": torch.zeros(2, 2, 3, 4, 4),
        "frame_mask": torch.tensor([[True, False], [True, True]]),
        "batch_padding_mask": torch.tensor([True, False]),
    }
    assert frame_validity(batch).tolist() == [[True, False], [False, False]]


def test_frame_validity_of_batches_without_frames() -> None:
    batch = {"features": torch.zeros(2, 3, 5, 4), "batch_padding_mask": torch.tensor([False, True])}
    assert frame_validity(batch).tolist() == [[False] * 3, [True] * 3]


def test_mean_over_no_frames_is_zero() -> None:
    assert mean_over_frames(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0


def test_used_slots_over_the_clip_skip_padded_frames() -> None:
    masks = torch.zeros(2, 2, 4, 2, 2)
    masks[0, 0, 1] = 1.0
    masks[0, 1, 2] = 1.0
    masks[1, 0, 3, 0] = 1.0
    masks[1, 0, 0, 1] = 1.0
    masks[1, 1, 2] = 1.0
    valid = torch.tensor([[True, True], [True, False]])
    # Clip 0: slots 1 and 2 on two frames. Clip 1: slots 3 and 0 on the frame that counts.
    assert count_used_slots(masks, valid).tolist() == [2.0, 2.0]


def test_resize_is_bilinear_frame_by_frame() -> None:
    masks = torch.rand(2, 3, 4, 5, 5).softmax(dim=2)
    resized = resize_masks(masks, (10, 8))
    expected = torch.nn.functional.interpolate(masks[1, 2][None], size=(10, 8), mode="bilinear")[0]
    torch.testing.assert_close(resized[1, 2], expected)
    torch.testing.assert_close(resized.sum(dim=2), torch.ones(2, 3, 10, 8))


def test_evaluation_weighs_videos_and_frames_and_resets() -> None:
    truth = torch.zeros(1, 1, 3, 4, 4, dtype=torch.bool)
    truth[:, :, 1, :, :2] = True
    truth[:, :, 2, :, 2:] = True
    batch = {"video": torch.zeros(1, 1, 3, 4, 4), "segmentations": truth}
    evaluation = SlotEvaluation("x/")
    evaluation.update(truth.float(), batch, torch.tensor(2.0))
    evaluation.update(truth.float(), batch | {"batch_padding_mask": torch.tensor([False])}, torch.tensor(100.0))
    scores = evaluation.compute()
    assert scores["x/loss"].item() == 2.0
    assert scores["x/used_slots"].item() == 2.0
    assert scores["x/video_mbo"].item() == pytest.approx(1.0)
    assert scores["x/video_fg_ari"].item() == pytest.approx(1.0)
    evaluation.reset()
    evaluation.update(truth.float(), batch, torch.tensor(4.0))
    assert evaluation.compute()["x/loss"].item() == 4.0


def test_evaluation_refuses_masks_of_other_frames() -> None:
    batch = {"video": torch.zeros(1, 2, 3, 4, 4), "segmentations": torch.zeros(1, 1, 2, 4, 4, dtype=torch.bool)}
    with pytest.raises(ShapeError, match=r"B, T = \(1, 2\).*Give one mask a frame"):
        SlotEvaluation().update(torch.rand(1, 2, 3, 4, 4), batch, torch.tensor(1.0))
