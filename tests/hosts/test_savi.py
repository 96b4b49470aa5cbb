from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts import SAVi
from ssync_pl.hosts.nn.initializers import first_frame_hints

Build = Callable[..., SAVi]


def _trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
    }
    return L.Trainer(**(defaults | options))


def _loader(batch: dict[str, Tensor]) -> DataLoader[Any]:
    return DataLoader([batch], batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("frames", [1, 3])
def test_forward_shapes(tiny_savi: Build, frames: int) -> None:
    out = tiny_savi()(torch.randn(2, frames, 3, 16, 16))
    assert out.slots.shape == (2, frames, 3, 16)
    assert out.attention_logits.shape == (2, frames, 3, 64)
    assert out.attention_grid == (8, 8)
    assert out.reconstruction.shape == (2, frames, 3, 8, 8)
    assert out.mask_logits.shape == (2, frames, 3, 8, 8)


def test_default_sizes_are_savi_small() -> None:
    model = SAVi()
    assert sum(p.numel() for p in model.encoder.convolutions.parameters()) == (3 + 3 * 32) * 32 * 25 + 4 * 32
    assert model.decoder.size == (64, 64)
    assert model.corrector.to_q.weight.shape == (128, 128)
    assert len(model.predictor.blocks) == 1


def test_not_square_frames(tiny_savi: Build) -> None:
    out = tiny_savi(decoder_broadcast=(4, 6))(torch.randn(1, 2, 3, 16, 24))
    assert out.attention_grid == (8, 12)
    assert out.attention_logits.shape[-1] == 96
    assert out.mask_logits.shape[-2:] == (8, 12)


def test_modules_are_called_as_adapters_expect(tiny_savi: Build) -> None:
    model = tiny_savi()
    calls: dict[str, list[Any]] = {"encoder": [], "corrector": [], "predictor": [], "decoder": []}
    for name, seen in calls.items():
        getattr(model, name).register_forward_hook(lambda _m, args, out, seen=seen: seen.append((args, out)))
    out = model(torch.randn(2, 3, 3, 16, 16))
    assert {name: len(seen) for name, seen in calls.items()} == {
        "encoder": 1,
        "corrector": 3,
        "predictor": 2,
        "decoder": 1,
    }
    torch.testing.assert_close(torch.stack([o.logits for _, o in calls["corrector"]], 1), out.attention_logits)
    torch.testing.assert_close(calls["decoder"][0][1].mask_logits, out.mask_logits)
    assert calls["decoder"][0][0][0].shape == (2, 3, 3, 16)


def test_iterations_differ_between_first_and_later_frames(tiny_savi: Build) -> None:
    model = tiny_savi(iterations_first=3, iterations_later=2)
    counts: list[int] = []
    model.corrector.register_forward_pre_hook(lambda _m, args: counts.append(args[2]))
    model(torch.randn(1, 3, 3, 16, 16))
    assert counts == [3, 2, 2]


def test_state_flows_through_predictor(tiny_savi: Build) -> None:
    model = tiny_savi(slot_init="learned").eval()
    video = torch.randn(1, 2, 3, 16, 16)
    out = model(video)
    features = model.encoder(video[0]).features
    first = model.corrector(model.initializer(1), features[:1], 2)
    second = model.corrector(model.predictor(first.slots), features[1:], 1)
    torch.testing.assert_close(out.slots[:, 1], second.slots)
    torch.testing.assert_close(out.attention_logits[:, 1], second.logits)


def test_loss_is_the_error_against_the_area_resized_frame(tiny_savi: Build, tiny_batch: dict[str, Tensor]) -> None:
    model = tiny_savi(slot_init="learned")
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    loss = model.training_step(tiny_batch, 0)
    target = rearrange(tiny_batch["video"], "b t c (h i) (w j) -> b t c h w i j", i=2, j=2).mean(dim=(-2, -1))
    expected = (model(tiny_batch["video"]).reconstruction - target).square().mean()
    torch.testing.assert_close(loss, expected)


def test_padded_frames_do_not_count_in_the_loss(tiny_savi: Build, tiny_batch: dict[str, Tensor]) -> None:
    model = tiny_savi(slot_init="learned")
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    short = {"video": tiny_batch["video"][:, :1]}
    padded = {"video": tiny_batch["video"].clone(), "frame_mask": torch.tensor([[True, False], [True, False]])}
    padded["video"][:, 1] = 100.0
    torch.testing.assert_close(model.training_step(padded, 0), model.training_step(short, 0))


@pytest.mark.parametrize("slot_init", ["gaussian", "learned", "boxes", "centres"])
def test_overfits_a_tiny_clip(tiny_savi: Build, tiny_batch: dict[str, Tensor], slot_init: str) -> None:
    model = tiny_savi(slot_init=slot_init)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.training_step(tiny_batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.25 * losses[0]
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []


def test_conditioning_reaches_the_slots(tiny_savi: Build, tiny_batch: dict[str, Tensor]) -> None:
    model = tiny_savi(slot_init="boxes")
    boxes = first_frame_hints(tiny_batch["segmentations"], 3)
    moved = boxes.clone()
    moved[:, 0] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    video = tiny_batch["video"]
    assert torch.equal(model(video, boxes).slots, model(video, boxes).slots)
    assert not torch.allclose(model(video, boxes).slots, model(video, moved).slots)


def test_fit_validates_saves_and_loads(
    tiny_savi: Build, square_loader: Callable[..., Any], tiny_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = tiny_savi(slot_init="learned", decay="cosine")
    trainer = _trainer(tmp_path, max_steps=4)
    trainer.fit(model, square_loader(), square_loader(batch_size=3))
    scores = trainer.callback_metrics
    assert {"val/loss", "val/used_slots", "val/video_fg_ari", "val/video_ari", "val/video_mbo"} <= set(scores)
    assert 1.0 <= scores["val/used_slots"].item() <= 3.0
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = SAVi.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True, map_location="cpu")
    assert loaded.hparams == model.hparams
    assert not [key for key in loaded.state_dict() if key.startswith("evaluation")]
    torch.testing.assert_close(loaded(tiny_batch["video"]).slots, model(tiny_batch["video"]).slots)


def test_validation_ignores_repeated_padding(tiny_savi: Build, tiny_batch: dict[str, Tensor], tmp_path: Path) -> None:
    model = tiny_savi(slot_init="learned")
    only_first = {key: value[:1] for key, value in tiny_batch.items()}
    padded = dict(tiny_batch, batch_padding_mask=torch.tensor([True, False]))
    expected = _trainer(tmp_path).validate(model, _loader(only_first), verbose=False)[0]
    got = _trainer(tmp_path).validate(model, _loader(padded), verbose=False)[0]
    assert got == pytest.approx(expected)


def test_used_slots_is_one_when_one_slot_takes_all(
    tiny_savi: Build, tiny_batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = tiny_savi(slot_init="learned", num_slots=1)
    scores = _trainer(tmp_path).validate(model, _loader(tiny_batch), verbose=False)[0]
    assert scores["val/used_slots"] == 1.0
    # One region against background + object: no agreement beyond chance.
    assert scores["val/video_ari"] == pytest.approx(0.0, abs=1e-6)
    # IoU of the whole frame with a 6x6 square of 16x16.
    assert scores["val/video_mbo"] == pytest.approx(36 / 256)


def test_background_is_read_from_the_data_module(
    tiny_savi: Build, square_loader: Callable[..., Any], tmp_path: Path
) -> None:
    class Data(L.LightningDataModule):
        has_background = False

        def val_dataloader(self) -> Any:
            return square_loader()

        def test_dataloader(self) -> Any:
            return square_loader()

    model = tiny_savi()
    scores = _trainer(tmp_path).validate(model, datamodule=Data(), verbose=False)[0]
    assert model.evaluation.has_background is False
    assert "val/video_ari" not in scores
    assert "test/video_mbo" in _trainer(tmp_path).test(model, datamodule=Data(), verbose=False)[0]


def test_predict_returns_labels_and_masks_at_frame_size(
    tiny_savi: Build, square_loader: Callable[..., Any], tmp_path: Path
) -> None:
    outputs = _trainer(tmp_path).predict(tiny_savi(), square_loader())
    assert outputs is not None
    first: dict[str, Tensor] = outputs[0]  # type: ignore[assignment]
    assert first["labels"].shape == (2, 2, 16, 16)
    assert first["labels"].dtype == torch.long
    assert first["masks"].shape == (2, 2, 3, 16, 16)
    torch.testing.assert_close(first["masks"].sum(dim=2), torch.ones(2, 2, 16, 16))
    assert torch.equal(first["masks"].argmax(dim=2), first["labels"])


def test_bf16_autocast_keeps_logits_in_float32(tiny_savi: Build) -> None:
    model = tiny_savi()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(1, 2, 3, 16, 16))
    assert out.attention_logits.dtype == torch.float32
    assert out.mask_logits.dtype == torch.float32
    assert torch.isfinite(out.reconstruction).all()


def test_errors_say_what_to_do(tiny_savi: Build, tiny_batch: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="`video`"):
        tiny_savi()(torch.randn(2, 3, 16, 16))
    with pytest.raises(ConfigError, match="Set `masks_in_training: true`"):
        tiny_savi(slot_init="boxes").training_step({"video": tiny_batch["video"]}, 0)
    with pytest.raises(ConfigError, match="`conditioning` to be a tensor"):
        tiny_savi(slot_init="boxes")(tiny_batch["video"])
    with pytest.raises(ConfigError, match="`conditioning` to be None"):
        tiny_savi()(tiny_batch["video"], torch.zeros(2, 3, 4))
    with pytest.raises(ShapeError, match=r"`conditioning` to be \(B, 3, 2\)"):
        tiny_savi(slot_init="centres")(tiny_batch["video"], torch.zeros(2, 3, 4))
    with pytest.raises(ConfigError, match="`slot_init` to be 'gaussian'"):
        tiny_savi(slot_init="zeros")
    with pytest.raises(ConfigError, match="`encoder_channels` and `encoder_strides`"):
        tiny_savi(encoder_strides=(1,))
    with pytest.raises(ConfigError, match="`num_slots`"):
        tiny_savi(num_slots=0)
    with pytest.raises(ConfigError, match="Expected key `segmentations` in an evaluation batch"):
        _trainer(tmp_path).validate(tiny_savi(), _loader({"video": tiny_batch["video"]}), verbose=False)


def test_command_line_builds_it_from_flat_arguments() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SAVi, "model")
    values = [
        "--model.encoder_channels=[8, 8]",
        "--model.encoder_strides=[2, 1]",
        "--model.decoder_broadcast=[4, 4]",
        "--model.slot_init=learned",
    ]
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # jsonargparse before 4.49
    model = instantiate(parser.parse_args(values)).model
    assert model.encoder(torch.randn(1, 3, 16, 16)).grid == (8, 8)
    assert model.decoder.size == (32, 32)
    with pytest.raises(jsonargparse.ArgumentError, match="slot_init"):
        parser.parse_args(["--model.slot_init=other"])
