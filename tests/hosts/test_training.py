"""What every host gets from its base: evaluation, prediction, schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.evaluation import SlotEvaluation, frame_validity, mean_over_frames, resize_masks
from ssync_pl.hosts.training import SlotHost, exponential_for, schedule_for


class _Halves(SlotHost):
    """Two slots: the left and the right half of a frame of 4 x 4; the loss is the mean of the frames that count."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def segment(self, batch: Mapping[str, Any]) -> Tensor:
        left = torch.tensor([0.9, 0.9, 0.1, 0.1]).expand(1, 2, 4, 4)
        return torch.stack([left, 1 - left], dim=2).expand(len(batch["features"]), -1, -1, -1, -1)

    def evaluate(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return self.segment(batch), batch["features"].mean()


def _batch() -> dict[str, Tensor]:
    truth = torch.zeros(1, 2, 2, 8, 8, dtype=torch.bool)
    truth[:, :, 0, :, :4] = True
    truth[:, :, 1] = ~truth[:, :, 0]
    return {"features": torch.full((1, 2, 16, 3), 2.5), "video": torch.zeros(1, 2, 3, 8, 8), "segmentations": truth}


def _loader(batch: dict[str, Tensor]) -> DataLoader[Any]:
    return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]


def _trainer(tmp_path: Path) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


def test_validation_and_test_score_what_the_subclass_says(tmp_path: Path) -> None:
    for verb, prefix in (("validate", "val/"), ("test", "test/")):
        scores = getattr(_trainer(tmp_path), verb)(_Halves(), _loader(_batch()), verbose=False)[0]
        assert scores[f"{prefix}loss"] == 2.5
        assert scores[f"{prefix}used_slots"] == 2.0
        assert scores[f"{prefix}video_ari"] == pytest.approx(1.0)


def test_prediction_has_the_size_of_the_frames_or_else_of_the_patches() -> None:
    batch = _batch()
    at_frames = _Halves().predict_step(batch, 0)
    assert at_frames["masks"].shape == (1, 2, 2, 8, 8)
    assert at_frames["labels"][0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    del batch["video"]
    assert _Halves().predict_step(batch, 0)["labels"][0, 0, 0].tolist() == [0, 0, 1, 1]


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
    with pytest.raises(ShapeError, match="segmentations"):
        SlotEvaluation().update(torch.rand(1, 2, 3, 4, 4), batch, torch.tensor(1.0))


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (schedule_for(1000, 4, "constant"), {0: 0.2, 1: 0.4, 3: 0.8, 4: 1.0, 5: 1.0}),
        (schedule_for(1000, 0, "cosine"), {0: 1.0, 250: 0.5 + math.sqrt(0.125), 500: 0.5, 1000: 0.0}),
        (schedule_for(900, 0, "exponential", 3), {0: 1, 300: 0.5, 600: 0.25, 900: 0.125, 5000: 0.125}),
        (schedule_for(50, 100, "constant"), {0: 1 / 6, 5: 1.0}),
        (schedule_for(0, 100), {0: 1.0}),
        (schedule_for(math.inf, 10, "constant"), {100: 1.0}),
        (exponential_for(500, 10, 110, 0.25), {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.5, 110: 0.25, 210: 0.0625}),
        (exponential_for(1000, 100), {1000: 0.5}),
        (exponential_for(50, 100), {0: 0.0, 5: 1.0, 50: 0.5}),
        (exponential_for(0, 100), {0: 1.0}),
        (exponential_for(-1, 10, rate=1.0), {0: 0.0, 10: 1.0, 10_000: 1.0}),
    ],
)
def test_schedules_by_hand(factor, expected) -> None:
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: schedule_for(math.inf, 10, "cosine"), "max_steps"),
        (lambda: schedule_for(10, 0, "linear"), "decay"),  # type: ignore[arg-type]
        (lambda: schedule_for(10, -1), "warmup_steps"),
        (lambda: exponential_for(-1, 10), "decay_steps"),
        (lambda: exponential_for(100, 10, decay_steps=5), "decay_steps"),
        (lambda: exponential_for(100, 10, rate=0), "decay_rate"),
    ],
)
def test_schedules_that_cannot_be_are_refused(call, match) -> None:
    with pytest.raises(ConfigError, match=match):
        call()
