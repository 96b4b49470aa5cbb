from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as L
import pytest
import torch
from tiny_models import loader, parser_of, pixel_clips, tiny, trainer

from ssync_pl.hosts import SAVi


def test_the_defaults_are_the_published_sizes() -> None:
    model = SAVi()
    assert sum(p.numel() for p in model.encoder.convolutions.parameters()) == (3 + 3 * 32) * 32 * 25 + 4 * 32
    assert model.decoder.size == (64, 64)
    assert model.corrector.to_q.weight.shape == (128, 128)
    assert len(model.predictor.blocks) == 1


def test_padded_frames_do_not_count() -> None:
    model, video = tiny(SAVi, slot_init="learned"), pixel_clips()["video"]
    padded = {"video": video.clone(), "frame_mask": torch.tensor([[True, False], [True, False]])}
    padded["video"][:, 1] = 100.0
    torch.testing.assert_close(model.training_step(padded, 0), model.training_step({"video": video[:, :1]}, 0))


def test_validation_ignores_repeated_padding_and_scores_by_hand(tmp_path: Path) -> None:
    model, batch = tiny(SAVi, trained=True, slot_init="learned", num_slots=1), pixel_clips()
    padded = dict(batch, batch_padding_mask=torch.tensor([True, False]))
    first = {key: value[:1] for key, value in batch.items()}
    scores, expected = (trainer(tmp_path).validate(model, loader(b), verbose=False)[0] for b in (padded, first))
    assert scores == pytest.approx(expected)
    assert scores["val/used_slots"] == 1.0
    assert scores["val/video_ari"] == pytest.approx(0.0, abs=1e-6)  # one region: no agreement beyond chance
    assert scores["val/video_mbo"] == pytest.approx(36 / 256)  # IoU of the frame with a 6 x 6 square of 16 x 16


def test_background_is_read_from_the_data_module(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        has_background = False

        def val_dataloader(self) -> Any:
            return loader(pixel_clips())

        test_dataloader = val_dataloader

    model = tiny(SAVi, trained=True)
    scores = trainer(tmp_path).validate(model, datamodule=Data(), verbose=False)[0]
    assert model.evaluation.has_background is False
    assert "val/video_ari" not in scores
    assert "test/video_mbo" in trainer(tmp_path).test(model, datamodule=Data(), verbose=False)[0]


def test_bf16_autocast_keeps_logits_in_float32() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = tiny(SAVi)(torch.randn(1, 2, 3, 16, 16))
    assert out.attention_logits.dtype == out.mask_logits.dtype == torch.float32
    assert torch.isfinite(out.reconstruction).all()


def test_the_command_line_builds_it_from_flat_arguments() -> None:
    parser, build = parser_of(SAVi)
    model = build(["encoder_channels=[8, 8]", "encoder_strides=[2, 1]", "decoder_broadcast=[4, 6]"])
    out = model(torch.randn(2, 1, 3, 16, 24))
    assert (out.attention_grid, out.mask_logits.shape) == ((8, 12), (2, 1, 11, 32, 48))
    with pytest.raises(jsonargparse.ArgumentError, match="slot_init"):
        parser.parse_args(["--model.slot_init=other"])
