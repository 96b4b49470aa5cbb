"""What every reference host gets from its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssync_pl.hosts.training import SlotHost


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


def test_a_host_must_say_how_it_segments() -> None:
    with pytest.raises(TypeError, match="abstract"):
        SlotHost()  # type: ignore[abstract]
